"""Two ranks that train for real and may be killed: each life costs new processes, but no new imports.

    with Nursery(folder) as nursery:
        lived = nursery.live(Life(run, out, until=8, kill=Kill(after_s=0.7, ranks=(1,))))

A process that has imported everything and used nothing waits in the nursery; ranks are forks of it. That is safe as
long as it starts no threads of its own: torch, gloo and DALI make theirs in the forks.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from limoe_dist.config.schema import Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.loop import train
from tests.support.faults import Fault, FaultyDisk, Passed, passed_by
from tests.support.undisturbed import newest_whole

RANKS = (0, 1)
LIMIT_S = 120.0
"""Of a life: longer, and it hangs."""
ALONE_S = 1.0
"""A rank whose peer died ends by itself when it next needs it; one that has not met it yet would wait for long."""


@dataclass(frozen=True)
class Kill:
    after_s: float
    """From the start of the processes."""
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Life:
    """A start of a run's ranks: new or resumed, whatever stands in `out`."""

    run: Run
    out: Path
    until: int
    """The step after which the run ends by itself."""
    faults: tuple[Fault, ...] = ()
    kill: Kill | None = None


@dataclass(frozen=True)
class Lived:
    statuses: tuple[int | None, ...]
    """By rank: 0, or minus the signal that ended it, or 1 where it ended for want of the other."""
    seconds: float
    printed: str
    """What the ranks wrote to stdout and stderr."""
    passed: tuple[Passed, ...] = ()
    """Points of saves, first those of rank 0; of a life in the nursery."""

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.statuses

    @property
    def began_at(self) -> int | None:
        """The step that it said it would go on from; None where it was killed before it could say so."""
        if "no checkpoint yet: beginning at step 0" in self.printed:
            return 0
        found = re.search(r"^going on from step (\d+)$", self.printed, re.MULTILINE)
        return int(found[1]) if found else None

    @property
    def promised(self) -> int:
        """The newest step of which it said that its checkpoint is there; 0 where it said nothing."""
        return max(
            (int(step) for step in re.findall(r"^step (\d+): checkpoint ", self.printed, re.MULTILINE)), default=0
        )


class Nursery:
    """Where ranks are forked, from the first `live` until the end of the `with`."""

    def __init__(self, folder: Path) -> None:
        """folder: for what ranks print; a folder of its own for each life."""
        self._folder, self._lives = folder, 0
        context = multiprocessing.get_context("spawn")
        self._parent = ProcessPoolExecutor(1, mp_context=context, initializer=_prepare)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._parent.shutdown()

    def live(self, life: Life) -> Lived:
        """Starts both ranks and waits until both have ended. What stands in life.out is gone on with.

        Raises RuntimeError where they fail before they are killed, or hang.
        """
        self._lives += 1
        folder = self._folder / f"life-{self._lives:04d}"
        folder.mkdir(parents=True)
        return self._parent.submit(_live, life, folder).result()


def _prepare() -> None:
    # What training imports late: once for all ranks.
    for name in ("sentencepiece", "torch._dynamo"):
        importlib.import_module(name)
    # A collection in a fork would copy every page that it touches.
    gc.freeze()


def _live(life: Life, folder: Path) -> Lived:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_train, args=(rank, life, folder)) for rank in RANKS]
    began = time.monotonic()
    for rank in ranks:
        rank.start()
    try:
        _end(ranks, life.kill, began)
    except RuntimeError as error:
        raise RuntimeError(f"{error}\n{_printed(folder)}") from None
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    return Lived(
        statuses=tuple(rank.exitcode for rank in ranks),
        seconds=time.monotonic() - began,
        printed=_printed(folder),
        passed=tuple(passed for rank in RANKS for passed in passed_by(rank, folder / f"trace-{rank}")),
    )


def _printed(folder: Path) -> str:
    """Nothing where a rank was killed before it could open the file."""
    file = folder / "printed.txt"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _end(ranks: Sequence[BaseProcess], kill: Kill | None, began: float) -> None:
    """Returns when all have ended, or when one waits in vain for another that was killed.

    Raises RuntimeError where a rank fails before it is killed, or ranks hang.
    """
    if kill is not None and not _all_ended(ranks, began + kill.after_s):
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError("a rank failed before it was killed")
        for rank in kill.ranks:
            ranks[rank].kill()
    deadline = time.monotonic() + LIMIT_S
    while living := [rank for rank in ranks if rank.exitcode is None]:
        bereft = any(rank.exitcode for rank in ranks)
        deadline = min(deadline, time.monotonic() + ALONE_S) if bereft else deadline
        if not wait([rank.sentinel for rank in living], timeout=max(0.0, deadline - time.monotonic())):
            if bereft:
                return
            raise RuntimeError(f"ranks hang: no end after {LIMIT_S:g} seconds")


def _all_ended(ranks: Sequence[BaseProcess], deadline: float) -> bool:
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    return all(rank.exitcode is not None for rank in ranks)


def _train(rank: int, life: Life, folder: Path) -> None:
    """A rank, from its first breath."""
    printed = os.open(folder / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    torch.set_num_threads(1)
    trace = folder / f"trace-{rank}"
    FaultyDisk(life.out, rank, life.faults, trace, lambda: newest_whole(life.out)).install()
    limit = timedelta(seconds=LIMIT_S)
    store = dist.FileStore(str(folder / "store"), len(RANKS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(RANKS), timeout=limit)
    mesh = Mesh.build(tp=life.run.parallel.tp, ep=life.run.parallel.ep)
    train(life.run, life.out, mesh=mesh, device=torch.device("cpu"), resume=True, stop_after=life.until)
