from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_prep.imaging import phash
from tests.data_prep.pictures_of import decoded, encoded


def scene(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Light and shade on all scales, as in a photograph."""
    chance = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for side in (2, 4, 8, 16, 32, 64):
        level = Image.fromarray(chance.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(level.resize(size, Image.Resampling.BICUBIC), dtype=float) / side**0.5
    total -= total.min()
    return Image.fromarray((total / total.max() * 235).astype(np.uint8))


def hash_of(image: Image.Image) -> phash.DctHash:
    return phash.dct_hash(np.asarray(image.convert("RGB")))


def bits_between(left: Image.Image, right: Image.Image) -> int:
    return (hash_of(left).bits ^ hash_of(right).bits).bit_count()


# A cosine of k half waves across 32 columns is one coefficient of the transform: row 0, column k of the 8 x 8, the bit
# 63 - k. Its level of 60 and the mean of 128 are the only ones above the median, which is about 0.
@pytest.mark.parametrize("half_waves", [1, 2, 7])
def test_a_single_wave_sets_the_bit_of_its_frequency(half_waves):
    columns = 128 + 60 * np.cos(np.pi * half_waves * (2 * np.arange(32) + 1) / 64)
    grey = np.tile(np.rint(columns).astype(np.uint8), (32, 1))
    found = phash.dct_hash(np.repeat(grey[:, :, None], 3, axis=2))
    assert found.bits >> 63 == 1
    assert found.bits >> (63 - half_waves) & 1 == 1
    assert 1 <= found.information <= 2  # the rounding of the columns may lift one other above CLEAR_LEVEL


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((160, 120), Image.Resampling.LANCZOS),
        lambda image: image.resize((500, 375), Image.Resampling.BICUBIC),
        lambda image: Image.fromarray(decoded(encoded(image, "JPEG", quality=50))),
        lambda image: image.convert("L"),
        lambda image: ImageEnhance.Brightness(image).enhance(1.1),
        lambda image: image.resize((320, 160)),
    ],
    ids=["half", "larger", "jpeg 50", "grey", "brighter", "squeezed"],
)
def test_a_copy_is_within_four_bits(change):
    for seed in range(5):
        assert bits_between(scene(seed), change(scene(seed))) <= 4


def test_different_pictures_are_far_apart():
    hashes = [hash_of(scene(seed)).bits for seed in range(30)]
    least = min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i])
    assert least > 12


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (64, 48), (10, 200, 30)),
        Image.new("RGB", (1, 1), "white"),
        Image.linear_gradient("L"),
        Image.linear_gradient("L").rotate(90),
    ],
    ids=["green", "one pixel", "down", "across"],
)
def test_a_picture_with_hardly_anything_on_it_has_little_information(image):
    assert hash_of(image).information < phash.LEAST_INFORMATION


def test_a_scene_has_much_information():
    assert min(hash_of(scene(seed)).information for seed in range(5)) > 40
