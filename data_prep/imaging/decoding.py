"""A stranger's bytes to pixels: the header against the caps first, then all pixels or a reason, never a part of them.

The rules of what becomes what are told in data_prep/imaging/pictures.py.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile

from data_prep.imaging import jpeg, png

# A named list: Pillow's other formats include some that start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXIF_ORIENTATION = 0x0112
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of an EXIF orientation upright."""
_JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
"""By components; those of three are YCbCr or RGB, which libjpeg-turbo tells apart."""
_TILE_WIDTH, _TILE_HEIGHT, _PLANAR = 322, 323, 284
_MARGIN = 1024  # a tile may be larger than a small picture


@dataclass(frozen=True)
class Caps:
    max_bytes: int
    """Largest encoded picture."""
    max_pixels: int
    """Largest width * height; read from the header, before any pixel is decoded."""


@dataclass(frozen=True)
class Opened:
    """A picture whose header is within the caps and whose pixels have not been decoded."""

    encoded: bytes
    """Without what followed the end of a JPEG or PNG."""
    caps: Caps
    jpeg: jpeg.Layout | None
    """Of a JPEG."""
    png: png.Layout | None
    """Of a PNG."""

    @cached_property
    def image(self) -> Image.Image:
        """Read lazily by Pillow, as stored: not turned. Raises ValueError for a header that it cannot read.

        Most JPEGs do without it: what is asked of their headers the walk through their segments has found.
        """
        return _pillow_header(self.encoded, self.caps)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored."""
        return (self.jpeg.width, self.jpeg.height) if self.jpeg else self.image.size

    @property
    def mode(self) -> str:
        """Pillow's name for it."""
        return _JPEG_MODES.get(self.jpeg.components, "") if self.jpeg else self.image.mode

    @property
    def fast(self) -> bool:
        """Whether libjpeg-turbo gives its pixels as they are to be: a grey or RGB JPEG."""
        return self.jpeg is not None and self.mode in ("RGB", "L")


def open_picture(encoded: bytes, caps: Caps) -> Opened:
    """Reads the header and walks a JPEG's or PNG's structure; decodes no pixel.

    Raises ValueError with the reason where the caps or the structure refuse it.
    """
    if len(encoded) > caps.max_bytes:
        raise ValueError(f"is larger than {caps.max_bytes} bytes")
    found_jpeg = found_png = None
    with decoding():
        if encoded.startswith(jpeg.SIGNATURE):
            found_jpeg = jpeg.layout(encoded)
            encoded = encoded[: found_jpeg.end]
        elif encoded.startswith(png.SIGNATURE):
            found_png = png.layout(encoded)
            encoded = encoded[: found_png.end]
        elif encoded.startswith(png.GIF_SIGNATURES):
            png.check_gif(encoded)
    if found := found_jpeg or found_png:
        _check_pixels(found.width, found.height, caps)
    opened = Opened(encoded, caps, found_jpeg, found_png)
    if not opened.fast:
        _check_pixels(opened.image.width, opened.image.height, caps)
        if opened.image.format == "TIFF":
            _check_tiff(opened.image, caps)
    return opened


def limit_pillow(caps: Caps) -> None:
    """Sets Pillow's limits for this process: the pixels of any picture, and that truncated ones fail to decode."""
    Image.MAX_IMAGE_PIXELS = caps.max_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    # Pillow warns above its limit and raises above twice that; check_picture raises at once.
    warnings.filterwarnings("ignore", module="PIL")


def is_plain(opened: Opened, turn: int | None) -> bool:
    """Whether its bytes may be kept: every decoder reads them alike. Call it after the picture has been decoded."""
    if turn != 1 or opened.mode not in ("RGB", "L"):
        return False
    if opened.jpeg:
        return opened.jpeg.frame in jpeg.FRAMES
    if "transparency" in opened.image.info:
        return False
    return opened.png is not None and opened.png.bits <= 8 and not opened.png.animated


def orientation(opened: Opened) -> int | None:
    """The EXIF orientation, 1 where there is none; None where the EXIF cannot be read. May decode a PNG."""
    if opened.jpeg and not opened.jpeg.app1:
        return 1
    try:
        return int(opened.image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF raises of every kind
        return None


def upright_size(opened: Opened) -> tuple[int, int]:
    """(width, height)"""
    width, height = opened.size
    return (height, width) if (orientation(opened) or 1) in (5, 6, 7, 8) else (width, height)


def turned(image: Image.Image, orientation: int | None) -> Image.Image:
    turn = TURNS.get(orientation or 1)
    return image if turn is None else image.transpose(turn)


def jpeg_pixels(opened: Opened, width: int = 0, height: int = 0, *, colour: str) -> npt.NDArray[np.uint8]:
    """(H, W, 3) for colour "RGB", (H, W, 1) for "GRAY"; as stored, not turned. Raises ValueError for any damage.

    width, height: where not 0, it is decoded at the smallest of 1/8, 1/4, 1/2 and 1 that is at least as large.
    """
    if width and height:
        # libjpeg-turbo has 3/8, 5/8 and 7/8 too: they are no faster than the next half, and fine stripes alias.
        across, down = opened.size
        part = next(part for part in (8, 4, 2, 1) if part == 1 or (across >= part * width and down >= part * height))
        width, height = -(-across // part), -(-down // part)
    with decoding():
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
            opened.encoded, colour, min_height=height, min_width=width, min_factor=1, strict=True
        )
    return pixels


def decoded(opened: Opened, width: int = 0, height: int = 0) -> Image.Image:
    """All pixels as 8-bit RGB or L without alpha, not turned. A JPEG may be smaller, see jpeg_pixels."""
    if opened.fast:
        if opened.mode == "L":
            return Image.fromarray(jpeg_pixels(opened, width, height, colour="GRAY")[..., 0])
        return Image.fromarray(jpeg_pixels(opened, width, height, colour="RGB"))
    image = opened.image
    with decoding():
        if opened.jpeg:  # CMYK: Pillow converts it, but does not report damage
            simplejpeg.decode_jpeg(opened.encoded, "CMYK", min_height=1, min_width=1, strict=True)
        if opened.png:
            png.check_data(opened.encoded, opened.png)
        image.load()
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info
        return image if plain else _rgb_on_white(image)


@contextmanager
def decoding() -> Iterator[None]:
    """Decoders raise of every kind on broken bytes, and none may stop the run."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def _pillow_header(encoded: bytes, caps: Caps) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {caps.max_pixels} pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"is no picture in {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ValueError(f"has a broken header: {error}") from None


def _check_pixels(width: int, height: int, caps: Caps) -> None:
    if width * height > caps.max_pixels:
        raise ValueError(f"has {width} x {height} pixels, more than {caps.max_pixels}")


def _check_tiff(image: Any, caps: Caps) -> None:
    """Raises ValueError for a TIFF whose tiles are larger than the cap, or whose decoder would not report damage.

    Of pixels that are not compressed Pillow reads the strips or tiles that are listed, and leaves all else black.
    """
    tags = image.tag_v2
    try:
        tile = int(tags.get(_TILE_WIDTH, 1)) * int(tags.get(_TILE_HEIGHT, 1))
    except (TypeError, ValueError):
        raise ValueError("has a broken header: the size of its tiles is no number") from None
    if tile > caps.max_pixels + _MARGIN * _MARGIN:
        raise ValueError(f"has tiles of {tile} pixels, more than {caps.max_pixels}")
    if "jpeg" in str(image.info.get("compression", "")):
        raise ValueError("is a JPEG inside of a TIFF, whose damage goes unreported")
    by_libtiff = any(tile.codec_name == "libtiff" for tile in image.tile)
    planes = len(image.getbands()) if tags.get(_PLANAR) == 2 and not by_libtiff else 1
    listed = sum((right - left) * (low - top) for _, (left, top, right, low), *_ in image.tile)
    if not listed >= planes * image.width * image.height:
        raise ValueError("lacks strips or tiles: they do not cover it")


def _rgb_on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("has samples of 32 bits, whose range is not stated")
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8: Pillow's own conversion cuts everything above 255 to white."""
    values = np.asarray(image)
    shades = (values // 257).astype(np.uint8)
    clear = image.info.get("transparency")
    return Image.fromarray(shades if clear is None else np.where(values == clear, 255, shades).astype(np.uint8))
