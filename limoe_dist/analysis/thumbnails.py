"""Small pictures for a page, from the encoded bytes of strangers: refused or made anew, never passed on."""

from __future__ import annotations

import base64
import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

SIDE = 96
MAX_ENCODED_BYTES = 16 << 20
MAX_PIXELS = 32 << 20
"""Judged by the header, before a pixel is decoded."""
_FORMATS = ("PNG", "JPEG", "WEBP")


def thumbnail(image: npt.NDArray[np.uint8]) -> str | None:
    """A data: address with the picture at most SIDE pixels wide and high, on white; None for what cannot be shown.

    image: (bytes,) uint8, a PNG, JPEG or WebP. What comes out was encoded here: no metadata and no byte of the source.
    """
    if len(image) > MAX_ENCODED_BYTES:
        return None
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs above its own limit; ours is lower, and judged below.
            warnings.simplefilter("ignore")
            return data_address(_small(io.BytesIO(image.tobytes())))
    # Decoders of damaged files raise all kinds: OSError, ValueError, SyntaxError, struct.error, EOFError, ...
    except Exception:
        return None


def _small(encoded: io.BytesIO) -> Image.Image:
    with Image.open(encoded, formats=_FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        # A JPEG is decoded at a fraction of its size; other formats pass over this.
        picture.draft("RGB", (2 * SIDE, 2 * SIDE))
        upright = ImageOps.exif_transpose(picture)
        if upright.mode not in ("RGB", "L"):
            rgba = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        small = upright.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        return small


def encoded(picture: Image.Image) -> tuple[str, bytes]:
    """As "png" or "jpeg", whichever is smaller: drawings and photographs differ."""
    found = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        content = io.BytesIO()
        picture.save(content, kind.upper(), **settings)
        found.append((len(content.getvalue()), kind, content.getvalue()))
    _, kind, smallest = min(found)
    return kind, smallest


def data_address(picture: Image.Image) -> str:
    kind, content = encoded(picture)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
