"""The augmentation's own quantities, recovered from the numbers that the decoder gets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from limoe_dist.config.schema import Image
from limoe_dist.data.augment import AugmentParams, augment_params

SIZE = 48
ALL = Image(
    size=SIZE,
    patch=12,
    min_crop_area=0.25,
    flip=0.3,
    rotate_degrees=25.0,
    scale=0.5,
    translate=0.2,
    brightness=0.4,
    contrast=0.3,
    saturation=0.2,
    hue_degrees=40.0,
)


def recovered(params: AugmentParams, size: int = SIZE) -> dict[str, npt.NDArray[np.float64]]:
    """Recovered quantities by name, (n,) each.

    The matrix takes p' of the result to p = L p' + t of the source; the picture was turned by `angle` (degrees), made
    `zoom` times as large about its centre c and then shifted: p' = zoom R (p - c) + c + shift.
    position_y, position_x: the crop's corner as a share of what the crop leaves over; nan where that is nothing.
    """
    (height, width), (top, left) = params.shape.astype(float).T, params.anchor.astype(float).T
    linear, offset = params.matrix[:, :, :2].astype(float), params.matrix[:, :, 2].astype(float)
    forward = np.linalg.inv(linear)
    centre = np.full(2, size / 2)
    # p' of p = c is L^-1 (c - t), and is c + shift.
    shift = (forward @ (centre - offset)[..., None])[..., 0] - centre
    with np.errstate(divide="ignore", invalid="ignore"):
        position_y, position_x = (
            np.where(side < 1, near / (1 - side), np.nan) for side, near in ((height, top), (width, left))
        )
    return {
        "area": height * width,
        "log_aspect": np.log(width / height),
        "height": height,
        "width": width,
        "position_y": position_y,
        "position_x": position_x,
        "flip": params.mirror.astype(float),
        # R = [[cos, -sin], [sin, cos]].
        "angle": np.degrees(np.arctan2(forward[:, 1, 0], forward[:, 0, 0])),
        "log_zoom": np.log(np.linalg.det(forward)) / 2,
        "shift_x": shift[:, 0] / size,
        "shift_y": shift[:, 1] / size,
        "brightness": params.brightness.astype(float),
        "contrast": params.contrast.astype(float),
        "saturation": params.saturation.astype(float),
        "hue": params.hue.astype(float),
        "caption": params.caption,
    }


def drawn(positions: npt.NDArray[np.int64], image: Image = ALL, *, seed: int = 0) -> dict[str, npt.NDArray[np.float64]]:
    return recovered(augment_params(positions, image, seed=seed), image.size)
