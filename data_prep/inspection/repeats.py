"""Which of many millions of 128-bit values come more than once, in bounded memory.

24 bytes a value; what passes `limit_bytes` goes to 64 files in the temporary folder by the value's first bits, and is
searched a file at a time. Peak memory: the limit, and four times a 64th of the values.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from limoe_dist.config.errors import UserError

LIMIT_BYTES = 32 << 20
_BUCKET_BITS = 6
_RECORD = np.dtype([("high", ">u8"), ("low", ">u8"), ("row", "<u8")])
_FEW_ROWS = 3


@dataclass(frozen=True)
class Repeated:
    count: int
    """Rows that have this value, 2 or more."""
    rows: tuple[int, ...]
    """The first of them."""


@dataclass(frozen=True)
class Summary:
    values: int
    distinct: int
    groups: int
    """Values that come more than once."""
    largest: tuple[Repeated, ...]
    """Most rows first, then the smallest row."""

    @property
    def surplus(self) -> int:
        """Rows that would go if each value stayed once."""
        return self.values - self.distinct


class Repeats:
    """Takes values with their rows in any portions; `summary` once, at the end."""

    def __init__(self, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self._held: list[npt.NDArray[np.void]] = []
        self._held_bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def add(self, values: bytes, rows: npt.NDArray[np.integer]) -> None:
        """values: 16 bytes for each of `rows`, numbers >= 0 by which the caller finds it again."""
        records = np.empty(len(rows), dtype=_RECORD)
        halves = np.frombuffer(values, dtype=">u8").reshape(len(rows), 2)
        records["high"], records["low"], records["row"] = halves[:, 0], halves[:, 1], rows
        self._held.append(records)
        self._held_bytes += records.nbytes
        if self._held_bytes > self._limit:
            self._spill()

    def summary(self, most: int = 20) -> Summary:
        """most: groups that are named."""
        values = distinct = groups = 0
        largest: list[Repeated] = []
        for bucket in self._buckets():
            order = np.lexsort((bucket["row"], bucket["low"], bucket["high"]))
            found = bucket[order]
            starts = np.flatnonzero(
                np.concatenate(
                    [[True], (found["high"][1:] != found["high"][:-1]) | (found["low"][1:] != found["low"][:-1])]
                )
            )
            counts = np.diff(np.append(starts, len(found)))
            values, distinct, groups = values + len(found), distinct + len(starts), groups + int((counts > 1).sum())
            several = np.flatnonzero(counts > 1)
            # Only as many as could be among the largest; ties by the first row.
            first = found["row"][starts[several]].astype(np.int64)
            for index in several[np.lexsort((first, -counts[several]))[:most]]:
                start, count = int(starts[index]), int(counts[index])
                rows = found["row"][start : start + min(count, _FEW_ROWS)]
                largest.append(Repeated(count, tuple(int(row) for row in rows)))
            largest = heapq.nsmallest(most, largest, key=lambda one: (-one.count, one.rows))
        if self._folder is not None:
            self._folder.cleanup()
        return Summary(values, distinct, groups, tuple(largest))

    def _spill(self) -> None:
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="limoe-repeats-")
            for number, part in enumerate(_by_bucket(np.concatenate(self._held))):
                with (Path(self._folder.name) / f"{number:02d}").open("ab") as file:
                    file.write(part.tobytes())
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: cannot hold the hashes of the rows, 24 bytes each ({error.strerror}): "
                "set TMPDIR to a larger disk"
            ) from None
        self._held, self._held_bytes = [], 0

    def _buckets(self) -> Iterator[npt.NDArray[np.void]]:
        if self._folder is None:
            if self._held:
                yield np.concatenate(self._held)
            return
        self._spill() if self._held else None
        for number in range(1 << _BUCKET_BITS):
            bucket = np.fromfile(Path(self._folder.name) / f"{number:02d}", dtype=_RECORD)
            if len(bucket):
                yield bucket


def _by_bucket(records: npt.NDArray[np.void]) -> list[npt.NDArray[np.void]]:
    number = (records["high"] >> np.uint64(64 - _BUCKET_BITS)).astype(np.uint8)
    order = np.argsort(number, kind="stable")
    ends = np.cumsum(np.bincount(number, minlength=1 << _BUCKET_BITS))
    return np.split(records[order], ends[:-1])
