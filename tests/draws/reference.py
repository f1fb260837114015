"""The random number generators once more, in plain Python integers, from their publications."""

from __future__ import annotations

import hashlib
import math

WORD = (1 << 64) - 1


def splitmix(state: int) -> int:
    """Finaliser of SplitMix64: variant 13 of Stafford, as in Steele, Lea and Flood (OOPSLA 2014), figure 16."""
    state &= WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


GOLDEN = 0x9E3779B97F4A7C15


def stream_key(*parts: int | str) -> int:
    """63 bits of blake2b over type and value of each part, separated by the unit separator."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def member_key(stream: int, member: int) -> int:
    return splitmix(stream + member * GOLDEN)


def uniform(stream: int, count: int) -> list[float]:
    """Element i, from 1, is the i-th output of SplitMix64 seeded with splitmix(stream): its top 53 bits and a half."""
    seed = splitmix(stream)
    return [((splitmix(seed + i * GOLDEN) >> 11) + 0.5) / (1 << 53) for i in range(1, count + 1)]


def normal(stream: int, count: int) -> list[float]:
    """Box and Muller: radii from the first half of the uniforms, angles from the second; first cosines, then sines."""
    half = (count + 1) // 2
    unit = uniform(stream, 2 * half)
    radii = [math.sqrt(-2 * math.log(u)) for u in unit[:half]]
    cosines = [r * math.cos(2 * math.pi * u) for r, u in zip(radii, unit[half:], strict=True)]
    sines = [r * math.sin(2 * math.pi * u) for r, u in zip(radii, unit[half:], strict=True)]
    return (cosines + sines)[:count]


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def philox_uniforms(position: int, seed: int, draws: int) -> list[float]:
    """The draws of one position: counter (position low, high, block of four draws, 0), key (seed low, high)."""
    low, high = 0xFFFFFFFF, 32
    words = [
        word
        for block in range(-(-draws // 4))
        for word in philox4x32((position & low, position >> high, block, 0), (seed & low, seed >> high))
    ]
    return [word / 2**32 for word in words[:draws]]
