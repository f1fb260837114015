"""Pictures made smaller for training: decoded at a fraction of their size, resized to the pixel, encoded anew.

A JPEG is decoded by libjpeg-turbo at 1/2, 1/4 or 1/8 while that is at least as large as wanted (its inverse DCT gives
fewer pixels, which is faster than all of them), then Pillow's bicubic filter, antialiased, takes it to the exact size.
The library was chosen by measurement: tests/benchmarks/resize.py. The same bytes and settings give the same bytes, in
any thread or process; other versions of the libraries may give others, so `versions` belongs into the manifest.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, features

from data_prep.imaging.decoding import Caps, Opened, decoded, is_plain, open_picture, orientation, turned, upright_size
from data_prep.imaging.pictures import Picture, checked, picture_of, png_bytes
from limoe_dist.config.errors import UserError

REDUCING_GAP = 3.0
"""Pillow first averages whole blocks of pixels down to at least so many times the wanted size: for large PNGs."""
SIDE_LIMITS = {"jpeg": 65_535, "webp": 16_383}
"""Pixels that a side can have in the format."""

USUAL_CAPS = Caps(max_bytes=20_000_000, max_pixels=32_000_000)
Encode = Literal["keep", "jpeg", "webp"]


@dataclass(frozen=True)
class Transform:
    caps: Caps = USUAL_CAPS
    size: int = 0
    """Pixels of the shorter side; a picture that is smaller stays as it is; 0: all keep their size."""
    encode: Encode = "keep"
    """keep: bytes stay where they may; a JPEG made smaller is a JPEG again, all else that is written anew a PNG.
    jpeg: everything but a JPEG that may stay as it is is written as JPEG. webp: everything is written as WebP."""
    quality: int = 90
    """1 to 100, of JPEG and WebP that is written."""
    min_side: int = 0
    """Pictures with a shorter side of fewer pixels, as they came, are refused."""
    max_aspect: float = 0.0
    """Pictures whose longer side is more than this many times the shorter are refused; 0: none is."""

    def __post_init__(self) -> None:
        """Raises UserError for a setting out of its range, named as on the command line."""
        if self.size < 0:
            raise UserError(f"--size={self.size}: must be the shorter side in pixels, or 0 to keep the size")
        if self.encode not in ("keep", "jpeg", "webp"):
            raise UserError(f"--encode={self.encode}: must be keep, jpeg or webp")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality={self.quality}: must be from 1 to 100; 90 is usual")
        if self.min_side < 0:
            raise UserError(f"--min-side={self.min_side}: must be a number of pixels, or 0 for no limit")
        if not (self.max_aspect == 0 or self.max_aspect >= 1):
            raise UserError(
                f"--max-aspect={self.max_aspect:g}: must be at least 1, as longer side over shorter, or 0 for no limit"
            )


def transformed(encoded: bytes, settings: Transform) -> Picture:
    """The picture as it is to be stored. Raises ValueError with the reason where it is refused, as check_picture does.

    Its width and height are those of the stored one, upright; original_width and original_height as it came.
    """
    opened = open_picture(encoded, settings.caps)
    _check_shape(opened, settings)
    width, height = opened.size
    target = smaller_size(width, height, settings.size)
    if target is None and (settings.encode == "keep" or (settings.encode == "jpeg" and _stays_jpeg(opened))):
        return checked(opened)
    image = decoded(opened, *target) if target else decoded(opened)
    turn = orientation(opened)
    converted = not is_plain(opened, turn)
    original = upright_size(opened)
    if target:
        image = image.resize(target, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
    image = turned(image, turn)
    return picture_of(_encoded(image, opened, settings), image.size, converted=converted, original=original)


def _stays_jpeg(opened: Opened) -> bool:
    """Whether it is a JPEG whose bytes may be kept: its headers tell, other formats have to be decoded for that."""
    return opened.jpeg is not None and is_plain(opened, orientation(opened))


def smaller_size(width: int, height: int, size: int) -> tuple[int, int] | None:
    """(width, height) with a shorter side of `size` and the longer one rounded; None where it would not be smaller."""
    shorter, longer = min(width, height), max(width, height)
    if not 0 < size < shorter:
        return None
    other = (2 * longer * size + shorter) // (2 * shorter)
    return (size, other) if width <= height else (other, size)


def versions() -> dict[str, str]:
    """Of all that decides the bytes of stored pictures; simplejpeg carries its own libjpeg-turbo."""
    found = {"simplejpeg": version("simplejpeg"), "pillow": version("pillow")}
    for name in ("libjpeg_turbo", "webp", "zlib_ng", "zlib", "libtiff"):
        known = features.version(name)
        if known:
            found[name] = str(known)
    return found


def _check_shape(opened: Opened, settings: Transform) -> None:
    shorter, longer = sorted(opened.size)
    if shorter < settings.min_side:
        raise ValueError(f"has a shorter side of {shorter} pixels, less than {settings.min_side}")
    if settings.max_aspect and longer > settings.max_aspect * shorter:
        raise ValueError(f"is {longer / shorter:.1f} times as long as it is wide, more than {settings.max_aspect:g}")


def _encoded(image: Image.Image, opened: Opened, settings: Transform) -> bytes:
    kind: str = settings.encode
    if kind == "keep" and not opened.jpeg:
        return png_bytes(image)
    kind = "jpeg" if kind == "keep" else kind
    if max(image.size) > SIDE_LIMITS[kind]:
        raise ValueError(f"has a side of {max(image.size)} pixels, more than the {SIDE_LIMITS[kind]} of {kind}")
    return _jpeg(image, settings.quality) if kind == "jpeg" else _webp(image, settings.quality)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    """4:2:0 or grey, the accurate DCT, and the standard Huffman tables: its own would cost a second pass."""
    pixels = np.ascontiguousarray(image)
    if image.mode == "L":
        return simplejpeg.encode_jpeg(pixels[..., None], quality, "GRAY", "Gray", fastdct=False)
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False)


def _webp(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality, method=4, icc_profile=None, exif=b"")
    return file.getvalue()
