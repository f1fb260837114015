"""What is wrong with a data set, by kind: counted all, the first few by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FEW = 5
"""So many of a kind are named; all are counted."""


@dataclass(frozen=True, slots=True)
class Finding:
    where: str
    """A file, or a file and a key."""
    what: str


@dataclass
class Findings:
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, kind: str, where: str, what: str, *, count: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        named = self.first.setdefault(kind, [])
        if len(named) < FEW:
            named.append(Finding(printable(where), printable(what, most=300)))

    def include(self, other: Findings) -> None:
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            named = self.first.setdefault(kind, [])
            named += other.first[kind][: FEW - len(named)]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __iter__(self) -> Iterator[tuple[str, int, list[Finding]]]:
        return ((kind, self.counts[kind], self.first[kind]) for kind in sorted(self.counts))

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"kind": kind, "count": count, "first": [{"where": one.where, "what": one.what} for one in first]}
            for kind, count, first in self
        ]


def printable(text: str, *, most: int = 120) -> str:
    """Strangers' text for a terminal: at most `most` characters, without any that could move the cursor or colour."""
    safe = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: most + 1])
    return safe if len(text) <= most else safe[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
