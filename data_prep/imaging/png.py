"""The chunks of a PNG, and the blocks in front of a GIF's first frame, walked before any decoder sees them.

Pillow reads a PNG whose pixels stop early as whole, the rest black, and keeps a note of every chunk: a million empty
ones cost it hundreds of megabytes. Here both are refused, and what lies behind the end is told from the picture.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 10_000
GIF_SIGNATURES = (b"GIF87a", b"GIF89a")
MAX_GIF_PREFACE_BYTES = 1 << 20
"""Comments and other extensions before the first frame; pictures have a few hundred bytes of them."""

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples a pixel, by the colour type of the header."""
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column, first row, columns apart, rows apart."""
_PIECE = 1 << 16


@dataclass(frozen=True)
class Layout:
    width: int
    height: int
    bits: int
    """Of a sample."""
    animated: bool
    pixel_bytes: int
    """What the image data inflates to, filter bytes included."""
    data: tuple[tuple[int, int], ...]
    """Start and end of the content of each IDAT chunk."""
    end: int
    """Bytes up to and with the last chunk; what follows is not part of the picture."""


def layout(encoded: bytes) -> Layout:
    """Walks all chunks up to IEND and checks their checksums; inflates nothing.

    Raises ValueError with the reason where a chunk is cut off or damaged, IEND is missing or there are too many chunks.
    """
    view, position = memoryview(encoded), len(SIGNATURE)
    data: list[tuple[int, int]] = []
    header = b""
    animated = False
    for number in range(MAX_CHUNKS):
        if position + 12 > len(encoded):
            raise ValueError("its chunks end before the end marker: it is cut off")
        size, kind = struct.unpack_from(">I4s", encoded, position)
        start, end = position + 8, position + 8 + size
        if end + 4 > len(encoded):
            raise ValueError("a chunk is cut off")
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"the checksum of chunk {kind!r} is wrong")
        if (number == 0) != (kind == b"IHDR"):
            raise ValueError("its header is not its first chunk, or there are two")
        if kind == b"IHDR":
            header = encoded[start:end]
        elif kind == b"IDAT":
            data.append((start, end))
        elif kind == b"acTL":
            animated = True
        position = end + 4
        if kind == b"IEND":
            return _layout(header, animated, tuple(data), position)
    raise ValueError(f"has more than {MAX_CHUNKS} chunks")


def _layout(header: bytes, animated: bool, data: tuple[tuple[int, int], ...], end: int) -> Layout:
    if len(header) != 13:
        raise ValueError("its header is damaged")
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if colour not in _SAMPLES or not width or not height:
        raise ValueError("its header is damaged")
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    pixel_bytes = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            pixel_bytes += rows * (1 + (columns * _SAMPLES[colour] * bits + 7) // 8)
    return Layout(width, height, bits, animated, pixel_bytes, data, end)


def check_data(encoded: bytes, found: Layout) -> None:
    """Raises ValueError unless the image data inflates to exactly the pixels that the header declares.

    Inflates at most 64 kB at a time and stops at the first byte too many. Call it where the size is within the cap.
    """
    inflate, left = zlib.decompressobj(), found.pixel_bytes
    for start, end in found.data:
        for piece in range(start, end, _PIECE):
            waiting = encoded[piece : min(end, piece + _PIECE)]
            while waiting and not inflate.eof:
                left -= len(inflate.decompress(waiting, _PIECE))
                waiting = inflate.unconsumed_tail
                if left < 0:
                    raise ValueError("its data inflates to more than its pixels")
    # The last bytes may wait inside of the decompressor, and there the checksum of the whole is compared.
    while not inflate.eof and (rest := inflate.decompress(b"", _PIECE)):
        left -= len(rest)
    if left or not inflate.eof:
        raise ValueError(
            "its data does not hold all of its pixels" if left >= 0 else "inflates to more than its pixels"
        )


def check_gif(encoded: bytes) -> None:
    """Raises ValueError where more than MAX_GIF_PREFACE_BYTES stand before a GIF's first frame, or no frame follows."""
    if len(encoded) < 13:
        raise ValueError("its header is cut off")
    flags = encoded[10]
    position = start = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while encoded[position : position + 1] == b"\x21":
        position += 2
        while position < len(encoded) and encoded[position]:
            position += 1 + encoded[position]
        position += 1
        if position - start > MAX_GIF_PREFACE_BYTES:
            raise ValueError(f"has more than {MAX_GIF_PREFACE_BYTES} bytes of extensions before its first frame")
    if encoded[position : position + 1] != b"\x2c":
        raise ValueError("has no frame")
