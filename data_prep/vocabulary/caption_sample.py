"""A uniform sample of any number of captions, in bounded memory, that depends on the seed and their order alone."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator

import numpy as np

_OBJECT_BYTES = 64
"""What Python keeps beside the text of each caption."""


class CaptionSample:
    """Every caption draws a number; those with the smallest stay, as many as both limits allow.

    Below the limits that is all of them. What does not stay goes to `left_out`, once, in no certain order.
    """

    def __init__(
        self, *, captions: int, size_bytes: int, seed: int, left_out: Callable[[str], None] = lambda text: None
    ) -> None:
        """size_bytes: of the captions, each counted with 64 more. A quarter more than both is held on the way."""
        self._most, self._bytes, self._left_out = captions, size_bytes, left_out
        self._draw = random.Random(seed).random
        self._texts: list[bytes] = []
        self._draws = array("d")
        self._held_bytes = 0
        self._least_refused = 1.0
        self.seen = 0

    def add(self, text: str) -> None:
        self.seen += 1
        drawn = self._draw()
        if drawn >= self._least_refused:
            self._left_out(text)
            return
        encoded = text.encode()
        self._texts.append(encoded)
        self._draws.append(drawn)
        self._held_bytes += len(encoded) + _OBJECT_BYTES
        if len(self._texts) > 1.25 * self._most or self._held_bytes > 1.25 * self._bytes:
            self._prune()

    def __len__(self) -> int:
        self._prune()
        return len(self._texts)

    def __iter__(self) -> Iterator[str]:
        """In the order in which they came."""
        self._prune()
        return (text.decode() for text in self._texts)

    def _prune(self) -> None:
        if len(self._texts) <= self._most and self._held_bytes <= self._bytes:
            return
        draws = np.frombuffer(self._draws)
        order = np.argsort(draws, kind="stable")
        sizes = np.array([len(text) for text in self._texts], dtype=np.int64)[order] + _OBJECT_BYTES
        kept = min(self._most, int(np.searchsorted(np.cumsum(sizes), self._bytes, side="right")))
        self._least_refused = float(draws[order[kept]])
        stays = np.zeros(len(order), dtype=bool)
        stays[order[:kept]] = True
        for index in np.flatnonzero(~stays):
            self._left_out(self._texts[index].decode())
        self._texts = [self._texts[index] for index in np.flatnonzero(stays)]
        self._draws = array("d", draws[stays].tobytes())
        self._held_bytes = int(sizes[:kept].sum())
