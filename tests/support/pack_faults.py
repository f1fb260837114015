"""Kills a pack, or fails it, at the n-th of its operations on the disk; counts them where n is never reached.

An operation is a write into a shard, a sync, a rename or a removal: all that a pack does to what another process sees.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from data_prep.packing import shard_file
from limoe_dist.config.errors import UserError

How = Literal["kill before", "kill within", "ENOSPC"]


class FaultyPack:
    """Stands between a pack and the disk, from `install` until the process ends."""

    def __init__(self, at: int, how: How) -> None:
        self.count, self._at, self._how = 0, at, how

    def install(self) -> None:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (shard_file._Hashed, "write")):
            setattr(owner, name, self._met(getattr(owner, name), writes=name == "write"))

    def _met(self, original: Callable[..., Any], *, writes: bool) -> Callable[..., Any]:
        def operation(*given: Any, **named: Any) -> Any:
            self.count += 1
            if self.count - 1 != self._at:
                return original(*given, **named)
            if self._how == "ENOSPC":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._how == "kill within" and writes:
                data = bytes(given[1])
                original(given[0], data[: len(data) // 2])
            if self._how == "kill within" and not writes:
                original(*given, **named)
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return operation


def with_fault(pack: Callable[[], Any], at: int, how: How) -> int | str | None:
    """What a pack with a fault at its operation `at` tells: the count of its operations, its error; None where killed.

    It runs in a fork: the packages are loaded already, and a hundred deaths take seconds.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(pack, FaultyPack(at, how), send))
    process.start()
    send.close()
    try:
        told: int | str | None = receive.recv()
    except EOFError:
        told = None
    process.join()
    expected = -signal.SIGKILL if told is None else 0
    if process.exitcode != expected:
        raise AssertionError(f"the pack ended with {process.exitcode}, not {expected}")
    return told


def _run(pack: Callable[[], Any], faulty: FaultyPack, told: Any) -> None:
    faulty.install()
    try:
        pack()
    except UserError as error:
        told.send(str(error))
    else:
        told.send(faulty.count)
