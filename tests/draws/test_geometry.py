"""What the decoder does with drawn parameters: a picture goes where its turn, zoom, shift, crop and flip say.

Places are (x, y), x to the right and y down, in pixels from the outer corner; the centre of pixel i is at i + 1/2.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from limoe_dist.config.schema import Image
from limoe_dist.data.augment import AugmentParams, augment_params, crop_with_pixels, identity_params
from limoe_dist.data.dali import Decoder
from tests.draws.recovered import recovered

SIDE = 48
PLAIN = Image(size=SIDE, patch=8, mean=0.0, std=1.0)
POSITIONS = np.arange(20_000)


def encoded(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 as a PNG."""
    Pillow.fromarray(pixels).save(content := io.BytesIO(), "PNG")
    return np.frombuffer(content.getvalue(), dtype=np.uint8)


def black_box(x: float, y: float, side: int, *, size: int = SIDE) -> np.ndarray:
    """A white picture with a black square about (x, y)."""
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    left, top = int(x - side / 2), int(y - side / 2)
    pixels[top : top + side, left : left + side] = 0
    return pixels


def decoded(image: Image, pixels: np.ndarray, params: AugmentParams) -> np.ndarray:
    """(3, size, size): the picture with the first of the parameters."""
    decoder = Decoder(image, mode="train", batch_size=1, threads=1, device=torch.device("cpu"))
    return decoder.decode([encoded(pixels)], params.take([0]))[0].numpy()


def darkness(image: np.ndarray) -> tuple[float, np.ndarray]:
    """Area in pixels and centroid (x, y) of what is black on white."""
    dark = 1 - image.mean(axis=0) / 255
    place = np.arange(dark.shape[0]) + 0.5
    return float(dark.sum()), np.array([(dark * place).sum(), (dark * place[:, None]).sum()]) / dark.sum()


Columns = dict[str, np.ndarray]


def chosen(image: Image, rank: Callable[[Columns], np.ndarray]) -> tuple[AugmentParams, dict[str, float]]:
    """The position with the largest `rank` of many, and what was drawn there."""
    params = augment_params(POSITIONS, image, seed=0)
    found = recovered(params, image.size)
    best = int(np.nan_to_num(rank(found), nan=-math.inf).argmax())
    return params.take([best]), {name: float(value[best]) for name, value in found.items()}


def test_a_turn_of_90_degrees_takes_the_right_to_the_bottom() -> None:
    image = PLAIN.model_copy(update={"rotate_degrees": 90.0})
    params, drawn = chosen(image, lambda found: found["angle"])
    assert 89.9 < drawn["angle"] <= 90.001
    # p' = R (p - c) + c with R = [[0, -1], [1, 0]]: the top right corner (38, 12) goes to the bottom right, (36, 38).
    area, centre = darkness(decoded(image, black_box(38, 12, 6), params))
    assert area == pytest.approx(36, rel=0.02)
    np.testing.assert_allclose(centre, [36, 38], atol=0.1)
    params, drawn = chosen(image, lambda found: -found["angle"])
    _, centre = darkness(decoded(image, black_box(38, 12, 6), params))
    np.testing.assert_allclose(centre, [12, 10], atol=0.1)


def test_a_zoom_above_1_enlarges_and_one_below_shrinks() -> None:
    image = PLAIN.model_copy(update={"scale": 1.0})
    # 8 x 8 pixels about (20, 26), that is (-4, 2) from the centre (24, 24).
    for sign, zoom in ((1, 2.0), (-1, 0.5)):
        params, drawn = chosen(image, lambda found, sign=sign: sign * found["log_zoom"])
        assert math.exp(drawn["log_zoom"]) == pytest.approx(zoom, rel=0.001)
        area, centre = darkness(decoded(image, black_box(20, 26, 8), params))
        assert area == pytest.approx(64 * zoom**2, rel=0.03)
        np.testing.assert_allclose(centre, [24 - 4 * zoom, 24 + 2 * zoom], atol=0.05)


def test_a_shift_moves_to_the_right_and_down_by_its_share_of_the_side() -> None:
    image = PLAIN.model_copy(update={"translate": 0.25})
    # 12 pixels each at most: to the right and down, to the right and up.
    for down in (1, -1):
        params, drawn = chosen(image, lambda found, down=down: found["shift_x"] + down * found["shift_y"])
        assert drawn["shift_x"] == pytest.approx(0.25, abs=0.01)
        assert drawn["shift_y"] == pytest.approx(down * 0.25, abs=0.01)
        area, centre = darkness(decoded(image, black_box(22, 24, 6), params))
        assert area == pytest.approx(36, rel=0.02)
        np.testing.assert_allclose(centre, [22 + 48 * drawn["shift_x"], 24 + 48 * drawn["shift_y"]], atol=0.05)


def test_turn_zoom_and_shift_apply_in_this_order_and_the_flip_comes_last() -> None:
    image = PLAIN.model_copy(update={"rotate_degrees": 60.0, "scale": 0.6, "translate": 0.15, "flip": 0.5})
    params = augment_params(POSITIONS[:12], image, seed=4)
    found = recovered(params, SIDE)
    decoder = Decoder(image, mode="train", batch_size=12, threads=1, device=torch.device("cpu"))
    images = decoder.decode([encoded(black_box(27, 20, 4))] * 12, params).numpy()
    for i in range(12):
        angle, zoom = math.radians(found["angle"][i]), math.exp(found["log_zoom"][i])
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        shift = 48 * np.array([found["shift_x"][i], found["shift_y"][i]])
        expected = zoom * turn @ [27 - 24, 20 - 24] + 24 + shift
        if params.mirror[i]:
            expected[0] = 48 - expected[0]
        area, centre = darkness(images[i])
        np.testing.assert_allclose(centre, expected, atol=0.15, err_msg=f"picture {i}")
        assert area == pytest.approx(16 * zoom**2, rel=0.12)
    assert {*params.mirror.tolist()} == {0, 1}


def test_a_crop_is_at_its_drawn_place_and_fills_the_result() -> None:
    # Of a tall picture: shares of its height and of its width.
    height, width = 120, 60
    image = PLAIN.model_copy(update={"min_crop_area": 0.3})
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([2 * y, 4 * x, 0 * x], axis=-1).astype(np.uint8)
    for sign in (1, -1):
        # The crop that is farthest from the diagonal.
        params, drawn = chosen(
            image,
            lambda found, sign=sign: (
                sign * (found["position_y"] * (1 - found["height"]) - found["position_x"] * (1 - found["width"]))
            ),
        )
        (top, left), (high, wide) = params.anchor[0].astype(float), params.shape[0].astype(float)
        assert abs(top - left) > 0.2
        result = decoded(image, pixels, params)
        # Red tells the row and green the column: at the middle of the crop, and how far it goes from end to end.
        assert result[0].mean() == pytest.approx(2 * (height * (top + high / 2) - 0.5), abs=2.1)
        assert result[1].mean() == pytest.approx(4 * (width * (left + wide / 2) - 0.5), abs=4.1)
        per_row, per_column = result[0].mean(axis=1), result[1].mean(axis=0)
        assert per_row[-1] - per_row[0] == pytest.approx(2 * height * high * 47 / 48, abs=5)
        assert per_column[-1] - per_column[0] == pytest.approx(4 * width * wide * 47 / 48, abs=9)
        assert drawn["area"] < 0.6


def test_a_crop_comes_before_the_turn_and_the_flip() -> None:
    image = PLAIN.model_copy(update={"min_crop_area": 0.2, "rotate_degrees": 90.0, "flip": 0.5})
    params = identity_params(1)
    # The upper right quarter, enlarged twice.
    params.anchor[:], params.shape[:] = [0.0, 0.5], [0.5, 0.5]
    # A quarter turn as drawn: p = R^-1 (p' - c) + c with R^-1 = [[0, 1], [-1, 0]].
    params.matrix[:] = [[[0, 1, 0], [-1, 0, 48]]]
    params.mirror[:] = 1
    # (40, 8) in the picture is (32, 16) in the crop's 48 pixels, (8, -8) from its centre; turned (8, 8): (32, 32);
    # flipped: (16, 32).
    area, centre = darkness(decoded(image, black_box(40, 8, 4), params))
    np.testing.assert_allclose(centre, [16, 32], atol=0.1)
    assert area == pytest.approx(64, rel=0.05)


def test_a_crop_is_widened_about_nothing_but_its_far_end() -> None:
    # Of a picture of 10 pixels an extent below 0.101 becomes that; the corner moves only as far as it must.
    anchor = np.array([[0.95, 0.2], [0.5, 0.98]], dtype=np.float32)
    shape = np.array([[0.02, 0.5], [0.5, 0.02]], dtype=np.float32)
    found_anchor, found_shape = crop_with_pixels(anchor, shape, np.array([10, 10]))
    np.testing.assert_allclose(found_shape, [[0.101, 0.5], [0.5, 0.101]], rtol=1e-6)
    np.testing.assert_allclose(found_anchor, [[0.899, 0.2], [0.5, 0.899]], rtol=1e-6)


GREY, RED = (200, 200, 200), (200, 40, 40)


@pytest.mark.parametrize(
    ("name", "value", "colour", "expected"),
    [
        # A factor on the values; on the distance from 128; on the distance from the pixel's own grey; degrees.
        ("brightness", 0.5, GREY, (100, 100, 100)),
        ("contrast", 0.5, GREY, (164, 164, 164)),
        ("saturation", 0.5, GREY, (200, 200, 200)),
        ("hue", 120.0, GREY, (200, 200, 200)),
        # Grey of RED: 0.299 * 200 + 0.701 * 40 = 87.8, from which half of the distance is left.
        ("saturation", 0.5, RED, (144, 64, 64)),
        # A third of a turn takes red to green. RED in YIQ is (87.8, 95.4, 33.8); turned by -120 degrees (I, Q) is
        # (-18.4, -99.5), and by 120 degrees (-76.9, 65.7); back in RGB (8, 157, -61) and (55, 66, 285), clipped.
        ("hue", 120.0, RED, (8, 157, 0)),
        ("hue", -120.0, RED, (55, 66, 255)),
    ],
)
def test_a_colour_factor_does_what_its_name_says(
    name: str, value: float, colour: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    image = PLAIN.model_copy(
        update={"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue_degrees": 120.0, "size": 8}
    )
    params = replace(identity_params(1), **{name: np.array([value], dtype=np.float32)})
    pixels = np.full((8, 8, 3), colour, dtype=np.uint8)
    result = decoded(image, pixels, params)
    np.testing.assert_allclose(result[:, 4, 4], expected, atol=3)


def test_colours_change_after_the_turn_so_that_uncovered_pixels_look_like_a_white_background() -> None:
    image = PLAIN.model_copy(update={"translate": 0.5, "brightness": 0.5})
    params, drawn = chosen(image, lambda found: found["shift_x"] - abs(found["brightness"] - 0.6))
    pixels = decoded(image, np.full((SIDE, SIDE, 3), 255, dtype=np.uint8), params)
    # White everywhere before, 255 times the brightness everywhere after, where the shift uncovered pixels too.
    np.testing.assert_allclose(pixels, 255 * drawn["brightness"], atol=1)
