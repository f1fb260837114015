"""What went wrong with ranks and hosts, where no setting is to blame: starting again, perhaps elsewhere, may help."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from limoe_dist.config.errors import UserError
from limoe_dist.config.exit_codes import FAILED

NOTE_S = 3.0
"""So long may a note of a fault take: a disk that hangs does not keep a rank from ending."""
LINE = 300

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    kind: Literal["absent", "hang", "broken", "failed"]
    """Did not come to the start; stands still; died or lost a connection; raised an exception."""
    ranks: tuple[int, ...]
    """Those that did it; empty where nobody knows."""
    hosts: tuple[str, ...]
    """To blame; empty where nobody knows."""
    text: str


class FaultError(UserError):
    """A fault that a command ends with as one line: its exit status says that starting again may help."""

    def __init__(self, fault: Fault, *, told_by: int | None = None) -> None:
        super().__init__(fault.text, told_by=told_by, status=FAILED)
        self.fault = fault


DISK = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE)
"""Of an OSError that is no other host's: a disk, or this host's mount of one. Not ENOSPC or EDQUOT: a full disk is
often everybody's, or has a limit for the user."""
PROGRAM = ("device-side assert", "illegal memory access", "out of memory", "invalid argument")
"""Errors of CUDA that a program makes, on whatever host it runs."""

OnFault = Callable[[Fault], None]


def blamed(ranks: Iterable[int], hosts: Sequence[str] | Mapping[int, str]) -> tuple[str, ...]:
    """The hosts of these ranks, sorted; none where they are most of several hosts, or are not all known.

    hosts: of all ranks. Where most hosts are silent the one that asks is as likely to be cut off as they are.
    """
    known = dict(hosts) if isinstance(hosts, Mapping) else dict(enumerate(hosts))
    found = {known.get(rank, "") for rank in ranks}
    everywhere = set(known.values()) - {""}
    if "" in found or (len(everywhere) > 1 and len(found) > len(everywhere) / 2):
        return ()
    return tuple(sorted(found))


def of_the_host(error: BaseException) -> bool:
    """Whether the error speaks of the host rather than of the program, which would fail elsewhere too.

    So do an OSError of DISK, MemoryError, and CUDA's errors but those of PROGRAM.
    """
    if isinstance(error, OSError):
        return error.errno in DISK
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "CUDA error" in text and not any(word in text for word in PROGRAM)
    )


def note(on_fault: OnFault | None, fault: Fault) -> None:
    """Hands the fault over; neither an error there nor a disk that hangs is of this rank's concern."""
    if on_fault is not None:
        within(NOTE_S, lambda: on_fault(fault))


def describe(error: BaseException) -> str:
    """`KeyError: 'planted'`, the first line of it, as long as a line may be."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:LINE]


def within(seconds: float, work: Callable[[], T]) -> T | None:
    """What `work` gives, or None where it takes longer or fails: it is for a last word only."""
    found: list[T] = []

    def run() -> None:
        with suppress(Exception):
            found.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
