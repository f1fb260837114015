from __future__ import annotations

import math

import numpy as np
import pytest

from limoe_dist.config.schema import Image
from limoe_dist.data import augment
from limoe_dist.data.augment import augment_params, caption_index, crop_with_pixels, identity_params

POSITIONS = np.arange(4000)
ALL = Image(
    size=48,
    patch=12,
    min_crop_area=0.4,
    flip=0.25,
    rotate_degrees=10.0,
    scale=0.2,
    translate=0.1,
    brightness=0.1,
    contrast=0.2,
    saturation=0.3,
    hue_degrees=20.0,
)


def test_settings_of_no_effect_give_exactly_the_identity() -> None:
    params, identity = augment_params(POSITIONS[:64], Image(size=48, patch=12), seed=3), identity_params(64)
    for name in ("anchor", "shape", "matrix", "mirror", "brightness", "contrast", "saturation", "hue"):
        assert (getattr(params, name) == getattr(identity, name)).all(), name
        assert getattr(params, name).dtype == getattr(identity, name).dtype, name


def test_each_factor_stays_in_its_range_and_reaches_both_ends() -> None:
    params = augment_params(POSITIONS, ALL, seed=0)
    for name, middle, width in (("brightness", 1, 0.1), ("contrast", 1, 0.2), ("saturation", 1, 0.3), ("hue", 0, 20)):
        value = getattr(params, name)
        # 4000 draws miss the outermost hundredth of an end with a chance of 0.995^4000 = 2e-9.
        assert middle - width - 1e-6 <= value.min() < middle - 0.99 * width, name
        assert middle + 0.99 * width < value.max() <= middle + width + 1e-6, name


def test_crops_keep_at_least_their_area_inside_the_picture() -> None:
    params = augment_params(POSITIONS, ALL, seed=0)
    assert (params.anchor >= 0).all()
    assert (params.anchor + params.shape <= 1 + 1e-6).all()
    area = params.shape.prod(axis=1)
    # A side cut at the picture's edge shrinks the crop: at area a and aspect 4/3 the long side wants sqrt(4a/3) > 1 for
    # a > 3/4, where sqrt(3a/4) >= 0.75 is left. Below a = 3/4 nothing is cut, so 0.4 holds.
    assert 0.4 - 1e-6 <= area.min() < 0.41
    aspect = params.shape[:, 1] / params.shape[:, 0]
    assert 3 / 4 - 1e-6 <= aspect.min() < 0.76
    assert 1.32 < aspect.max() <= 4 / 3 + 1e-6


def test_a_crop_of_less_than_a_pixel_is_widened_to_one() -> None:
    shape = np.array([[0.01, 0.5], [0.2, 0.01], [0.5, 0.5]], dtype=np.float32)
    anchor = np.array([[0.99, 0.5], [0.0, 0.4], [0.5, 0.25]], dtype=np.float32)
    # Pictures of 4, 1 and 100 pixels: at least 1.01 / 4 of a side, the whole picture, and no change.
    anchor, shape = crop_with_pixels(anchor, shape, np.array([4, 1, 100]))
    np.testing.assert_allclose(shape, [[0.2525, 0.5], [1, 1], [0.5, 0.5]])
    np.testing.assert_allclose(anchor, [[0.7475, 0.5], [0, 0], [0.5, 0.25]], rtol=1e-6)


def test_a_picture_is_flipped_below_the_setting_and_not_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for drawn, flipped in ((0.25, 0), (np.nextafter(0.25, 0), 1)):
        monkeypatch.setattr(augment, "uniforms", lambda at, *, seed, draws, u=drawn: np.full((draws, len(at)), u))
        assert augment_params(POSITIONS[:1], ALL, seed=0).mirror.tolist() == [flipped]


def test_the_parameters_of_some_pictures_are_theirs_and_of_none_there_are_none() -> None:
    params = augment_params(POSITIONS[:5], ALL, seed=0)
    some = params.take([4, 1])
    for name, value in vars(params).items():
        assert (getattr(some, name) == value[[4, 1]]).all(), name
        assert getattr(params.take([]), name).shape == (0, *value.shape[1:]), name


def test_about_a_quarter_is_flipped() -> None:
    # 4000 flips at 1/4: 1000, standard deviation 27.
    assert abs(int(augment_params(POSITIONS, ALL, seed=0).mirror.sum()) - 1000) < 137


def test_the_matrix_turns_and_zooms_within_its_ranges_about_the_centre() -> None:
    still = ALL.model_copy(update={"translate": 0.0})
    matrix = augment_params(POSITIONS, still, seed=0).matrix.astype(np.float64)
    # The centre (24, 24) stays where it is.
    np.testing.assert_allclose(matrix[:, :, :2] @ [24.0, 24.0] + matrix[:, :, 2], 24.0, atol=1e-4)
    zoom = 1 / np.sqrt(np.linalg.det(matrix[:, :, :2]))
    assert 1 / 1.2 - 1e-5 <= zoom.min() < 0.84
    assert 1.19 < zoom.max() <= 1.2 + 1e-5
    # Log-uniform: as many zooms in as out; 4000 / 2 with standard deviation 32.
    assert abs(int((zoom > 1).sum()) - 2000) < 160
    angle = np.degrees(np.arctan2(matrix[:, 0, 1], matrix[:, 0, 0]))
    assert -10 - 1e-3 <= angle.min() < -9.9
    assert 9.9 < angle.max() <= 10 + 1e-3


def test_a_shift_alone_moves_the_source_the_other_way() -> None:
    shift = augment_params(POSITIONS, Image(size=48, patch=12, translate=0.25), seed=0).matrix
    assert (shift[:, :, :2] == np.eye(2)).all()
    # A quarter of 48 pixels.
    assert 11.8 < np.abs(shift[:, :, 2]).max() <= 12 + 1e-4
    assert np.abs(np.corrcoef(shift[:, 0, 2], shift[:, 1, 2])[0, 1]) < 0.08


def test_parameters_depend_on_seed_and_position_alone() -> None:
    together = augment_params(POSITIONS, ALL, seed=6)
    alone = augment_params(POSITIONS[123:124], ALL, seed=6)
    for name, value in vars(together).items():
        assert (getattr(alone, name)[0] == value[123]).all(), name
    assert (augment_params(POSITIONS, ALL, seed=7).hue != together.hue).mean() > 0.99


def test_turning_one_augmentation_off_leaves_the_others_as_they_were() -> None:
    without = augment_params(POSITIONS, ALL.model_copy(update={"min_crop_area": 1.0, "flip": 0.0}), seed=0)
    assert (without.hue == augment_params(POSITIONS, ALL, seed=0).hue).all()


def test_captions_are_chosen_evenly_and_never_past_the_last() -> None:
    draws = augment_params(POSITIONS, ALL, seed=0).caption
    chosen = np.bincount([caption_index(draw, 4) for draw in draws])
    # 1000 each, standard deviation 27.
    assert len(chosen) == 4
    assert np.abs(chosen - 1000).max() < 137
    assert caption_index(0.0, 3) == 0
    assert caption_index(math.nextafter(1.0, 0.0), 3) == 2
    assert caption_index(0.999, 1) == 0
