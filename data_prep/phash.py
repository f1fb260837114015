"""Perceptual hashes: do two sets hold the same picture? A 64-bit difference hash, and the mean pixel difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
