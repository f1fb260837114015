"""Numbers from keys: the counter-based generator Philox4x32-10, vectorised. It has no state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox4x32(counters: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Four random 32-bit words for each counter of four 32-bit words: (4, n) uint64 to (4, n) uint64, all below 2**32.

    key: two 32-bit words. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = counters
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ np.uint64(key0),
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ np.uint64(key1),
            product0 & _LOW,
        )
        key0, key1 = (key0 + _WEYL[0]) & 0xFFFFFFFF, (key1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def uniforms(positions: npt.NDArray[np.int64], *, seed: int, draws: int) -> npt.NDArray[np.float64]:
    """`draws` numbers in [0, 1) for each position, (draws, n) float64: a function of (seed, position) alone.

    positions: (n,) int64, >= 0. seed: 0 to 2**64 - 1. Draw d does not change where more draws are asked for.
    """
    words = positions.astype(np.uint64)
    blocks = -(-draws // 4)
    counters = np.zeros((4, blocks, len(words)), dtype=np.uint64)
    counters[0], counters[1] = words & _LOW, words >> _32
    counters[2] = np.arange(blocks, dtype=np.uint64)[:, None]
    random = philox4x32(counters.reshape(4, -1), (seed & 0xFFFFFFFF, seed >> 32))
    # (4, blocks, n) -> draw = block * 4 + word
    in_order = random.reshape(4, blocks, -1).transpose(1, 0, 2).reshape(blocks * 4, -1)
    return in_order[:draws].astype(np.float64) * 2.0**-32
