"""Format and size of an encoded picture from its first bytes, without decoding: what a download is checked by.

Whether the pixels behind the header are there is for `limoe prep pack` to find out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

JPEG_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
TIFF_WIDTH, TIFF_HEIGHT, TIFF_SHORT, TIFF_LONG = 256, 257, 3, 4
LARGEST_TIFF_ENTRIES = 4_096
MOST_JPEG_MARKERS = 10_000
"""Before the frame header: ten million of them would keep the thread that lands everything busy for seconds."""


@dataclass(frozen=True, slots=True)
class Header:
    suffix: str
    """Of its file: jpg, png, webp, gif, bmp or tiff."""
    width: int
    height: int


def read_header(encoded: bytes) -> Header:
    """Raises ValueError with the reason where it is none of the formats, or the header is cut off or broken."""
    read = _reader(encoded)
    if read is None:
        raise ValueError(f"begins with {encoded[:12]!r}")
    suffix, size = read
    try:
        width, height = size(encoded)
    except (struct.error, IndexError):
        raise ValueError(f"the header of the {suffix} is cut off") from None
    if width < 1 or height < 1:
        raise ValueError(f"the header of the {suffix} declares {width} x {height} pixels")
    return Header(suffix, width, height)


def _reader(encoded: bytes):  # type: ignore[no-untyped-def]
    if encoded.startswith(b"\xff\xd8\xff"):
        return "jpg", _jpeg
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", _png
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return "webp", _webp
    if encoded.startswith((b"GIF87a", b"GIF89a")):
        return "gif", lambda data: struct.unpack_from("<HH", data, 6)
    if encoded.startswith((b"II*\0", b"MM\0*")):
        return "tiff", _tiff
    # Two letters are little proof: the reserved bytes of the header must be zero too, and the header one that is known.
    if encoded.startswith(b"BM") and encoded[6:10] == bytes(4) and encoded[14:18] in _BMP_HEADERS:
        return "bmp", _bmp
    return None


_BMP_HEADERS = tuple(struct.pack("<I", size) for size in (12, 40, 52, 56, 64, 108, 124))


def _jpeg(data: bytes) -> tuple[int, int]:
    at = 2
    for _ in range(MOST_JPEG_MARKERS):
        if data[at] != 0xFF:
            raise ValueError("the header of the jpg is broken")
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in JPEG_NO_LENGTH:
            at += 2
        elif marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        elif marker in (0xD9, 0xDA):
            raise ValueError("the jpg has no frame header")
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            # A length counts itself: below 2 it would let a file lead us round in circles.
            if length < 2:
                raise ValueError("the header of the jpg is broken")
            at += 2 + length
    raise ValueError(f"the header of the jpg has more than {MOST_JPEG_MARKERS} markers")


def _png(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise ValueError("the png does not begin with its header")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise ValueError("the header of the webp is broken")
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        if data[20] != 0x2F:
            raise ValueError("the header of the webp is broken")
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        return low_width + (high_width << 16) + 1, low_height + (high_height << 16) + 1
    raise ValueError(f"the webp begins with {kind!r}")


def _bmp(data: bytes) -> tuple[int, int]:
    (size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if size == 12 else "<ii", data, 18)
    # A negative height says that the rows come from the top.
    return width, abs(height)


def _tiff(data: bytes) -> tuple[int, int]:
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, at)
    found: dict[int, int] = {}
    for number in range(min(entries, LARGEST_TIFF_ENTRIES)):
        entry = at + 2 + 12 * number
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in (TIFF_WIDTH, TIFF_HEIGHT) and kind in (TIFF_SHORT, TIFF_LONG):
            (found[tag],) = struct.unpack_from(order + ("H" if kind == TIFF_SHORT else "I"), data, entry + 8)
    if len(found) < 2:
        raise ValueError("the tiff declares no size")
    return found[TIFF_WIDTH], found[TIFF_HEIGHT]
