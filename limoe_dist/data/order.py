"""Which row a position reads: a stateless permutation, so that the whole state of the data order is one integer.

A *position* counts pairs from the first of the run: step s of a run with B pairs reads positions s * B to (s + 1) * B - 1, whatever
the number of ranks. Every epoch holds every row exactly once. Needs neither torch nor DALI.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Four rounds of a random function make a strong permutation (Luby and Rackoff); a small domain has short halves, hence more.
_ROUNDS = 8


def row_at(positions: Ints, *, rows: int, seed: int) -> tuple[Ints, Ints]:
    """Epoch and row of each position: (epochs, rows), int64, of the shape of `positions`.

    positions: int64, >= 0. rows: of the source, 1 to 2**62. seed: >= 0.
    Within one epoch the rows are a permutation of 0..rows-1, keyed by (seed, epoch).
    Raises ValueError for a negative position or seed, and for rows outside 1 to 2**62.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError(f"position {positions.min()} is negative")
    epochs = positions // rows if rows > 0 else positions
    return epochs, permuted(positions - epochs * rows, size=rows, keys=epoch_keys(seed, epochs))


def rank_positions(step: int, *, batch_pairs: int, rank: int, world: int) -> Ints:
    """The positions that `rank` of `world` reads in `step`: its contiguous slice of the global batch, (batch_pairs / world,) int64."""
    if batch_pairs % world:
        raise ValueError(f"batch_pairs={batch_pairs} must be a multiple of the number of ranks, {world}")
    local = batch_pairs // world
    first = step * batch_pairs + rank * local
    return np.arange(first, first + local, dtype=np.int64)


def permuted(index: Ints, *, size: int, keys: Words) -> Ints:
    """Where a keyed bijection of 0..size-1 takes each index; `keys` (one word an index) chooses the bijection.

    A Feistel network permutes the next power of four; an image outside 0..size-1 is permuted again until it falls inside
    (cycle walking), which keeps the map a bijection. Raises ValueError where size is not in 1 to 2**62.
    """
    if not 1 <= size <= 1 << 62:
        raise ValueError(f"a permutation of {size} rows: the size must be in 1 to 2**62")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    word = _feistel(index.astype(np.uint64), keys, half_bits)
    while (outside := word >= np.uint64(size)).any():
        word[outside] = _feistel(word[outside], keys[outside], half_bits)
    return word.astype(np.int64)


def epoch_keys(seed: int, epochs: Ints) -> Words:
    """One key word for each (seed, epoch). Raises ValueError for a seed outside 0 to 2**64 - 1."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed}: must be in 0 to 2**64 - 1")
    seed_word = mixed(np.full(1, seed, dtype=np.uint64))
    return mixed(seed_word ^ mixed(epochs.astype(np.uint64) + np.uint64(1)))


def mixed(word: Words) -> Words:
    """SplitMix64's output function (Steele, Lea and Flood, 2014): a bijection of 64-bit words that flips about half the bits."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _feistel(word: Words, keys: Words, half_bits: int) -> Words:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = word >> shift, word & mask
    for turn in range(_ROUNDS):
        # The key is mixed with the round before the half is added: else equal halves of two rounds would cancel.
        left, right = right, left ^ (mixed(right + mixed(keys + np.uint64(turn))) & mask)
    return (left << shift) | right
