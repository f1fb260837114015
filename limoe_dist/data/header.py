"""Refusals before decoding: what a picture's header declares, and caps that keep a bomb from being unpacked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from nvidia.nvimgcodec import CodeStream

from limoe_dist.data.arrow import Row

MAX_ENCODED_BYTES = 64 << 20
MAX_PIXELS = 32 << 20
"""100 MB as decoded RGB; about 5800 x 5800."""

NO_CAPTION = "no caption, or only blank ones"
NO_PICTURE = "no picture"


def refusal(row: Row) -> str | None:
    """Why this row cannot be trained on, or None. Looks at its columns and at the picture's header, decodes nothing."""
    if not row.captions:
        return NO_CAPTION
    return picture_refusal(row)


def picture_refusal(row: Row) -> str | None:
    """As `refusal`, without a look at the captions."""
    if len(row.image) > MAX_ENCODED_BYTES:
        return f"{len(row.image)} encoded bytes, more than {MAX_ENCODED_BYTES}"
    try:
        width, height = declared_size(row.image)
    except ValueError as error:
        return str(error)
    for pixels in (row.width * row.height, width * height):
        if pixels > MAX_PIXELS:
            return f"{pixels} pixels, more than {MAX_PIXELS}"
    return None


def declared_size(image: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Width and height in pixels that the header of a PNG, JPEG or WebP declares; some microseconds.

    Raises ValueError with the reason for what the decoder's own parser refuses. Only what passes here may be decoded:
    DALI 2.4 ends the *process* with a segmentation fault, sooner or later, where a header in a batch cannot be parsed.
    """
    _check_format(image)
    try:
        stream = CodeStream(image)
        width, height = int(stream.width), int(stream.height)
    except RuntimeError:
        raise ValueError("damaged or truncated: its structure cannot be read") from None
    if not width or not height:
        raise ValueError(f"a picture of {width} x {height} pixels")
    if not _ends(image):
        raise ValueError("damaged or truncated: a JPEG without its end")
    return width, height


def _ends(image: npt.NDArray[np.uint8]) -> bool:
    """Whether a JPEG has its end: a decoder that wants a part of it alone would not miss what is cut off below.

    No scan may begin behind it, since a thumbnail in a header has an end of its own; within a scan neither marker
    occurs. The other formats' structure is read by the decoder's parser.
    """
    content = image.tobytes()
    if not content.startswith(b"\xff\xd8"):
        return True
    end = content.rfind(b"\xff\xd9")
    return end > 0 and content.find(b"\xff\xda", end) < 0


def _check_format(image: npt.NDArray[np.uint8]) -> None:
    """Fewer formats than the decoder knows: each is a parser that a hostile file could reach."""
    head = image[:12].tobytes()
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (head[:4] == b"RIFF" and head[8:] == b"WEBP"):
        return
    raise ValueError("neither PNG nor JPEG nor WebP" if len(image) else NO_PICTURE)
