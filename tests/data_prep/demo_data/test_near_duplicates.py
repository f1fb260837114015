from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_prep.demo_data.folder_writer import Picture, write_bytes
from data_prep.demo_data.near_duplicates import without_near_duplicates
from data_prep.imaging import phash
from limoe_dist.config.errors import UserError
from tests.data_prep.pictures_of import encoded, noisy


def test_the_hash_says_which_cells_are_darker_than_their_right_neighbour():
    rising = Image.fromarray(np.tile(np.arange(0, 90, 10, dtype=np.uint8), (8, 1)))
    assert phash.difference_hash(rising) == 2**64 - 1
    assert phash.difference_hash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    one_step = np.zeros((8, 9), dtype=np.uint8)
    one_step[0, 1:] = 200  # the first comparison of the first row: the highest bit
    assert phash.difference_hash(Image.fromarray(one_step)) == 1 << 63


def test_distances_count_differing_bits():
    assert phash.hamming_distances([0, 2**64 - 1], [0, 1, 2**63 + 1]).tolist() == [[0, 1, 2], [64, 63, 62]]


def test_the_mean_difference_is_in_levels(tmp_path):
    for name, level in (("a", 100), ("b", 110)):
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (64, 64), (level, level, level))))
    prints = [phash.fingerprint(tmp_path / name) for name in ("a", "b")]
    assert phash.mean_difference(*prints) == 10.0


@pytest.mark.parametrize(
    ("bits", "levels", "same"), [(2, 12.0, True), (3, 12.0, False), (2, 12.1, False), (8, 5.0, True), (9, 0.0, False)]
)
def test_one_picture_is_near_in_hash_and_in_pixels(bits, levels, same):
    assert phash.is_same_picture(bits, levels) is same


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"x\.png: cannot be decoded"):
        phash.fingerprint(tmp_path / "x.png")


def test_a_picture_that_validation_holds_is_dropped_from_training_and_listed(tmp_path):
    twin, alone = noisy(1, size=(96, 96)), noisy(2, size=(96, 96))
    slightly = Image.fromarray(np.clip(np.asarray(twin, dtype=np.int16) + 2, 0, 255).astype(np.uint8))
    train = [Picture("twin.png", ("x",), "owl", "s"), Picture("alone.png", ("x",), "cat", "s")]
    validation = [Picture("v.png", ("x",), "owl", "t")]
    for folder, name, image in (("train", "twin", twin), ("train", "alone", alone), ("validation", "v", slightly)):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_bytes(tmp_path / folder / f"{name}.png", encoded(image))
    kept, dropped, lines = without_near_duplicates(tmp_path, train, validation)
    assert ([p.image for p in kept], [p.image for p in dropped]) == (["alone.png"], ["twin.png"])
    table = (tmp_path / "near_duplicates.csv").read_text().splitlines()
    assert table[0] == "train_image,validation_image,hash_bits,mean_levels"
    assert len(table) == 2
    assert table[1].startswith("twin.png,v.png,")
    assert any(line.startswith("dropped from training: 1 pictures") for line in lines)
    assert (
        "validation pictures within 8 of 64 hash bits of a training picture: 0 of the same concept, 0 of any"
        in lines[3]
    )
