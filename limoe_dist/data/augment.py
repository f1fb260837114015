"""What is done to each picture, as arrays: a function of (seed, position) and the image settings, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from limoe_dist.config.schema import Image
from limoe_dist.data.philox import uniforms

Floats = npt.NDArray[np.float32]

# Which draw of a position serves what. Append only: another order changes every picture of a run that is resumed.
_DRAWS = (
    "caption",
    "crop_area",
    "crop_aspect",
    "crop_y",
    "crop_x",
    "flip",
    "rotate",
    "scale",
    "translate_x",
    "translate_y",
    "brightness",
    "contrast",
    "saturation",
    "hue",
)


@dataclass(frozen=True)
class AugmentParams:
    """The parameters of n pictures."""

    anchor: Floats
    """(n, 2) top left corner of the crop as (y, x), shares of height and width."""
    shape: Floats
    """(n, 2) extent of the crop as (y, x), shares of height and width."""
    matrix: Floats
    """(n, 2, 3) from (x, y) in the result to (x, y) in the resized picture, in pixels; (0, 0) is the outer corner."""
    mirror: npt.NDArray[np.int32]
    """(n,) 1 where the picture is flipped left to right."""
    brightness: Floats
    contrast: Floats
    saturation: Floats
    """(n,) factors; 1 changes nothing."""
    hue: Floats
    """(n,) degrees; 0 changes nothing."""
    caption: npt.NDArray[np.float64]
    """(n,) in [0, 1): see `caption_index`."""

    def take(self, indices: Sequence[int]) -> AugmentParams:
        """The parameters of some of the pictures, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return AugmentParams(**{name: value[chosen] for name, value in vars(self).items()})


def augment_params(positions: npt.NDArray[np.int64], image: Image, *, seed: int) -> AugmentParams:
    """The training parameters at these positions, (n,) int64. A setting of no effect gives exactly the identity."""
    u = dict(zip(_DRAWS, uniforms(positions, seed=seed, draws=len(_DRAWS)), strict=True))
    anchor, shape = _crop(u, image.min_crop_area)
    return AugmentParams(
        anchor=anchor,
        shape=shape,
        matrix=_affine(u, image),
        mirror=(u["flip"] < image.flip).astype(np.int32),
        brightness=_factor(u["brightness"], image.brightness),
        contrast=_factor(u["contrast"], image.contrast),
        saturation=_factor(u["saturation"], image.saturation),
        hue=_around_zero(u["hue"], image.hue_degrees).astype(np.float32),
        caption=u["caption"],
    )


def identity_params(num: int) -> AugmentParams:
    """Parameters that keep the whole picture as it is, for evaluation; the caption is a row's first."""
    return AugmentParams(
        anchor=np.zeros((num, 2), dtype=np.float32),
        shape=np.ones((num, 2), dtype=np.float32),
        matrix=np.tile(np.eye(2, 3, dtype=np.float32), (num, 1, 1)),
        mirror=np.zeros(num, dtype=np.int32),
        brightness=np.ones(num, dtype=np.float32),
        contrast=np.ones(num, dtype=np.float32),
        saturation=np.ones(num, dtype=np.float32),
        hue=np.zeros(num, dtype=np.float32),
        caption=np.zeros(num),
    )


def caption_index(draw: float, num_captions: int) -> int:
    """Which of a row's captions a draw in [0, 1) stands for; each with the same probability."""
    return min(int(draw * num_captions), num_captions - 1)


def crop_with_pixels(anchor: Floats, shape: Floats, short_sides: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """The crops, widened where they are so small that no pixel of the picture would be left.

    An empty crop cannot be resized, and whether a row is bad must not depend on the position that reads it.
    short_sides: (n,) pixels; the smaller of both, since a picture may be turned by its EXIF orientation.
    """
    # Both ends of a crop are rounded: an extent of one pixel leaves one. The hundredth is for float32.
    shape = np.maximum(shape, np.minimum(1.01 / short_sides, 1.0)[:, None]).astype(np.float32)
    return np.minimum(anchor, 1.0 - shape).astype(np.float32), shape


def has_affine(image: Image) -> bool:
    return bool(image.rotate_degrees or image.scale or image.translate)


def has_colour(image: Image) -> bool:
    return bool(image.brightness or image.contrast or image.saturation or image.hue_degrees)


def _crop(u: dict[str, npt.NDArray[np.float64]], min_area: float) -> tuple[Floats, Floats]:
    """Area uniform in [min_area, 1]; aspect log-uniform in 3/4 to 4/3.

    The aspect is relative to the picture's own, since evaluation, too, squares whole pictures.
    """
    area = 1.0 - (1.0 - min_area) * u["crop_area"]
    aspect = np.exp(_around_zero(u["crop_aspect"], math.log(4 / 3)))
    # A side longer than the picture's is cut and the other kept: the crop gets smaller than its area, never larger.
    height, width = np.minimum(np.sqrt(area / aspect), 1.0), np.minimum(np.sqrt(area * aspect), 1.0)
    if min_area == 1.0:
        height, width = np.ones_like(area), np.ones_like(area)
    shape = np.stack([height, width], axis=1)
    anchor = np.stack([u["crop_y"], u["crop_x"]], axis=1) * (1.0 - shape)
    return anchor.astype(np.float32), shape.astype(np.float32)


def _affine(u: dict[str, npt.NDArray[np.float64]], image: Image) -> Floats:
    """Turn, zoom and shift about the centre c: result p' = zoom * R (p - c) + c + shift; the matrix takes p' to p."""
    angle = np.radians(_around_zero(u["rotate"], image.rotate_degrees))
    zoom = np.exp(_around_zero(u["scale"], math.log1p(image.scale)))
    centre = image.size / 2
    shift_x, shift_y = (_around_zero(u[f"translate_{axis}"], image.translate) * image.size for axis in "xy")
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    # p = R^-1 (p' - c - shift) / zoom + c, with R^-1 = [[cos, sin], [-sin, cos]].
    from_x, from_y = centre + shift_x, centre + shift_y
    rows = [cos, sin, centre - cos * from_x - sin * from_y, -sin, cos, centre + sin * from_x - cos * from_y]
    return np.stack(rows, axis=1).reshape(-1, 2, 3).astype(np.float32)


def _factor(u: npt.NDArray[np.float64], width: float) -> Floats:
    return (1.0 + _around_zero(u, width)).astype(np.float32)


def _around_zero(u: npt.NDArray[np.float64], width: float) -> npt.NDArray[np.float64]:
    return (2.0 * u - 1.0) * width
