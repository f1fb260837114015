"""Kills a process, or fails an operation, at a named point of a save: faults in limoe_dist/checkpoint/disk.py.

A point is an operation and what it works on, as `sync manifest.json` or `rename .saving to step`. The points of a save
of a small model are all different; of points that are alike the first gets the fault.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from limoe_dist.checkpoint import disk

OPERATIONS = ("make_folder", "create", "write", "sync", "close", "rename", "remove")
How = Literal["before", "within", "after", "ENOSPC", "EIO"]
"""Killed before the operation, in the middle of it or after it; or it fails. A write that meets ENOSPC takes half, as
into the room that is left, and what follows fails."""
KILLS: tuple[How, ...] = ("before", "within", "after")
ERRORS: tuple[How, ...] = ("ENOSPC", "EIO")
DIVISIBLE = ("write", "remove")
"""Operations that have a middle."""


@dataclass(frozen=True)
class Point:
    rank: int
    name: str

    @property
    def operation(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True)
class Fault:
    point: Point
    step: int
    """Of the save that meets it."""
    how: How


@dataclass(frozen=True)
class Passed:
    """An operation that a rank came to, whether it was done or not."""

    step: int
    """Of the save; 0 where the rank had begun none."""
    point: Point
    newest: int
    """At the beginning of a save: what `look` told; else 0."""


class FaultyDisk:
    """Stands between a rank's saves and the disk, from `install` until the process ends."""

    def __init__(self, run_dir: Path, rank: int, faults: Iterable[Fault], trace: Path, look: Callable[[], int]) -> None:
        """trace: the file that tells `passed_by` every operation that this rank came to, killed or not.

        look: the newest step that can be gone on from.
        """
        self._run_dir, self._rank, self._look = run_dir.resolve(), rank, look
        self._faults = {(fault.step, fault.point.name): fault.how for fault in faults if fault.point.rank == rank}
        self._step, self._full = 0, False
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(disk, name, partial(self._meet, name, getattr(disk, name)))

    def _meet(self, operation: str, original: Callable[..., Any], *given: Any) -> Any:
        """One operation, as often as disk.py asks for one; in the thread of the save."""
        if not given:
            # Nothing was left to remove.
            return original()
        newest = 0
        if operation == "make_folder":
            self._step, newest = _step_of(given[0]), self._look()
        name = " ".join([operation, *self._words(operation, given)])
        os.write(self._trace, (json.dumps([self._step, name, newest]) + "\n").encode())
        how = self._faults.pop((self._step, name), None)
        if how == "ENOSPC" and operation == "write" and not self._full:
            self._full, self._faults[self._step, name] = True, how
            return _half(operation, original, given)
        if how in ERRORS:
            self._full = False
            if operation == "close":
                # The system gives the descriptor back also where it tells of an error.
                original(*given)
            raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))
        if how == "within":
            _half(operation, original, given)
        if how in ("before", "within"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*given)
        if how == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _words(self, operation: str, given: tuple[Any, ...]) -> list[str]:
        """What an operation works on; of two places, `from to to`."""
        if operation == "rename":
            return [self._kind(given[0]), "to", self._kind(given[1])]
        if operation in ("write", "sync", "close"):
            return [self._kind(Path(os.readlink(f"/proc/self/fd/{given[0]}")))]
        return [self._kind(path) for path in given]

    def _kind(self, path: Path) -> str:
        """The name without step and chance, the same for every save."""
        if path == self._run_dir:
            return "RUN"
        return path.name if path.suffix else path.name.split("-")[0]


def _step_of(saving: Path) -> int:
    """Of RUN/checkpoints/.saving-STEP-HEX."""
    return int(saving.name.split("-")[1])


def _half(operation: str, original: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """The first half of an operation that is DIVISIBLE."""
    if operation == "write":
        descriptor, data = given
        return original(descriptor, data[: len(data) // 2])
    files = sorted(given[0].iterdir())
    for file in files[: len(files) // 2]:
        file.unlink()
    return None


def passed_by(rank: int, trace: Path) -> list[Passed]:
    """What a rank came to, in order; nothing where it came to no operation."""
    lines = trace.read_text(encoding="utf-8").splitlines() if trace.exists() else []
    return [Passed(step, Point(rank, name), newest) for step, name, newest in map(json.loads, lines)]
