"""Which of many 64-bit hashes stay, where each that is near one that stays is dropped? In bounded memory, in numpy.

Letters: U hashes in order of preference, K of them kept, N that are compared with those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.dedup.bands import pairs_between, pairs_within

MAX_PAIRS = 8_000_000
"""More near pairs than this are not held (64 MB): the hashes are halved, and what the first half keeps thins the
second."""
NONE = -1
_PAIRS_AT_A_TIME = 1 << 20
_LOWER = (1 << 32) - 1


@dataclass(frozen=True)
class Nearest:
    first: Any
    """int64: the first kept hash within the radius, as an index; -1 where there is none."""
    bits: Any
    """uint8: how many bits differ from that one; 0 where there is none."""


def keep_greedily(hashes_U: Any, radius: int) -> Nearest:
    """Goes through the hashes in order, and drops each that is within `radius` bits of one that it has KEPT.

    hashes_U: (U,) uint64, all different, the preferred first. Chains do not pull: of A~B~C with A and C far apart only
    B is dropped, for A. Returns (U,) each; `first` is -1 for what is kept.
    """
    first = _greedy(hashes_U, radius)
    return Nearest(first, _bits(hashes_U, hashes_U, first))


def first_within(kept_K: Any, hashes_N: Any, radius: int) -> Nearest:
    """For each of hashes_N the first of kept_K that is within `radius` bits; both uint64, returns (N,) each."""
    first = np.full(len(hashes_N), len(kept_K), dtype=np.int64)

    def found(k: Any, n: Any) -> None:
        np.minimum.at(first, n, k)

    pairs_between(kept_K, hashes_N, radius, found)
    first[first == len(kept_K)] = NONE
    return Nearest(first, _bits(kept_K, hashes_N, first))


def _bits(kept_K: Any, hashes_N: Any, first: Any) -> Any:
    bits = np.zeros(len(hashes_N), dtype=np.uint8)
    near = np.flatnonzero(first >= 0)
    bits[near] = np.bitwise_count(kept_K[first[near]] ^ hashes_N[near])
    return bits


def _greedy(hashes_U: Any, radius: int) -> Any:
    if radius == 0 or len(hashes_U) < 2:
        return np.full(len(hashes_U), NONE, dtype=np.int64)  # all are different
    pairs = _Pairs()
    try:
        pairs_within(hashes_U, radius, pairs.add)
    except _TooMany:
        del pairs
        return _in_halves(hashes_U, radius)
    return _resolve(pairs.sorted(), len(hashes_U))


def _in_halves(hashes_U: Any, radius: int) -> Any:
    """As _greedy: what the preferred half keeps is all that the other half must be compared with, besides itself."""
    middle = len(hashes_U) // 2
    left = _greedy(hashes_U[:middle], radius)
    kept = np.flatnonzero(left == NONE)
    near = first_within(hashes_U[kept], hashes_U[middle:], radius).first
    right = np.where(near >= 0, kept[near], NONE)
    rest = np.flatnonzero(near == NONE)
    among = _greedy(hashes_U[middle:][rest], radius)
    dropped = among >= 0
    right[rest[dropped]] = middle + rest[among[dropped]]
    return np.concatenate([left, right])


def _resolve(pairs: Any, hashes: int) -> Any:
    """Pairs (later << 32 | earlier), sorted: when one's turn comes, all that is before it has been decided."""
    first, kept = np.full(hashes, NONE, dtype=np.int64), bytearray(b"\1") * hashes
    for start in range(0, len(pairs), _PAIRS_AT_A_TIME):
        decisive = []
        for pair in pairs[start : start + _PAIRS_AT_A_TIME].tolist():
            later = pair >> 32
            if kept[later] and kept[pair & _LOWER]:
                kept[later] = 0
                decisive.append(pair)
        chosen = np.array(decisive, dtype=np.int64)
        first[chosen >> 32] = chosen & _LOWER
    return first


class _TooMany(Exception):
    pass


class _Pairs:
    """Near pairs, each once. `add` raises _TooMany above MAX_PAIRS."""

    def __init__(self) -> None:
        self._count, self._parts = 0, [np.empty(0, dtype=np.int64)]

    def add(self, one: Any, other: Any) -> None:
        self._count += len(one)
        if self._count > MAX_PAIRS:
            raise _TooMany
        self._parts.append(np.maximum(one, other) << 32 | np.minimum(one, other))

    def sorted(self) -> Any:
        pairs = np.concatenate(self._parts)
        self._parts = []
        pairs.sort()
        return pairs
