"""Distributions and most frequent values over any number of rows, in memory that does not grow with them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_EXACT = 4096
_CELLS_PER_OCTAVE = 1024
_OCTAVES = 32
_SHOWN_BINS = 36
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Bin:
    low: float
    high: float
    """Values v with low <= v < high."""
    count: int


class Distribution:
    """Of integers >= 0: exact below 4,096, to 0.07 % above; mean, smallest and largest exact. 300 kB."""

    def __init__(self) -> None:
        self._cells = np.zeros(_EXACT + _CELLS_PER_OCTAVE * _OCTAVES, dtype=np.int64)
        self.count, self.sum = 0, 0
        self.min, self.max = 0, 0

    def add(self, values: npt.NDArray[np.integer]) -> None:
        if not len(values):
            return
        low, high = int(values.min()), int(values.max())
        self.min = min(self.min, low) if self.count else low
        self.max = max(self.max, high)
        self.count, self.sum = self.count + len(values), self.sum + int(values.sum(dtype=np.int64))
        self._cells += np.bincount(_cell(values), minlength=len(self._cells))

    def quantile(self, share: float) -> int:
        """The smallest value that at least this share of all values does not pass; 0 of none."""
        if not self.count:
            return 0
        cell = int(np.searchsorted(np.cumsum(self._cells), max(1, np.ceil(share * self.count))))
        return max(self.min, min(self.max, int(_low_edges()[cell])))

    def bins(self) -> list[Bin]:
        """For a plot: about 36, even or, where values range over more than a decade and a half, even in logarithm.

        The last holds all that is above 99.5 % of the values.
        """
        if not self.count:
            return []
        low, high = self.min, self.quantile(0.995) + 1
        wide = high > 30 * max(1, self.quantile(0.01))
        if wide and low >= 0 and high > 60:
            edges: npt.NDArray[np.float64] = np.unique(
                np.round(np.geomspace(max(1, self.quantile(0.005)), high, _SHOWN_BINS + 1))
            )
            edges[0] = min(edges[0], low)
        else:
            step = max(1, -(-(high - low) // _SHOWN_BINS))
            edges = np.arange(low, high + step, step, dtype=np.float64)
        edges = np.append(edges[:-1], max(edges[-1], self.max + 1))
        held = np.searchsorted(edges, _low_edges(), side="right") - 1
        # A cell that begins below the smallest value holds it.
        counts = np.bincount(np.clip(held, 0, len(edges) - 2), weights=self._cells, minlength=len(edges) - 1)
        return [Bin(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]

    def to_json(self, *, unit: float = 1.0) -> dict[str, Any]:
        """unit: what one is worth, as 0.001 for thousandths."""
        return {
            "count": self.count,
            "mean": round(unit * self.sum / self.count, 4) if self.count else None,
            "min": unit * self.min,
            "max": unit * self.max,
            "quantiles": {f"p{100 * share:g}": round(unit * self.quantile(share), 4) for share in QUANTILES},
            "histogram": [[round(unit * one.low, 4), round(unit * one.high, 4), one.count] for one in self.bins()],
        }


def _cell(values: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    values = np.maximum(values, 0)
    above = np.log2(np.maximum(values, _EXACT) / _EXACT) * _CELLS_PER_OCTAVE
    last = _CELLS_PER_OCTAVE * _OCTAVES - 1
    return np.where(values < _EXACT, values, _EXACT + np.minimum(above.astype(np.int64), last))


def _low_edges() -> npt.NDArray[np.float64]:
    """The smallest value of each cell."""
    above = _EXACT * 2.0 ** (np.arange(_CELLS_PER_OCTAVE * _OCTAVES) / _CELLS_PER_OCTAVE)
    return np.concatenate([np.arange(_EXACT, dtype=np.float64), np.ceil(above - 1e-6)])


class Frequent:
    """The most frequent of any number of texts, holding at most twice `capacity` of them (Misra and Gries, in batches).

    Exact while there are no more; then a count is too small by at most `error`, and every text that came more often
    than that is held.
    """

    def __init__(self, capacity: int, *, longest: int = 200) -> None:
        """longest: characters of a text that are kept; texts that begin alike for so long count as one."""
        self._capacity, self._longest = capacity, longest
        self._counts: Counter[str] = Counter()
        self.error = 0
        self.total = 0

    def add(self, texts: Iterable[str]) -> None:
        cut = [text[: self._longest] for text in texts]
        self.add_counts(Counter(cut))

    def add_counts(self, counts: Counter[str]) -> None:
        self._counts.update(counts)
        self.total += counts.total()
        if len(self._counts) > 2 * self._capacity:
            lowered = heapq.nlargest(self._capacity + 1, self._counts.values())[-1]
            self.error += lowered
            self._counts = Counter({text: n - lowered for text, n in self._counts.items() if n > lowered})

    @property
    def distinct(self) -> int | None:
        """How many different texts came; None where not all could be held."""
        return None if self.error else len(self._counts)

    def largest(self, most: int) -> list[tuple[str, int]]:
        """Ties by the text."""
        return heapq.nsmallest(most, self._counts.items(), key=lambda one: (-one[1], one[0]))

    def to_json(self, most: int) -> dict[str, Any]:
        return {
            "total": self.total,
            "distinct": self.distinct,
            "counts_too_small_by_at_most": self.error,
            "largest": [{"text": text, "count": count} for text, count in self.largest(most)],
        }
