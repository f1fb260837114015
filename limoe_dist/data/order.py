"""Which row a position reads: a stateless permutation, so that the whole state of the data order is one integer.

A *position* counts pairs from the first of the run: a step reads the next B of them, whatever the number of ranks, and
so does a run that goes on with another B. Every epoch holds every row exactly once.
Positions that a run quarantined, after it went back behind a spike, are jumped over: no step reads them.

A source of at most `window_rows` rows is permuted as a whole. A larger one is read almost in sequence: its blocks of
neighbouring shards are permuted, and then the rows of each window of that sequence. At any time only the shards of one
window are open, each is needed during one stretch of the epoch, and a batch still holds rows of all shards of a window.
Needs neither torch nor DALI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ORDER_VERSION = 2
"""Changes with any change of the order of rows: a run resumes only in the order that it began with."""

# Four rounds of a random function make a strong permutation (Luby and Rackoff); short halves want more.
_ROUNDS = 8


def row_at(samples: Ints, *, rows: int, seed: int, source: int = 0) -> tuple[Ints, Ints]:
    """Epoch and row of each sample of a source that is permuted as a whole: (epochs, rows), each (n,) int64.

    samples: (n,) int64, >= 0; without a mixture, positions. rows: of the source, 1 to 2**62. seed: >= 0.
    source: its number in a mixture. Within one epoch the rows are a permutation of 0..rows-1, keyed by
    (seed, source, epoch); source 0 is read as it is without a mixture.
    Raises ValueError for a negative sample or seed, and for rows outside 1 to 2**62.
    """
    epochs, places = _epochs(samples, rows)
    return epochs, permuted(places, size=rows, keys=epoch_keys(seed, epochs, source=source))


def _epochs(samples: Ints, rows: int) -> tuple[Ints, Ints]:
    """Epoch, and place in it, of each sample."""
    samples = np.asarray(samples, dtype=np.int64)
    if samples.size and samples.min() < 0:
        raise ValueError(f"position {samples.min()} is negative")
    if rows < 1:
        raise ValueError(f"rows={rows}: a source has at least one")
    epochs = samples // rows
    return epochs, samples - epochs * rows


# What else is drawn from an epoch's key, apart from the permutation of a whole source.
_BLOCKS, _WINDOWS = np.uint64(0xB10C), np.uint64(0x319D)


@dataclass(frozen=True)
class SourceOrder:
    """The rows of one source in the order in which a run reads them."""

    shard_rows: tuple[int, ...]
    """Rows of each shard, each >= 1."""
    seed: int
    source: int = 0
    """Its number in a mixture."""
    window_rows: int = 0
    """Rows that are mixed with one another; 0: all rows of an epoch."""
    block_shards: int = 1
    """Neighbouring shards that stay together when shards are permuted."""

    @cached_property
    def rows(self) -> int:
        return sum(self.shard_rows)

    @property
    def windowed(self) -> bool:
        return 0 < self.window_rows < self.rows

    @property
    def shards_of_a_window(self) -> int:
        """The most shards that one window reads, whatever their order."""
        if not self.windowed:
            return len(self.shard_rows)
        # Worst is a window of the smallest shards, begun and ended in the middle of one.
        whole = int(np.searchsorted(np.cumsum(sorted(self.shard_rows)), self.window_rows - 1))
        return min(whole + 2, len(self.shard_rows))

    def at(self, samples: Ints) -> tuple[Ints, Ints]:
        """Epoch and row of the source's samples, each (n,) int64. Raises ValueError for a negative one."""
        if not self.windowed:
            return row_at(samples, rows=self.rows, seed=self.seed, source=self.source)
        epochs, places = _epochs(samples, self.rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            rows[here] = self._sequence(epoch).rows_at(self._mixed(places[here], epoch))
        return epochs, rows

    def shards_from(self, sample: int, *, windows: int = 2) -> list[int]:
        """The shards that this sample and those after it read, in the order of need, as far as `windows` windows."""
        epoch, place = divmod(sample, self.rows)
        if not self.windowed:
            return list(range(len(self.shard_rows)))
        first = place // self.window_rows * self.window_rows
        found = self._sequence(epoch).shards_between(first, min(first + windows * self.window_rows, self.rows))
        if first + windows * self.window_rows > self.rows:
            found += self._sequence(epoch + 1).shards_between(0, first + windows * self.window_rows - self.rows)
        return list(dict.fromkeys(found))

    def _mixed(self, places: Ints, epoch: int) -> Ints:
        """Where the permutation within its window takes each place of an epoch."""
        windows, inside = np.divmod(places, self.window_rows)
        keys = mixed(mixed(self._key(epoch) ^ _WINDOWS) + windows.astype(np.uint64))
        last = self.rows // self.window_rows
        for short, size in ((windows == last, self.rows % self.window_rows), (windows < last, self.window_rows)):
            here = np.flatnonzero(short)
            if len(here):
                inside[here] = permuted(inside[here], size=size, keys=keys[here])
        return windows * self.window_rows + inside

    def _sequence(self, epoch: int) -> _Sequence:
        return _sequence(self.shard_rows, self.block_shards, int(self._key(epoch)[0]))

    def _key(self, epoch: int) -> Words:
        return epoch_keys(self.seed, np.array([epoch]), source=self.source)


@dataclass(frozen=True)
class _Sequence:
    """The shards of one epoch, one behind the other."""

    shards: Ints
    """Which shard comes first, second, ..."""
    ends: Ints
    """Where each ends, in rows of the sequence."""
    first_rows: Ints
    """The row of the source with which each begins."""

    def rows_at(self, places: Ints) -> Ints:
        slots = np.searchsorted(self.ends, places, side="right")
        starts = np.where(slots > 0, self.ends[slots - 1], 0)
        return self.first_rows[slots] + places - starts

    def shards_between(self, first: int, end: int) -> list[int]:
        slots = np.searchsorted(self.ends, [first, end - 1], side="right")
        return [int(shard) for shard in self.shards[slots[0] : slots[1] + 1]]


# An epoch's sequence is asked for at every batch; of many sources, the epochs that are read now.
@lru_cache(maxsize=64)
def _sequence(shard_rows: tuple[int, ...], block_shards: int, key: int) -> _Sequence:
    blocks = -(-len(shard_rows) // block_shards)
    keys = np.full(blocks, key, dtype=np.uint64) ^ _BLOCKS
    order = permuted(np.arange(blocks), size=blocks, keys=mixed(keys))
    shards = (order[:, None] * block_shards + np.arange(block_shards)).ravel()
    shards = shards[shards < len(shard_rows)]
    lengths = np.array(shard_rows, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return _Sequence(shards=shards, ends=np.cumsum(lengths[shards]), first_rows=starts[shards])


Ranges = Sequence[tuple[int, int]]
"""Positions (first, end), rising and apart."""


def joined(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    """The positions that lie in any of the ranges, as ranges that rise and are apart; the given ones may overlap."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return tuple(found)


def positions_of(pairs: Ints, quarantined: Ranges) -> Ints:
    """The position of the run's first, second, ... pair: pair p of a run without quarantined ranges is position p.

    pairs: (n,) int64, >= 0. A step that meets a range takes the pairs behind it, and so do all later ones.
    """
    positions = np.array(pairs, dtype=np.int64)
    for first, end in quarantined:
        positions[positions >= first] += end - first
    return positions


def position_of(pair: int, quarantined: Ranges = ()) -> int:
    """The position at which a run reads on that has read so many pairs: the whole state of the data order."""
    return int(positions_of(np.array([pair]), quarantined)[0])


def pairs_before(position: int, quarantined: Ranges = ()) -> int:
    """How many pairs a run has read that reads on at this position: the inverse of `position_of`.

    Raises ValueError for a position inside a quarantined range.
    """
    if inside := [span for span in quarantined if span[0] <= position < span[1]]:
        raise ValueError(f"position {position} is inside the quarantined range {inside[0]}")
    return position - sum(end - first for first, end in quarantined if end <= position)


def rank_positions(first_pair: int, *, batch_pairs: int, rank: int, world: int, quarantined: Ranges = ()) -> Ints:
    """What `rank` of `world` reads in the step that begins with the run's pair `first_pair`.

    Its contiguous slice of the global batch, (batch_pairs / world,) int64.
    Raises ValueError where world does not divide batch_pairs.
    """
    if batch_pairs % world:
        raise ValueError(f"batch_pairs={batch_pairs} must be a multiple of the number of ranks, {world}")
    local = batch_pairs // world
    first = first_pair + rank * local
    return positions_of(np.arange(first, first + local), quarantined)


def rows_checksum(positions: Ints, rows: Ints) -> int:
    """A number of which position read which row, 0 to 2**64 - 1: of parts, the sum modulo 2**64.

    Ranks add up what they have read; whoever works out what they should have read finds the same number.
    """
    words = mixed(mixed(positions.astype(np.uint64)) ^ rows.astype(np.uint64))
    return int(words.sum(dtype=np.uint64))


def permuted(index: Ints, *, size: int, keys: Words) -> Ints:
    """Where a keyed bijection of 0..size-1 takes each index; `keys` (one word an index) chooses the bijection.

    A Feistel network permutes the next power of four; what falls outside 0..size-1 is permuted again until it
    falls inside (cycle walking), which keeps the map a bijection. Raises ValueError where size is not in 1 to 2**62.
    """
    if not 1 <= size <= 1 << 62:
        raise ValueError(f"a permutation of {size} rows: the size must be in 1 to 2**62")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    # The key is mixed with the round before a half is added: else equal halves of two rounds would cancel.
    round_keys = mixed(keys + np.arange(_ROUNDS, dtype=np.uint64)[:, None])
    word = _feistel(index.astype(np.uint64), round_keys, half_bits)
    while len(outside := np.flatnonzero(word >= np.uint64(size))):
        word[outside] = _feistel(word[outside], round_keys[:, outside], half_bits)
    return word.astype(np.int64)


def epoch_keys(seed: int, epochs: Ints, *, source: int = 0) -> Words:
    """One key word for each (seed, source, epoch). Raises ValueError for a seed outside 0 to 2**64 - 1."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed}: must be in 0 to 2**64 - 1")
    # Source 0 is mixed in too: mixed(seed) ^ mixed(epoch + 1) would be the same for seed and epoch exchanged.
    seed_word = mixed(mixed(mixed(np.full(1, seed, dtype=np.uint64))) ^ np.uint64(source))
    return mixed(seed_word ^ mixed(epochs.astype(np.uint64) + np.uint64(1)))


def mixed(word: Words) -> Words:
    """SplitMix64's output function (Steele, Lea and Flood, 2014): a bijection that flips about half the bits."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _feistel(word: Words, round_keys: Words, half_bits: int) -> Words:
    """Permutes words of 2 * half_bits bits; words: (n,), round_keys: (rounds, n)."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = word >> shift, word & mask
    for round_key in round_keys:
        left, right = right, left ^ (mixed(right + round_key) & mask)
    return (left << shift) | right
