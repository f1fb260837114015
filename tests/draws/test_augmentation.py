"""Every parameter of the augmentation: its distribution by the settings, independence, and what it depends on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from limoe_dist.config.schema import Image
from limoe_dist.data.augment import augment_params, caption_index
from tests.draws import reference
from tests.draws.recovered import ALL, SIZE, drawn
from tests.draws.statistics import check_counts, check_independent, check_share, check_uniform, ks_distance

N = 100_000
POSITIONS = np.arange(N)
F32 = 1e-5
"""Rounding of quantities that are recovered from float32, as a share of their range."""

Columns = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def found() -> Columns:
    return drawn(POSITIONS)


UNIFORM = {
    "angle": (-25.0, 25.0),
    # Zoom: log-uniform in 1 / 1.5 to 1.5.
    "log_zoom": (-math.log(1.5), math.log(1.5)),
    "shift_x": (-0.2, 0.2),
    "shift_y": (-0.2, 0.2),
    "brightness": (0.6, 1.4),
    "contrast": (0.7, 1.3),
    "saturation": (0.8, 1.2),
    "hue": (-40.0, 40.0),
    "caption": (0.0, 1.0),
}


@pytest.mark.parametrize("name", UNIFORM)
def test_a_parameter_is_uniform_in_its_range(found: Columns, name: str) -> None:
    check_uniform(found[name], *UNIFORM[name], name, tolerance=F32)


def test_the_matrix_turns_and_zooms_without_shear_or_reflection() -> None:
    linear = augment_params(POSITIONS[:10_000], ALL, seed=0).matrix[:, :, :2]
    assert (linear[:, 0, 0] == linear[:, 1, 1]).all()
    assert (linear[:, 0, 1] == -linear[:, 1, 0]).all()


@pytest.mark.parametrize("flip", [0.0, 0.05, 0.3, 1.0])
def test_the_share_of_flipped_pictures_is_the_setting(flip: float) -> None:
    mirror = augment_params(POSITIONS, ALL.model_copy(update={"flip": flip}), seed=0).mirror
    assert {*np.unique(mirror).tolist()} <= {0, 1}
    check_share(mirror, flip, f"flip={flip}")


def uncut(found: Columns) -> np.ndarray:
    """Crops whose area was drawn below 3/4. At an aspect of at most 4/3 no side of theirs is longer than the picture's;
    where a side is cut, the other is sqrt(area / aspect) >= 3/4, so that the crop's own area tells the two apart."""
    return found["area"] < 0.75


def test_crops_have_a_uniform_area_and_a_log_uniform_aspect(found: Columns) -> None:
    small = uncut(found)
    # Area: uniform in 0.25 to 1, so two thirds are below 3/4, and those are uniform in 0.25 to 3/4.
    check_share(small, 2 / 3, "area below 3/4")
    check_uniform(found["area"][small], 0.25, 0.75, "area", tolerance=F32)
    log = math.log(4 / 3)
    check_uniform(found["log_aspect"][small], -log, log, "aspect", tolerance=F32)
    assert (found["height"][small] < 1).all()
    assert (found["width"][small] < 1).all()


@pytest.mark.parametrize("min_area", [0.1, 0.25, 0.8])
def test_a_side_that_would_be_longer_than_the_picture_s_is_cut_and_the_other_kept(min_area: float) -> None:
    found = drawn(POSITIONS, ALL.model_copy(update={"min_crop_area": min_area}))
    # P(side <= s) = P(area <= s^2 r) for s < 1, the mean over r log-uniform in 3/4 to 4/3, by a midpoint rule.
    ratio = np.exp((2 * (np.arange(400) + 0.5) / 400 - 1) * math.log(4 / 3))

    def cdf(sides: np.ndarray) -> np.ndarray:
        grid = np.linspace(0, 1, 4001)
        below = np.clip((grid[:, None] ** 2 * ratio - min_area) / (1 - min_area), 0, 1).mean(axis=1)
        return np.where(sides < 1, np.interp(sides, grid, below), 1.0)

    for name in ("height", "width"):
        side = found[name]
        assert ks_distance(side[side < 1], lambda x: cdf(x) / cdf(np.array(1 - 1e-9))) < 2.7, name
        check_share(side == 1, 1 - float(cdf(np.array(1 - 1e-9))), f"{name} is cut")
    assert not ((found["height"] == 1) & (found["width"] == 1)).any()
    assert found["area"].max() <= 1


def test_the_crop_is_anywhere_in_the_picture_in_both_directions(found: Columns) -> None:
    for name, side in (("position_y", "height"), ("position_x", "width")):
        # A float32 corner is exact to 6e-8: as a share of 1/50 of the picture, to 3e-6.
        roomy = found[side] < 0.98
        check_uniform(found[name][roomy], 0, 1, name, tolerance=F32)
    roomy = (found["height"] < 0.98) & (found["width"] < 0.98)
    cell_y, cell_x = ((found[name][roomy] * 20).astype(int).clip(0, 19) for name in ("position_y", "position_x"))
    # 400 cells of the square, not its diagonal alone.
    check_counts(np.bincount(cell_y * 20 + cell_x, minlength=400), "crop position")


def test_crops_are_inside_the_picture() -> None:
    for min_area in (0.01, 0.25, 0.99):
        params = augment_params(POSITIONS, ALL.model_copy(update={"min_crop_area": min_area}), seed=1)
        assert (params.anchor >= 0).all()
        assert (params.anchor.astype(float) + params.shape <= 1 + 1e-7).all()
        assert (params.shape > 0).all()


INDEPENDENT = (
    "area",
    "log_aspect",
    "position_y",
    "position_x",
    "flip",
    "angle",
    "log_zoom",
    "shift_x",
    "shift_y",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "caption",
)


def test_all_parameters_of_a_position_and_of_its_neighbours_are_independent(found: Columns) -> None:
    # Where no side is cut, all draws of the crop can be told. Two thirds of the positions: lags are of those.
    rows = np.stack([found[name][uncut(found)] for name in INDEPENDENT])
    check_independent(rows, INDEPENDENT, lags=(0, 1, 2))


def test_parameters_of_different_seeds_are_independent() -> None:
    names = [name for name in INDEPENDENT if name not in ("area", "log_aspect", "position_y", "position_x")]
    rows, labels = [], []
    for seed in (0, 1, 2, 2**32):
        found = drawn(POSITIONS[:30_000], seed=seed)
        rows += [found[name] for name in names]
        labels += [f"{name} of seed {seed}" for name in names]
    check_independent(rows, labels, lags=(0, 1))


OWN = {
    "min_crop_area": {"area", "log_aspect", "height", "width"},
    "flip": {"flip"},
    "rotate_degrees": {"angle"},
    "scale": {"log_zoom"},
    "translate": {"shift_x", "shift_y"},
    "brightness": {"brightness"},
    "contrast": {"contrast"},
    "saturation": {"saturation"},
    "hue_degrees": {"hue"},
}


@pytest.mark.parametrize("setting", OWN)
@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_a_setting_changes_its_own_parameters_alone_and_in_proportion(setting: str, factor: float) -> None:
    value = getattr(ALL, setting) * factor if setting != "min_crop_area" else (0.5, 1.0)[factor == 0.0]
    before = drawn(POSITIONS[:2000], seed=5)
    after = drawn(POSITIONS[:2000], ALL.model_copy(update={setting: value}), seed=5)
    assert {*before} == {*after}
    for name in before:
        both = np.isfinite(before[name]) & np.isfinite(after[name])
        # Positions are recovered from corners, of which few decimals are left where a crop is large.
        close = np.isclose(before[name][both], after[name][both], rtol=1e-4, atol=1e-4)
        assert close.all() == (name not in OWN[setting]), name
        if name in OWN[setting] - {"area", "log_aspect", "height", "width", "flip", "log_zoom"}:
            middle = 1.0 if name in ("brightness", "contrast", "saturation") else 0.0
            expected = (before[name] - middle) * factor
            np.testing.assert_allclose(after[name] - middle, expected, atol=1e-5, err_msg=name)


def test_settings_that_do_not_augment_change_nothing() -> None:
    params = augment_params(POSITIONS[:500], ALL, seed=5)
    others = augment_params(POSITIONS[:500], ALL.model_copy(update={"mean": 1.0, "std": 3.0, "patch": 6}), seed=5)
    for name, value in vars(params).items():
        assert (getattr(others, name) == value).all(), name
    # With another size the picture is turned about its own centre: only the offset of the matrix changes.
    large = augment_params(POSITIONS[:500], ALL.model_copy(update={"size": 2 * SIZE}), seed=5)
    for name, value in vars(params).items():
        if name != "matrix":
            assert (getattr(large, name) == value).all(), name
    assert (large.matrix[:, :, :2] == params.matrix[:, :, :2]).all()
    np.testing.assert_allclose(large.matrix[:, :, 2], 2 * params.matrix[:, :, 2], atol=1e-4)


def by_hand(position: int, seed: int, image: Image) -> dict[str, Any]:
    """The parameters of one position, from the settings' descriptions and the order of its draws."""
    u = iter(reference.philox_uniforms(position, seed, 14))

    def around_zero(width: float) -> float:
        return (2 * next(u) - 1) * width

    caption = next(u)
    area = 1 - (1 - image.min_crop_area) * next(u)
    aspect = (4 / 3) ** (2 * next(u) - 1)
    height, width = min(1.0, math.sqrt(area / aspect)), min(1.0, math.sqrt(area * aspect))
    anchor = (next(u) * (1 - height), next(u) * (1 - width))
    mirror = int(next(u) < image.flip)
    angle = math.radians(around_zero(image.rotate_degrees))
    zoom = (1 + image.scale) ** (2 * next(u) - 1)
    shift = np.array([around_zero(image.translate * image.size) for _ in "xy"])
    # p' = zoom R (p - c) + c + shift, as a matrix of homogeneous coordinates, inverted.
    centre = np.full(2, image.size / 2)
    turn = zoom * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = np.eye(3)
    forward[:2, :2], forward[:2, 2] = turn, centre + shift - turn @ centre
    return {
        "caption": caption,
        "anchor": anchor,
        "shape": (height, width),
        "mirror": mirror,
        "matrix": np.linalg.inv(forward)[:2],
        "brightness": 1 + around_zero(image.brightness),
        "contrast": 1 + around_zero(image.contrast),
        "saturation": 1 + around_zero(image.saturation),
        "hue": around_zero(image.hue_degrees),
    }


def test_the_parameters_of_a_position_are_exactly_those_of_its_draws() -> None:
    # Runs that are resumed read on with the same draws: their order is a part of what a run is.
    positions = [*range(40), 999_999, 2**32 - 1, 2**32, 2**40 + 3]
    for seed in (0, 9, 2**32 + 9, 2**63 - 1):
        params = augment_params(np.array(positions), ALL, seed=seed)
        for i, position in enumerate(positions):
            for name, value in by_hand(position, seed, ALL).items():
                # float32, also of offsets as large as the picture's side.
                np.testing.assert_allclose(getattr(params, name)[i], value, rtol=1e-6, atol=1e-5, err_msg=name)


def test_a_position_has_its_parameters_whichever_others_are_asked_for() -> None:
    whole = augment_params(POSITIONS[:100], ALL, seed=2)
    chosen = [99, 3, 3, 57, 0]
    asked = augment_params(np.array(chosen), ALL, seed=2)
    taken = whole.take(chosen)
    for name, value in vars(whole).items():
        assert (getattr(asked, name) == value[chosen]).all(), name
        assert (getattr(taken, name) == value[chosen]).all(), name


@pytest.mark.parametrize("captions", range(1, 8))
def test_every_caption_of_a_row_is_as_likely_whatever_the_crop(found: Columns, captions: int) -> None:
    draws, crop = found["caption"][:40_000], found["position_x"][:40_000]
    chosen = np.array([caption_index(draw, captions) for draw in draws.tolist()])
    counts = np.bincount(chosen)
    assert len(counts) == captions
    if captions == 1:
        return
    check_counts(counts, "captions")
    tenth = (np.nan_to_num(crop) * 10).astype(int).clip(0, 9)
    wide = np.isfinite(crop)
    table = np.array([np.bincount(tenth[wide & (chosen == n)], minlength=10) for n in range(captions)])
    # Of independent rows and columns: chi-square of (k - 1) * 9 degrees of freedom.
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    free = (captions - 1) * 9
    assert ((table - expected) ** 2 / expected).sum() < free + 5 * math.sqrt(2 * free) + 9
    # Edges: caption k begins exactly at k / captions.
    for caption in range(captions):
        assert caption_index((caption + 0.5) / captions, captions) == caption
    for caption in range(1, captions):
        assert caption_index(caption / captions - 1e-12, captions) == caption - 1
        assert caption_index(caption / captions + 1e-12, captions) == caption
