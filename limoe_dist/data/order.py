"""Which row a position reads: a stateless permutation, so that the whole state of the data order is one integer.

A *position* counts pairs from the first of the run: step s of a run with B pairs reads positions
s * B to (s + 1) * B - 1, whatever the number of ranks. Every epoch holds every row exactly once.
Positions that a run quarantined, after it went back behind a spike, are jumped over: no step reads them.
Needs neither torch nor DALI.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Four rounds of a random function make a strong permutation (Luby and Rackoff); short halves want more.
_ROUNDS = 8


def row_at(positions: Ints, *, rows: int, seed: int, source: int = 0) -> tuple[Ints, Ints]:
    """Epoch and row of each position: (epochs, rows), each (n,) int64.

    positions: (n,) int64, >= 0; in a mixture, samples of the source. rows: of the source, 1 to 2**62. seed: >= 0.
    source: its number in a mixture. Within one epoch the rows are a permutation of 0..rows-1, keyed by
    (seed, source, epoch); source 0 is read as it is without a mixture.
    Raises ValueError for a negative position or seed, and for rows outside 1 to 2**62.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError(f"position {positions.min()} is negative")
    if rows < 1:
        raise ValueError(f"rows={rows}: a source has at least one")
    epochs = positions // rows
    return epochs, permuted(positions - epochs * rows, size=rows, keys=epoch_keys(seed, epochs, source=source))


Ranges = Sequence[tuple[int, int]]
"""Positions (first, end), rising and apart."""


def positions_of(pairs: Ints, quarantined: Ranges) -> Ints:
    """The position of the run's first, second, ... pair: pair p of a run without quarantined ranges is position p.

    pairs: (n,) int64, >= 0. A step that meets a range takes the pairs behind it, and so do all later ones.
    """
    positions = np.array(pairs, dtype=np.int64)
    for first, end in quarantined:
        positions[positions >= first] += end - first
    return positions


def next_position(step: int, *, batch_pairs: int, quarantined: Ranges = ()) -> int:
    """Where `step` begins to read: the whole state of the data order after so many steps."""
    return int(positions_of(np.array([step * batch_pairs]), quarantined)[0])


def rank_positions(step: int, *, batch_pairs: int, rank: int, world: int, quarantined: Ranges = ()) -> Ints:
    """What `rank` of `world` reads in `step`: its contiguous slice of the global batch, (batch_pairs / world,) int64.

    Raises ValueError where world does not divide batch_pairs.
    """
    if batch_pairs % world:
        raise ValueError(f"batch_pairs={batch_pairs} must be a multiple of the number of ranks, {world}")
    local = batch_pairs // world
    first = step * batch_pairs + rank * local
    return positions_of(np.arange(first, first + local), quarantined)


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
    seed_word = mixed(np.full(1, seed, dtype=np.uint64))
    if source:
        seed_word = mixed(mixed(seed_word) ^ np.uint64(source))
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
