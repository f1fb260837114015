"""Refusals before decoding: what a picture's header declares, and caps that keep a bomb from being unpacked."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from limoe_dist.data.arrow import Row

MAX_ENCODED_BYTES = 64 << 20
MAX_PIXELS = 32 << 20
"""100 MB as decoded RGB; about 5800 x 5800."""

# A picture of the largest size has some 10,000 chunks; more only cost time.
_MAX_PNG_CHUNKS = 50_000
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
    """Width and height in pixels that the header of a PNG, JPEG or WebP declares.

    Raises ValueError with the reason for anything else, and for a PNG or WebP that ends too early: the decoder would
    refuse it as well, but would fail the whole batch and write to the terminal. A cut JPEG is left to the decoder.
    """
    head = image[:32].tobytes()
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        size = _png(image)
    elif head.startswith(b"\xff\xd8\xff"):
        size = _jpeg(image)
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        size = _webp(head, len(image))
    else:
        raise ValueError("neither PNG nor JPEG nor WebP" if len(image) else "no picture")
    if not size[0] or not size[1]:
        raise ValueError(f"a picture of {size[0]} x {size[1]} pixels")
    return size


def _png(image: npt.NDArray[np.uint8]) -> tuple[int, int]:
    content, at, size = image.data, 8, None
    for _ in range(_MAX_PNG_CHUNKS):
        if at + 12 > len(content):
            raise ValueError("truncated PNG: no end chunk")
        length, kind = struct.unpack_from(">I4s", content, at)
        if size is None:
            if kind != b"IHDR" or length < 13 or len(content) < 24:
                raise ValueError("truncated PNG: no header chunk")
            size = struct.unpack_from(">II", content, 16)
        if kind == b"IEND":
            return size
        at += 12 + length
    raise ValueError(f"a PNG of more than {_MAX_PNG_CHUNKS} chunks")


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


def _webp(head: bytes, encoded_bytes: int) -> tuple[int, int]:
    kind = head[12:16]
    if len(head) < 30 or int.from_bytes(head[4:8], "little") + 8 > encoded_bytes:
        raise ValueError("truncated WebP: shorter than it declares")
    if kind == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    raise ValueError("a WebP without a picture")
