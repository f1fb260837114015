"""What a run has logged, read back: a column for each figure of metrics.jsonl, and the evaluations as they are.

A column is called as in the file, with dots for what lies within, and places in lists from 0: "contrastive",
"blocks.3.success_image", "blocks.3.kept.7.1" (text tokens that expert 7 of block 3 kept).
Shapes: n lines.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from limoe_dist.config.errors import UserError

Column = npt.NDArray[np.float64]


@dataclass(frozen=True)
class History:
    steps: Column
    """(n,) rising."""
    columns: dict[str, Column]
    """(n,) each; NaN where a line has no number of that name."""
    last: dict[str, Any]
    """The last line, whole."""
    unreadable: int
    """Lines that were passed over: cut off by a crash, or none of ours."""

    def column(self, name: str) -> Column:
        """(n,) all NaN for a name that no line has."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    def latest(self, name: str) -> float | None:
        """The last line's number of that name; None where it has none. It may be infinite or NaN."""
        value: Any = self.last
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return float(value) if _is_number(value) else None

    @property
    def blocks(self) -> tuple[int, ...]:
        """The MoE blocks that the run tells of; none for a dense model."""
        blocks = self.last.get("blocks")
        return tuple(sorted(int(name) for name in blocks if name.isdecimal())) if isinstance(blocks, dict) else ()


def read_metrics(path: Path) -> History:
    """Raises UserError where the file cannot be read or holds no line of metrics."""
    columns: dict[str, array[float]] = {}
    steps: array[float] = array("d")
    last: dict[str, Any] = {}
    unreadable = 0
    for line in _lines(path):
        if line is None:
            unreadable += 1
            continue
        # A step that was done again after a crash: what was logged last holds.
        while steps and steps[-1] >= line["step"]:
            steps.pop()
        for name, value in _numbers(line):
            column = columns.setdefault(name, array("d"))
            del column[len(steps) :]
            column.extend([math.nan] * (len(steps) - len(column)))
            column.append(value)
        steps.append(line["step"])
        last = line
    if not steps:
        raise UserError(
            f"{path}: no line of metrics yet: the run has not come to its first log.every_steps; try again later"
        )
    return History(
        steps=np.array(steps),
        columns={name: _filled(column, len(steps)) for name, column in columns.items()},
        last=last,
        unreadable=unreadable,
    )


def read_evaluations(path: Path) -> History | None:
    """As `read_metrics`; None where there is no such file, or no line in it."""
    try:
        return read_metrics(path) if path.exists() else None
    except UserError:
        return None


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line that has a step, as an object; None for any other that is not blank."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                if text.strip():
                    yield _parsed(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}: the run has not logged anything yet") from None


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    # true is an int to Python.
    return line if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 53 else None


def _numbers(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, list):
            value = {str(place): item for place, item in enumerate(value)}
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif _is_number(value):
            yield prefix + name, float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _filled(column: array[float], length: int) -> Column:
    found = np.full(length, np.nan)
    found[: min(len(column), length)] = column[:length]
    return found
