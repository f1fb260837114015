"""One picture, from bytes that nobody vouches for to bytes that every decoder reads the same way.

Kept as it is: an 8-bit RGB or grey JPEG or PNG without alpha, rotation or animation. Anything else that Pillow decodes
(alpha, palette, CMYK, 16 bit, EXIF rotation; WebP, GIF, BMP, TIFF) becomes an 8-bit RGB PNG: turned upright, the first
frame, alpha laid on white. DALI would drop alpha, misread CMYK and not turn.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageFile, ImageOps

# A named list: Pillow's other formats include some that start programs.
LARGEST_KEPT_BYTES = 64 << 20
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXIF_ORIENTATION = 0x0112
PNG_BIT_DEPTH = slice(24, 25)


@dataclass(frozen=True)
class Caps:
    max_bytes: int
    """Largest encoded picture."""
    max_pixels: int
    """Largest width * height; read from the header, before any pixel is decoded."""


@dataclass(frozen=True)
class Picture:
    encoded: bytes
    width: int
    height: int
    sha256: str
    converted: bool


def read_picture(file: Path, caps: Caps) -> Picture:
    """Reads, checks and where needed converts one picture, decoding it whole.

    Raises ValueError with the reason where it is too large, of another format, truncated or broken.
    """
    with file.open("rb") as opened:
        encoded = opened.read(caps.max_bytes + 1)
    return check_picture(encoded, caps)


def check_picture(encoded: bytes, caps: Caps) -> Picture:
    """As read_picture, from bytes that are in memory already."""
    if len(encoded) > caps.max_bytes:
        raise ValueError(f"is larger than {caps.max_bytes} bytes")
    try:
        header = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {caps.max_pixels} pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"is no picture in {', '.join(FORMATS)}") from None
    except Exception as error:
        raise ValueError(f"has a broken header: {error}") from None
    if header.width * header.height > caps.max_pixels:
        raise ValueError(f"has {header.width} x {header.height} pixels, more than {caps.max_pixels}")
    try:
        image, converted = _decoded(header, encoded)
    except Exception as error:  # Pillow's decoders raise of every kind on broken bytes, and none may stop the run
        raise ValueError(f"cannot be decoded: {error}") from None
    kept = _png(image) if converted else encoded
    if len(kept) > LARGEST_KEPT_BYTES:
        raise ValueError(f"becomes a PNG of {len(kept)} bytes, more than the {LARGEST_KEPT_BYTES} that training reads")
    return Picture(kept, image.width, image.height, hashlib.sha256(kept).hexdigest(), converted)


def limit_pillow(caps: Caps) -> None:
    """Sets Pillow's limits for this process: the pixels of any picture, and that truncated ones fail to decode."""
    Image.MAX_IMAGE_PIXELS = caps.max_pixels
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    # Pillow warns above its limit and raises above twice that; check_picture raises at once.
    warnings.filterwarnings("ignore", module="PIL")


def _decoded(image: Image.Image, encoded: bytes) -> tuple[Image.Image, bool]:
    """(the picture, whether it differs from its bytes); every pixel has been decoded."""
    if image.format == "PNG":
        image.verify()  # checksums of all chunks; the picture must be opened anew after it
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    image.load()
    plain = _plain(image, encoded)
    return (image, False) if plain else (_rgb_on_white(image), True)


def _plain(image: Image.Image, encoded: bytes) -> bool:
    deep = image.format == "PNG" and encoded[PNG_BIT_DEPTH] == b"\x10"
    return (
        image.format in ("JPEG", "MPO", "PNG")
        and image.mode in ("RGB", "L")
        and not deep
        and "transparency" not in image.info
        and (image.format != "PNG" or not getattr(image, "is_animated", False))
        and image.getexif().get(EXIF_ORIENTATION, 1) == 1
    )


def _rgb_on_white(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        upright = _eight_bits(upright)
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return upright.convert("RGB")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8: Pillow's own conversion cuts everything above 255 to white."""
    import numpy as np

    values = np.asarray(image.convert("I"), dtype=np.int64)
    return Image.fromarray((values.clip(0, 65_535) // 257).astype(np.uint8))
