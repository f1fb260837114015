"""Perceptual hashes: do two sets hold the same picture? 64 bits each, and near is a small number of differing bits.

`dct_hash` is what `limoe prep dedup` searches by: at the same share of found copies it takes a tenth as many different
pictures for one as the difference hash does (docs/measured/dedup.json). The demo's two sets are small enough to compare
every pair, so there the difference hash proposes and the mean pixel difference decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from limoe_dist.config.errors import UserError

HASH_BITS = 64
SMALL_SIDE = 32
# (bits, levels): two pictures are one where both differences are at most those of one line. Simple shapes on white, a
# crescent or a bolt, are where makers meet: the lines were set by eye on the pairs of seven emoji sets.
SAME_PICTURE = ((2, 12.0), (8, 5.0))


@dataclass(frozen=True)
class Fingerprint:
    hash: int
    """64 bits: is each of 8x8 cells darker than its right neighbour?"""
    small: Any
    """(32, 32, 3) int16, the picture at 32 pixels."""


def difference_hash(image: Image.Image) -> int:
    """The 64-bit dHash of a picture: the grey 9x8 thumbnail, each pixel compared with the one to its right."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, :-1] < grey[:, 1:]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def fingerprint(path: Path) -> Fingerprint:
    """Raises UserError where the picture cannot be decoded."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: cannot be decoded: {error}: delete it and run again") from None
    small = np.asarray(rgb.resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BOX), dtype=np.int16)
    return Fingerprint(difference_hash(rgb), small)


def hamming_distances(left: Sequence[int], right: Sequence[int]) -> Any:
    """(len(left), len(right)) uint8: the number of differing bits, 0 to 64, of every pair of hashes."""
    a_L = np.array(left, dtype=np.uint64)
    b_R = np.array(right, dtype=np.uint64)
    return np.bitwise_count(a_L[:, None] ^ b_R[None, :])


def mean_difference(left: Fingerprint, right: Fingerprint) -> float:
    """Mean absolute difference of the two small pictures, in levels of 0 to 255."""
    return float(np.abs(left.small - right.small).mean())


def is_same_picture(bits: int, levels: float) -> bool:
    """Is a pair with so many differing hash bits and such a mean difference one picture?"""
    return any(bits <= most_bits and levels <= most_levels for most_bits, most_levels in SAME_PICTURE)


DCT_SIDE = 32
"""The picture is shrunk to so many grey pixels a side, whatever its shape was."""
DCT_CORNER = 8
"""Of its cosine transform the 8 x 8 lowest frequencies are kept: 64 of them, one bit each."""
DCT_SCALE = 1 << 12
CLEAR_LEVEL = 4
"""A coefficient above this is more than rounding: a flat picture's rounding to whole levels makes about 0.3."""
LEAST_INFORMATION = 16
"""With fewer clear coefficients the bits are rounding noise: one colour has 0, a gradient 4 to 8, a shape that is
symmetric both ways at most 15. Such a picture is a duplicate only of the very same pixels."""


@dataclass(frozen=True)
class DctHash:
    bits: int
    """64 bits: is each low frequency above their median?"""
    information: int
    """How many of the 63 frequencies but the mean are clear of rounding noise, 0 to 63."""


def dct_hash(pixels_HW3: Any) -> DctHash:
    """The 64-bit cosine-transform hash ("pHash") of a picture: its brightness alone counts, colours and aspect do not.

    pixels_HW3: (H, W, 3) uint8. Whole numbers only, so that every machine finds the same bits.
    Colour changes, re-encoding and resizing hardly move it; mirrored, turned or tightly cropped pictures do not match.
    """
    grey = Image.fromarray(pixels_HW3).convert("L")
    # The triangle filter: with the box filter a picture of 48 pixels lands a third of a pixel beside one of 96.
    small = grey.resize((DCT_SIDE, DCT_SIDE), Image.Resampling.BILINEAR, reducing_gap=4.0)
    rows = _cosines()
    corner = rows @ np.asarray(small, dtype=np.int64) @ rows.T
    values = corner.ravel()
    median = np.partition(values[1:], 31)[31]  # of 63: the mean brightness is no shape
    clear = np.abs(values[1:]) > CLEAR_LEVEL * DCT_SCALE**2
    return DctHash(int.from_bytes(np.packbits(values > median).tobytes(), "big"), int(clear.sum()))


@cache
def _cosines() -> Any:
    """(8, 32) int64: the first rows of the orthonormal cosine transform, times DCT_SCALE."""
    frequency, place = np.arange(DCT_CORNER)[:, None], np.arange(DCT_SIDE)[None]
    rows = np.cos(np.pi * (2 * place + 1) * frequency / (2 * DCT_SIDE)) * np.sqrt(2 / DCT_SIDE)
    rows[0] /= np.sqrt(2)
    return np.rint(rows * DCT_SCALE).astype(np.int64)
