from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from limoe_dist.data.resize import resized


def triangles(length: int, size: int) -> np.ndarray:
    """(size, length) float64: row i has the weights of pixel i, a triangle as wide as the scale (at least 1)."""
    scale = length / size
    support = max(scale, 1.0)
    distance = np.abs(np.arange(length) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale)
    weights = np.clip(1 - distance / support, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def exact(picture: np.ndarray, size: int) -> np.ndarray:
    rows, columns = triangles(picture.shape[0], size), triangles(picture.shape[1], size)
    return np.einsum("ah,hwc,bw->abc", rows, picture.astype(np.float64), columns, optimize=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_pictures_of_any_size_are_within_a_level_of_the_exact_filter(threads: int) -> None:
    chance = np.random.default_rng(0)
    sizes = [(1, 1), (3, 90), (24, 24), (37, 11), (200, 133), (25, 23)]
    pictures = [chance.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    with ThreadPoolExecutor(threads) as pool:
        found = resized(pictures, 24, pool)
    assert (found.shape, found.dtype) == ((6, 24, 24, 3), np.uint8)
    for picture, small in zip(pictures, found, strict=True):
        # Half a level for each of the two directions, and the weights have 15 bits or so.
        assert np.abs(small - exact(picture, 24)).max() < 1.2, picture.shape
    assert (found[2] == pictures[2]).all()
