"""Runs a function on n gloo ranks that are started once and used by many tests: importing torch costs seconds.

    def total(value):                      # at module level, so that a new process can import it
        x = torch.tensor(value + dist.get_rank())
        dist.all_reduce(x)
        return x

    def test_the_sum_reaches_every_rank(ranks2):
        assert ranks2.run(total, 10) == [21, 21]

Ranks are forks of a server that has imported torch and computed nothing: a fork of the tests' own process would copy
torch's thread pools in an unknown state, and a spawned one imports all again.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
LOOPBACK = "127.0.0.1"
GRACE_S = 0.3
PRELOADED = ["pytest", "tests.support.ranks", "limoe_dist.train.loop", "torch._dynamo"]


class RankFailure(Exception):
    """A rank raised, died or did not answer; the text names it and holds its traceback."""


class RanksPool:
    """`world` processes with torch.distributed initialised; they start at the first `run` and serve all later ones."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: dist.TCPStore | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 180.0) -> list[Any]:
        """Calls function(*arguments) on every rank at once; returns what came back, by rank.

        function: at module level. Arguments and results are copied (pickled), tensors too. Every rank starts with
        torch.manual_seed(0). timeout_s bounds the whole call, start of the processes included.
        Raises RankFailure for the first rank that fails; the ranks are then killed, for the others may wait in a
        collective, and started anew by the next `run`.
        """
        task = pickle.dumps((function, arguments))
        try:
            if not self._processes:
                self._start()
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send_bytes(task)
                except OSError:
                    raise RankFailure(self._death(rank)) from None
            return self._answers(time.monotonic() + timeout_s)
        except BaseException:
            self._kill()
            raise

    def close(self) -> None:
        """Ends the ranks at once: they hold nothing that is worth a farewell. A later `run` starts new ones."""
        self._kill()

    def _start(self) -> None:
        # The store lives here and takes a free port by itself: no rank can lose a race for a port.
        self._store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=COLLECTIVE_TIMEOUT)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, self._store.port, theirs), name=f"rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _answers(self, deadline: float) -> list[Any]:
        answers: dict[int, Any] = {}
        raised: list[str] = []
        while len(answers) < self.world:
            waiting = {self._pipes[rank]: rank for rank in range(self.world) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready and raised:
                break
            if not ready:
                raise RankFailure(f"no answer from ranks {sorted(waiting.values())} of {self.world} in time")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    kind, answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    raise RankFailure(self._death(rank)) from None
                if kind == "raised":
                    raised.append(f"rank {rank} of {self.world} raised:\n{answers[rank]}")
                    # A rank that dies breaks the others' collectives, and their complaint may be here first.
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if raised:
            raise RankFailure(raised[0])
        return [answers[rank] for rank in range(self.world)]

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(timeout=5)
        return f"rank {rank} of {self.world} ended with exit code {process.exitcode}"

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore(LOOPBACK, port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(task))


def _answer(task: bytes) -> bytes:
    try:
        function, arguments = pickle.loads(task)
        torch.manual_seed(0)
        # Plain bytes, not torch's shared memory: a result must survive the death of its rank.
        answer = pickle.dumps(("returned", function(*arguments)))
        _forget_groups()
        return answer
    # pytest.fail and pytest.skip are BaseExceptions, and a SystemExit would end the rank without a word.
    except BaseException:
        return pickle.dumps(("raised", traceback.format_exc()))


def _forget_groups() -> None:
    """Ends the groups that a function made: each has threads that wake a hundred times a second for good."""
    made = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    if made:
        # What holds them may be in a cycle, and a rank that is ahead must not hang up on one that still reads.
        gc.collect()
        dist.barrier()
        for group in made:
            dist.destroy_process_group(group)
