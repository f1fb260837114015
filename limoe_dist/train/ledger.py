"""RUN/guard.jsonl: what a run did about its own numbers, a line an event, and the data that it passed over for good."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from limoe_dist.config.errors import warn
from limoe_dist.data.order import Ranges, joined

NAME = "guard.jsonl"
MOST = 1 << 62
"""No run reads so many positions: a line with more is not ours."""
Kind = Literal["non_finite", "spike", "collapse"]
Action = Literal["note", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class Event:
    kind: Kind
    action: Action
    step: int
    """The step that was tried, from 1; after a skip or a rollback there is another of this number."""
    text: str
    """For people."""
    loss: float | None = None
    """Of the batch; None where it is not finite, or where the event is none of a batch."""
    grad_norm: float | None = None
    z: float | None = None
    first: int | None = None
    """Positions first to end - 1 of the data order are passed over from now on; None: none are."""
    end: int | None = None
    to_step: int | None = None
    """Where a rollback goes on."""
    time: float = field(default_factory=time.time)

    def passing(self, first: int, end: int) -> Event:
        """The event with the positions that are passed over for it."""
        return replace(self, first=first, end=end) if first < end else self

    def told(self, more: str, *, action: Action | None = None, to_step: int | None = None) -> Event:
        """The event with what became of it."""
        return replace(self, text=f"{self.text}; {more}", action=action or self.action, to_step=to_step)

    def line(self) -> str:
        content = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(content) + "\n"


def finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def append(run_dir: Path, event: Event) -> None:
    """A whole line, on the disk before training goes on: a replay has to pass over the same data."""
    path = run_dir / NAME
    try:
        with path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            cut = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * cut + event.line().encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        warn(f"{path}: the event of step {event.step} cannot be written: {error.strerror}; it was: {event.text}")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The events, oldest first; what a crash cut off is left out. None where there is no ledger."""
    try:
        lines = (run_dir / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            found.append(event)
    return found


def passed_over(run_dir: Path, *, position: int) -> tuple[tuple[int, int], ...]:
    """The ranges that the ledger tells of from `position` on: those that a checkpoint there does not know yet."""
    ranges = [(event.get("first"), event.get("end")) for event in read(run_dir)]
    known: Ranges = [(a, b) for a, b in ranges if type(a) is int and type(b) is int and position <= a < b <= MOST]
    return joined(known)
