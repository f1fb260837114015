"""Refusals before decoding: what the first bytes of a picture declare, and caps that keep a bomb from being unpacked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from limoe_dist.data.arrow import Row

MAX_ENCODED_BYTES = 64 << 20
MAX_PIXELS = 32 << 20
"""100 MB as decoded RGB; about 5800 x 5800."""

_MAX_JPEG_SEGMENTS = 1000
# Start of frame, baseline to arithmetic; 0xC4, 0xC8 and 0xCC are other segments.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def refusal(row: Row) -> str | None:
    """Why this row is not worth a try, or None. Looks at its columns and at the picture's header, decodes nothing."""
    if not row.captions:
        return "no caption, or only blank ones"
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
    """Width and height in pixels that the header of a PNG, JPEG or WebP declares. Raises ValueError with the reason."""
    head = image[:32].tobytes()
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        size = _png(head)
    elif head.startswith(b"\xff\xd8\xff"):
        size = _jpeg(image)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        size = _webp(head)
    else:
        raise ValueError("neither PNG nor JPEG nor WebP" if len(image) else "no picture")
    if not size[0] or not size[1]:
        raise ValueError(f"a picture of {size[0]} x {size[1]} pixels")
    return size


def _png(head: bytes) -> tuple[int, int]:
    if len(head) < 24 or head[12:16] != b"IHDR":
        raise ValueError("truncated PNG: no header chunk")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _jpeg(image: npt.NDArray[np.uint8]) -> tuple[int, int]:
    at, end = 2, len(image)
    for _ in range(_MAX_JPEG_SEGMENTS):
        while at < end and image[at] == 0xFF:  # a marker may be padded with any number of 0xFF
            at += 1
        if at + 8 > end:
            break
        marker = int(image[at])
        if marker in _JPEG_FRAMES:
            frame = image[at + 4 : at + 8].tobytes()
            return int.from_bytes(frame[2:], "big"), int.from_bytes(frame[:2], "big")
        if marker == 0xDA:  # the scan
            break
        at += 1 + int.from_bytes(image[at + 1 : at + 3].tobytes(), "big")
    raise ValueError("truncated JPEG: no frame header")


def _webp(head: bytes) -> tuple[int, int]:
    kind = head[12:16]
    if len(head) < 30:
        raise ValueError("truncated WebP: no frame header")
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    raise ValueError("a WebP without a picture")
