"""Random numbers as a function of keys: the same on every rank, in every layout, at every replay. No generator state.

A stream is named by integers (seed, step, block, group, ...); element i of a stream is a mix of its key and i. The mix
is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), in
int64 arithmetic that wraps around, which CPU and GPU compute alike.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key(*parts: int | str) -> int:
    """A 63-bit stream key from integers and names; the same on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keys(stream: int, members: Tensor) -> Tensor:
    """(n,) int64: one key for each member (n,) int64 of a stream, for example each routing group of a step."""
    return _mix(members * _signed(_GOLDEN) + _signed(stream))


def uniform(stream: int | Tensor, count: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Uniform numbers above 0: (count,) for one key, (n, count) for n keys of shape (n,).

    The largest are 1 by rounding: one in 2**54 in float64, one in 2**25 in float32.

    float64 has 53 random bits; narrower types are rounded from that, so all types see the same stream.
    """
    bits = _bits(stream, count, device)
    # The top 53 bits, moved half a step up: never 0, so a logarithm is finite.
    unit = (_shift_right(bits, 11).to(torch.float64) + 0.5) * 2.0**-53
    return unit.to(dtype)


def normal(stream: int | Tensor, count: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, shaped as `uniform`'s, by Box and Muller's transform."""
    half = (count + 1) // 2
    unit = uniform(stream, 2 * half, device=device, dtype=torch.float64)
    radius, angle = (-2 * unit[..., :half].log()).sqrt(), 2 * math.pi * unit[..., half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :count].to(dtype)


def _bits(stream: int | Tensor, count: int, device: torch.device) -> Tensor:
    place = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    if isinstance(stream, Tensor):
        return _mix(_mix(stream.to(device))[:, None] + place)
    # A scalar key passes the same mix as a tensor of keys.
    return _mix(_mix(torch.tensor(_signed(stream), dtype=torch.int64, device=device)) + place)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX2)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit in, which the mask takes out again."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value
