"""What a run did about its own numbers (RUN/guard.jsonl), and what went wrong with its ranks (RUN/faults.jsonl).

Both files are read a line at a time, as a crash or another version may have left them; of many lines only counts and
the newest are kept.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from limoe_dist.analysis.summary import date_and_time
from limoe_dist.config.exit_codes import GUARDED
from limoe_dist.data.order import joined

KINDS = {"non_finite": "not finite", "spike": "spike", "collapse": "collapse"}
ACTIONS = {"note": "noted", "skip": "left out", "rollback": "went back", "stop": "stopped"}
FAULTS = {
    "absent": "did not come to the start",
    "hang": "stood still",
    "broken": "died, or lost a connection",
    "failed": "raised an exception",
}
MOST_EVENTS = 50
MOST_FAULTS = 20
MOST_MARKS = 8
"""Of each action: more would be a wall before the curve, and one action must not hide another."""
_LONGEST = 500
"""Characters of a text that are shown: it may be anything."""

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    kind: str
    """Of KINDS."""
    action: str
    """Of ACTIONS."""
    step: int
    """The step that was tried, from 1."""
    when: str
    what: str
    span: tuple[int, int] | None
    """Positions of the data order, the second not included, that the run passes over from then on."""
    to_step: int | None
    """Where it went on after going back."""


@dataclass(frozen=True)
class FaultGroup:
    """The faults of one kind that one host is to blame for."""

    kind: str
    """Of FAULTS."""
    host: str
    """Empty where nobody knows."""
    count: int
    when: str
    """Of the newest, as `what`."""
    what: str


@dataclass(frozen=True)
class Incidents:
    events: tuple[Event, ...] = ()
    """The newest, at most MOST_EVENTS, in the order in which they happened."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many of each kind and action, of all."""
    passed_over: int = 0
    """Pairs that the run reads no more."""
    faults: tuple[FaultGroup, ...] = ()
    """The most frequent first, at most MOST_FAULTS."""
    fault_groups: int = 0
    """Of all."""
    fault_lines: int = 0
    stopped: bool = False
    """Whether the guard ended the last start."""
    problems: tuple[str, ...] = ()
    """Sentences about what could not be read."""

    @property
    def kinds(self) -> list[str]:
        """Those that happened."""
        return [kind for kind in KINDS if any(self.counts[kind, action] for action in ACTIONS)]

    def steps(self, action: str, *, until: float) -> list[int]:
        """Of the newest shown events of that action, those up to this step, each step once; at most MOST_MARKS."""
        found = (event.step for event in reversed(self.events) if event.action == action and event.step <= until)
        return sorted(list(dict.fromkeys(found))[:MOST_MARKS])


def read_incidents(folder: Path) -> Incidents | None:
    """None for a run from before there was a guard: nobody watched, so it is not known whether anything happened."""
    if not _has_guard(folder):
        return None
    problems: list[str] = []
    newest: deque[Event] = deque(maxlen=MOST_EVENTS)
    counts: Counter[tuple[str, str]] = Counter()
    spans: list[tuple[int, int]] = []
    for event in _read(folder / "guard.jsonl", _event, problems):
        newest.append(event)
        counts[event.kind, event.action] += 1
        if event.span is not None:
            spans.append(event.span)
    groups: dict[tuple[str, str], FaultGroup] = {}
    fault_lines = 0
    for fault in _read(folder / "faults.jsonl", _fault, problems):
        fault_lines += 1
        for each in fault:
            before = groups.get((each.kind, each.host))
            count = before.count + 1 if before else 1
            groups[each.kind, each.host] = FaultGroup(each.kind, each.host, count, each.when, each.what)
    return Incidents(
        events=tuple(newest),
        counts=counts,
        passed_over=sum(end - first for first, end in joined(spans)),
        faults=tuple(sorted(groups.values(), key=lambda group: -group.count)[:MOST_FAULTS]),
        fault_groups=len(groups),
        fault_lines=fault_lines,
        stopped=_object(folder / "ended.json").get("status") == GUARDED,
        problems=tuple(problems),
    )


def _has_guard(folder: Path) -> bool:
    there = any((folder / name).exists() for name in ("guard.jsonl", "faults.jsonl"))
    return there or "guard" in _object(folder / "run.json")


def _object(path: Path) -> dict[str, Any]:
    """Empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read(path: Path, parsed: Callable[[dict[str, Any]], T | None], problems: list[str]) -> Iterator[T]:
    """Each line that is one of ours; the others are counted."""
    unreadable = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in filter(str.strip, file):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                found = parsed(line) if isinstance(line, dict) else None
                if found is None:
                    unreadable += 1
                else:
                    yield found
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}.")
    if unreadable:
        lines = "1 line" if unreadable == 1 else f"{unreadable:,} lines"
        problems.append(f"{lines} of {path.name} could not be read and {'is' if unreadable == 1 else 'are'} left out.")


def _event(line: dict[str, Any]) -> Event | None:
    kind, action, step = line.get("kind"), line.get("action"), _whole(line.get("step"))
    if not (isinstance(kind, str) and kind in KINDS and isinstance(action, str) and action in ACTIONS):
        return None
    if step is None:
        return None
    first, end = _whole(line.get("first")), _whole(line.get("end"))
    return Event(
        kind=kind,
        action=action,
        step=step,
        when=_when(line),
        what=_what(line).removeprefix(f"step {step}: "),
        span=(first, end) if first is not None and end is not None and first < end else None,
        to_step=_whole(line.get("to_step")),
    )


def _fault(line: dict[str, Any]) -> list[FaultGroup] | None:
    """One for each host that is to blame."""
    kind, hosts = line.get("kind"), line.get("hosts")
    if not (isinstance(kind, str) and kind in FAULTS and isinstance(hosts, list)):
        return None
    names = {host[:_LONGEST] for host in hosts if isinstance(host, str)} or {""}
    return [FaultGroup(kind, name, 1, _when(line), _what(line)) for name in sorted(names)]


def _whole(value: object) -> int | None:
    # true is an int to Python; steps and positions are far below 2**53, and a float holds them.
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else None


def _when(line: dict[str, Any]) -> str:
    seconds = line.get("time")
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return " ".join(date_and_time(seconds if number else None, "%H:%M:%S")).strip()


def _what(line: dict[str, Any]) -> str:
    text = line.get("text")
    text = text if isinstance(text, str) else ""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
