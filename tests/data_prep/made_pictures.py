"""Pictures put together byte by byte, as no encoder would: bombs, and headers that lie."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from PIL import Image

from tests.data_prep.pictures_of import encoded

# 8 x 8 grey, the left half black and the right half 200 at quality 50; no library here writes arithmetic coding.
ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeX"
    "BkeFxlZ2P/yQALCAAIAAgBAREA/8wABgAQEAX/2gAIAQEAAD8A/otEHZWJ2Kf6QP/Z"
)


def photo(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Smooth colours with a little noise: an RGB picture that JPEG keeps nearly as it is."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 40 + 2 * channel) + np.cos(y / (25 + 9 * channel)) for channel in range(3)]
    values = 128 + 50 * np.stack(waves, axis=-1) + random.normal(0, 2, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, data: bytes, *, before: bytes = b"", bits: int = 8, colour: int = 2, interlaced: int = 0
) -> bytes:
    """data: the content of IDAT, deflated; before: whole chunks in front of it."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    parts = (png_chunk(b"IHDR", header), before, png_chunk(b"IDAT", data), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(megabytes: int) -> bytes:
    """So many megabytes of zeros, deflated to a thousandth; without the checksum at the end."""
    deflate = zlib.compressobj(9)
    first, other = (deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + other * (megabytes - 1)


def tiff(tags: dict[int, int], data: bytes = b"", *, next_directory: int = 0) -> bytes:
    """One directory at byte 8 with these tags, all of type LONG and one value; `data` stands at byte 200."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", next_directory)
    return head.ljust(200, b"\0") + data


GREY_TIFF = {256: 10, 257: 10, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 10, 279: 100}
"""10 x 10 pixels in one strip of 100 bytes at byte 200."""


def frames(content: bytes, kind: int) -> list[int]:
    """Where the segments with this marker begin in a JPEG, as far as its first scan."""
    found, position = [], 2
    while content[position + 1] != 0xDA:
        if content[position + 1] == kind:
            found.append(position)
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return [*found, position] if kind == 0xDA else found


def animation(kind: str) -> bytes:
    """Three frames of 12 x 10: red, green, blue."""
    first, *others = [Image.new("RGB", (12, 10), colour) for colour in ("red", "lime", "blue")]
    return encoded(first, kind, save_all=True, append_images=others, duration=100)
