"""One picture, from bytes that nobody vouches for to pixels, or to bytes that every decoder reads the same way.

Kept as it is: an 8-bit RGB or grey JPEG or PNG without alpha, rotation or animation; only what follows its end marker
(an archive, a second picture) is cut off. All else that is decoded becomes 8-bit RGB by these rules:

- alpha, a transparent colour, grey with alpha: laid on white            - palette: its colours
- EXIF orientation 2 to 8: turned upright; EXIF that cannot be read: as stored, and written anew without it
- 16 bits a sample: scaled to 8, rounded down                            - 1 bit: black and white
- CMYK and YCCK: taken as inverted, as Adobe writes them, with its marker or without; no profile, the plain formula
- colour profiles (ICC) and gamma: ignored, and dropped where a picture is written anew
- animated GIF, WebP and PNG, TIFF of many pages, MPO: the first frame; for a PNG its default image
- progressive JPEG: kept; arithmetic-coded JPEG: written anew, since many decoders lack it

Refused: what is damaged in a way that its decoder can tell (cut off anywhere, wrong checksums, a warning of libjpeg),
what is larger than the caps, by its header; lossless, hierarchical and 12-bit JPEG, and JPEG of unusual subsampling
(other than 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1, 4:4:1); samples of 32 bits; JPEG in TIFF, whose damage goes unreported;
other formats. A file is what its first bytes say: its name does not count.
DALI would drop alpha, misread CMYK and not turn.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from data_prep.imaging.decoding import (
    FORMATS,
    TURNS,
    Caps,
    Opened,
    decoded,
    decoding,
    is_plain,
    jpeg_pixels,
    limit_pillow,
    open_picture,
    orientation,
    turned,
    upright_size,
)

__all__ = ["FORMATS", "Caps", "Picture", "check_picture", "limit_pillow", "read_picture", "rgb_pixels"]

LARGEST_KEPT_BYTES, LARGEST_KEPT_PIXELS = 64 << 20, 32 << 20
"""Of a stored picture: what training reads."""


@dataclass(frozen=True)
class Picture:
    encoded: bytes
    width: int
    height: int
    sha256: str
    converted: bool
    """Written anew by one of the rules above; to be made smaller alone does not count."""
    original_width: int = 0
    """Upright, as it came; 0: there is no picture."""
    original_height: int = 0


def read_picture(file: Path, caps: Caps) -> Picture:
    """Reads, checks and where needed converts one picture, decoding it whole.

    Raises ValueError with the reason where it is too large, of another format, truncated or broken.
    """
    with file.open("rb") as opened:
        encoded = opened.read(caps.max_bytes + 1)
    return check_picture(encoded, caps)


def check_picture(encoded: bytes, caps: Caps) -> Picture:
    """As read_picture, from bytes that are in memory already."""
    return checked(open_picture(encoded, caps))


def rgb_pixels(encoded: bytes, caps: Caps, *, shorter_side: int = 0) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8, upright, by the rules above; may be read-only.

    shorter_side: in pixels; a JPEG may then be decoded at 1/2, 1/4 or 1/8, its shorter side at least this long.
    Raises ValueError as check_picture does.
    """
    opened = open_picture(encoded, caps)
    if opened.fast and shorter_side > 0:
        pixels = jpeg_pixels(opened, shorter_side, shorter_side, colour="RGB")
    elif opened.fast:
        pixels = jpeg_pixels(opened, colour="RGB")
    else:
        pixels = np.asarray(decoded(opened).convert("RGB"))
    turn = TURNS.get(orientation(opened) or 1)
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def checked(opened: Opened) -> Picture:
    """The picture kept or converted, after every pixel has been decoded. Raises ValueError with the reason."""
    if opened.fast:
        with decoding():
            # An eighth of the size, grey: all entropy-coded data is read, little of it becomes pixels.
            simplejpeg.decode_jpeg(opened.encoded, "GRAY", min_height=1, min_width=1, strict=True)
    image = None if opened.fast else decoded(opened)
    turn = orientation(opened)
    width, height = upright_size(opened)
    if is_plain(opened, turn):
        return picture_of(opened.encoded, (width, height), converted=False, original=(width, height))
    content = png_bytes(turned(image or decoded(opened), turn).convert("RGB"))
    return picture_of(content, (width, height), converted=True, original=(width, height))


def picture_of(encoded: bytes, size: tuple[int, int], *, converted: bool, original: tuple[int, int]) -> Picture:
    """Raises ValueError where training would refuse it, since the caps may be larger than what training reads."""
    width, height = size
    if len(encoded) > LARGEST_KEPT_BYTES:
        raise ValueError(f"is stored with {len(encoded)} bytes, more than the {LARGEST_KEPT_BYTES} that training reads")
    if width * height > LARGEST_KEPT_PIXELS:
        raise ValueError(
            f"is stored with {width} x {height} pixels, more than the {LARGEST_KEPT_PIXELS} that training reads"
        )
    return Picture(encoded, *size, hashlib.sha256(encoded).hexdigest(), converted, *original)


def png_bytes(image: Image.Image) -> bytes:
    """Raises ValueError where the PNG is larger than training reads."""
    file = io.BytesIO()
    image.save(file, "PNG", icc_profile=None)
    if file.tell() > LARGEST_KEPT_BYTES:
        raise ValueError(
            f"becomes a PNG of {file.tell()} bytes, more than the {LARGEST_KEPT_BYTES} that training reads"
        )
    return file.getvalue()
