"""All pairs of 64-bit hashes within a Hamming radius: none is missed, and hardly any other is looked at.

Where two hashes differ in at most r bits, and their bits are cut into n bands, at most r bands differ: n - r are equal.
So for every choice of n - r bands the hashes are sorted by those bands, and only neighbours that are equal in them are
compared (multi-index hashing). The cut is chosen by what it costs for so many hashes.

Letters: U hashes that are paired among themselves; K and N hashes of two sides that are paired with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from typing import Any

import numpy as np

HASH_BITS = 64
INDEX_BITS = 32
"""A sort key is 64 bits: the bands' bits above, the place below; so one sort of plain numbers gives both."""
DIRECT = 2048
"""Where more hashes than this are equal in the bands, they are cut again by their other bits: comparing each with each
would take the square of them."""
MOST_CUTS = 2
"""So often is it cut again. What then still meets is a crowd of hashes that differ in a few bits, which no cut parts:
each further one would only multiply the choices."""
CHUNK = 1 << 20
"""About so many hashes are compared at a time."""
# Nanoseconds of one core, for the choice of bands: about right is enough.
_SORT_NS, _COMPARE_NS, _LOOP_NS = 60, 6, 5_000

Found = Callable[[Any, Any], None]
"""Takes two int64 arrays of one length: the places of pairs."""
ALL = tuple(range(HASH_BITS))


def pairs_within(hashes_U: Any, radius: int, found: Found) -> None:
    """Calls found(i, j) with all pairs of hashes_U, each once, that differ in at most `radius` bits.

    hashes_U: (U,) uint64, all different, fewer than 2^32: so the equal bands of any depth grow no longer than their
    other bits allow.
    """
    _within(hashes_U, radius, ALL, found)


def pairs_between(hashes_K: Any, hashes_N: Any, radius: int, found: Found) -> None:
    """Calls found(k, n) with all pairs of hashes_K and hashes_N, each once, that differ in at most `radius` bits.

    Both uint64; within each side all are different.
    """
    _between(hashes_K, hashes_N, radius, ALL, found)


@dataclass(frozen=True)
class Bands:
    """Bit places cut into bands, and how many of them are sorted by at a time."""

    bands: tuple[tuple[int, ...], ...]
    at_a_time: int

    def choices(self) -> Iterator[tuple[int, ...]]:
        return combinations(range(len(self.bands)), self.at_a_time)

    def places(self, choice: Sequence[int]) -> list[int]:
        return [place for band in choice for place in self.bands[band]]

    def first_met(self, differing: Any, choice: Sequence[int]) -> Any:
        """bool: is this the first choice whose bands are equal in such a pair? It meets in several, and counts once.

        The first equal bands are the first choice: no band before the last of `choice` is equal that is not in it.
        """
        is_first = np.ones(len(differing), dtype=bool)
        for band in range(choice[-1]):
            if band not in choice:
                is_first &= (differing & np.uint64(sum(1 << place for place in self.bands[band]))) != 0
        return is_first


def cut(places: Sequence[int], radius: int, hashes: int, each_with_each: int) -> Bands | None:
    """The cheapest cut of these bit places; None where it is cheaper to compare each with each.

    each_with_each: how many comparisons that would be.
    """
    cheapest, least_ns = None, float(each_with_each * _COMPARE_NS)
    for count in range(max(2, radius + 1), min(len(places), radius + 5) + 1):
        at_a_time = min(count - radius, count - 1)
        edges = [band * len(places) // count for band in range(count + 1)]
        bands = tuple(tuple(places[a:b]) for a, b in pairwise(edges))
        if sum(sorted(map(len, bands))[-at_a_time:]) > HASH_BITS - INDEX_BITS:
            continue
        meetings = each_with_each / 2 ** (at_a_time * len(places) / count)
        cost_ns = comb(count, at_a_time) * (hashes * _SORT_NS + meetings * _COMPARE_NS + 20 * _LOOP_NS)
        if cost_ns < least_ns:
            cheapest, least_ns = Bands(bands, at_a_time), cost_ns
    return cheapest


def _within(hashes_U: Any, radius: int, places: Sequence[int], found: Found, cuts: int = 0) -> None:
    bands = cut(places, radius, len(hashes_U), len(hashes_U) ** 2 // 2) if cuts <= MOST_CUTS else None
    if bands is None:
        _each_with_later(hashes_U, radius, found)
        return
    for choice in bands.choices():
        chosen = bands.places(choice)
        once = _once(bands, choice, hashes_U, hashes_U, found)
        keys, order = _sorted(hashes_U, chosen)
        starts, sizes = _runs_of_equal(keys)
        del keys
        for start, size in zip(starts[sizes > DIRECT].tolist(), sizes[sizes > DIRECT].tolist(), strict=True):
            members = order[start : start + size]
            others = [place for place in places if place not in chosen]
            _within(hashes_U[members], radius, others, _renamed(members, members, once), cuts + 1)
        starts, sizes = starts[sizes <= DIRECT], sizes[sizes <= DIRECT]
        sorted_U, named = hashes_U[order], _renamed(order, order, once)
        for part in _parts(sizes):
            ends = np.repeat(starts[part] + sizes[part], sizes[part])
            left = ends - _countdown(sizes[part])
            inside = left + 1 < ends
            _compare(sorted_U, sorted_U, left[inside], left[inside] + 1, ends[inside], radius, named)
        del sorted_U, order, named, starts, sizes  # before the next sort: at ten million hashes they are 150 MB


def _between(hashes_K: Any, hashes_N: Any, radius: int, places: Sequence[int], found: Found, cuts: int = 0) -> None:
    bands = None
    if cuts <= MOST_CUTS:
        bands = cut(places, radius, len(hashes_K) + len(hashes_N), len(hashes_K) * len(hashes_N))
    if bands is None:
        _each_with_each(hashes_K, hashes_N, radius, found)
        return
    for choice in bands.choices():
        chosen = bands.places(choice)
        once = _once(bands, choice, hashes_K, hashes_N, found)
        keys_K, order_K = _sorted(hashes_K, chosen)
        all_keys_N, all_order_N = _sorted(hashes_N, chosen)
        sorted_K = hashes_K[order_K]
        for chunk in range(0, len(hashes_N), CHUNK):
            keys_N, order_N = all_keys_N[chunk : chunk + CHUNK], all_order_N[chunk : chunk + CHUNK]
            starts = np.searchsorted(keys_K, keys_N)
            ends = np.searchsorted(keys_K, keys_N, side="right")
            hot = np.zeros(len(keys_N), dtype=bool)
            first, sizes = _runs_of_equal(keys_N)
            busy = sizes * (ends - starts)[first] > DIRECT * DIRECT
            for one, size in zip(first[busy].tolist(), sizes[busy].tolist(), strict=True):
                hot[one : one + size] = True
                ks, ns = order_K[starts[one] : ends[one]], order_N[one : one + size]
                others = [place for place in places if place not in chosen]
                _between(hashes_K[ks], hashes_N[ns], radius, others, _renamed(ks, ns, once), cuts + 1)
            met = np.flatnonzero((starts < ends) & ~hot)
            named = _renamed(order_N, order_K, _swapped(once))
            _compare(hashes_N[order_N], sorted_K, met, starts[met], ends[met], radius, named)


def _sorted(hashes: Any, places: Sequence[int]) -> tuple[Any, Any]:
    """(their bits at these places in rising order, the place of each in `hashes`), both uint32."""
    packed = np.arange(len(hashes), dtype=np.uint64)
    done = INDEX_BITS
    for first, count in _neighbours(places):
        for chunk in range(0, len(hashes), CHUNK):
            part = slice(chunk, chunk + CHUNK)
            bits = (hashes[part] >> np.uint64(first)) & np.uint64((1 << count) - 1)
            packed[part] |= bits << np.uint64(done)
        done += count
    packed.sort()
    order = packed.astype(np.uint32)  # the lower half
    packed >>= np.uint64(INDEX_BITS)
    return packed.astype(np.uint32), order


def _neighbours(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of places that follow each other."""
    first, count = places[0], 0
    for place in places:
        if place != first + count:
            yield first, count
            first, count = place, 0
        count += 1
    yield first, count


def _runs_of_equal(keys: Any) -> tuple[Any, Any]:
    """(where it starts, how long it is) of every run of at least two equal keys, int64."""
    if len(keys) < 2:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    same = keys[1:] == keys[:-1]
    starts = np.flatnonzero(same & ~np.concatenate([[False], same[:-1]]))
    ends = np.flatnonzero(same & ~np.concatenate([same[1:], [False]])) + 2
    return starts, ends - starts


def _parts(sizes: Any) -> Iterator[slice]:
    """Neighbouring runs with about CHUNK hashes together."""
    total = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = total[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(total, before + CHUNK)))
        yield slice(first, last)
        first = last


def _countdown(sizes: Any) -> Any:
    """For each run of a size: size, size - 1, ..., 1."""
    return np.repeat(np.cumsum(sizes), sizes) - np.arange(int(sizes.sum()))


def _compare(left: Any, right: Any, places: Any, starts: Any, ends: Any, radius: int, found: Found) -> None:
    """Compares left[places] with right from starts up to ends, all by one step at a time."""
    one, other = places, starts
    while len(one):
        near = np.flatnonzero(np.bitwise_count(left[one] ^ right[other]) <= radius)
        if len(near):
            found(one[near], other[near])
        other = other + 1
        going = other < ends
        one, other, ends = one[going], other[going], ends[going]


def _each_with_later(hashes: Any, radius: int, found: Found) -> None:
    for start in range(len(hashes) - 1):
        near = np.flatnonzero(np.bitwise_count(hashes[start + 1 :] ^ hashes[start]) <= radius)
        if len(near):
            found(np.full(len(near), start), start + 1 + near)


def _each_with_each(left: Any, right: Any, radius: int, found: Found) -> None:
    """The shorter side is gone through one by one, the other at once."""
    if len(right) < len(left):
        _each_with_each(right, left, radius, _swapped(found))
        return
    for one in range(len(left)):
        near = np.flatnonzero(np.bitwise_count(right ^ left[one]) <= radius)
        if len(near):
            found(np.full(len(near), one), near)


def _once(bands: Bands, choice: Sequence[int], left: Any, right: Any, found: Found) -> Found:
    def passed_on(one: Any, other: Any) -> None:
        first = bands.first_met(left[one] ^ right[other], choice)
        if first.any():
            found(one[first], other[first])

    return passed_on


def _renamed(left: Any, right: Any, found: Found) -> Found:
    """What is found by its place in a part is passed on by its place in the whole."""
    return lambda one, other: found(left[one].astype(np.int64), right[other].astype(np.int64))


def _swapped(found: Found) -> Found:
    return lambda one, other: found(other, one)
