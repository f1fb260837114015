"""The segments of a JPEG, walked before any decoder sees them: what it declares, where it ends, whether it is whole.

A decoder answers to damage with grey blocks and a warning, to a file of ten thousand scans with hours of work, and to
a photograph whose last scans are missing with a blurred one. The walk costs microseconds and refuses all three.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

SIGNATURE = b"\xff\xd8\xff"
MAX_SEGMENTS = 10_000
MAX_SCANS = 100
"""Encoders write about 10. Each costs a pass over all blocks, however few bytes it has."""
FRAMES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
ARITHMETIC = {0xC9: "arithmetic", 0xCA: "arithmetic progressive"}
"""Many decoders lack these, so such pictures are converted."""

_SOI, _EOI, _SOS, _DHT, _JPG, _DAC, _APP1, _TEM = 0xD8, 0xD9, 0xDA, 0xC4, 0xC8, 0xCC, 0xE1, 0x01
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {_DHT, _JPG, _DAC}
_RESTART = range(0xD0, 0xD8)
# Entropy-coded bytes end at a marker; FF 00 is an escaped FF, FF D0 to D7 are restarts inside the scan.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_ALL_COEFFICIENTS = (1 << 64) - 1


@dataclass(frozen=True)
class Layout:
    frame: int
    """The marker of its frame: a key of FRAMES or ARITHMETIC."""
    width: int
    height: int
    components: int
    """As many as the frame has; two may bear one number, and decoders take them all."""
    scans: int
    end: int
    """Bytes up to and with the end marker; what follows is not part of the picture."""
    app1: bool
    """Whether it has a segment that may hold EXIF or XMP."""


@dataclass
class _Walk:
    frame: int = 0
    width: int = 0
    height: int = 0
    components: int = 0
    scans: int = 0
    app1: bool = False

    def __post_init__(self) -> None:
        self.sent: dict[int, int] = {}
        """By component: a bit for each of its 64 coefficients that has come with its last bit."""


def layout(encoded: bytes) -> Layout:
    """Walks all segments up to the end marker.

    Raises ValueError with the reason where a segment is cut off, the end is missing, there are too many segments or
    scans, the kind is none of FRAMES and ARITHMETIC, a sample has not 8 bits, or scans of a component are missing.
    """
    walk, position = _Walk(), 2
    for _ in range(MAX_SEGMENTS):
        marker, position = _marker(encoded, position)
        if marker == _EOI:
            _check_whole(walk)
            return Layout(walk.frame, walk.width, walk.height, walk.components, walk.scans, position, walk.app1)
        if marker == _TEM or marker in _RESTART:
            continue
        if marker == _SOI:
            raise ValueError("a second JPEG begins inside of the first")
        segment, position = _segment(encoded, position)
        walk.app1 |= marker == _APP1
        if marker in _START_OF_FRAME:
            _read_frame(walk, marker, segment)
        elif marker == _SOS:
            _read_scan(walk, segment)
            found = _MARKER.search(encoded, position)
            if found is None:
                raise ValueError("its data ends before the end marker: it is cut off")
            position = found.start()
    raise ValueError(f"has more than {MAX_SEGMENTS} segments")


def _marker(encoded: bytes, position: int) -> tuple[int, int]:
    """(the marker at `position`, the position behind it); any number of FF may fill the space before it."""
    if position < len(encoded) and encoded[position] != 0xFF:
        raise ValueError(f"has stray bytes between its segments, at byte {position}")
    while position < len(encoded) and encoded[position] == 0xFF:
        position += 1
    if position >= len(encoded):
        raise ValueError("its segments end before the end marker: it is cut off")
    return encoded[position], position + 1


def _segment(encoded: bytes, position: int) -> tuple[bytes, int]:
    """(the content of the segment whose length stands at `position`, the position behind it)"""
    length = int.from_bytes(encoded[position : position + 2], "big")
    end = position + length
    if length < 2 or end > len(encoded):
        raise ValueError("a segment is cut off")
    return encoded[position + 2 : end], end


def _read_frame(walk: _Walk, marker: int, segment: bytes) -> None:
    if walk.frame:
        raise ValueError("has two frame headers")
    if marker not in FRAMES and marker not in ARITHMETIC:
        raise ValueError(f"is a lossless or hierarchical JPEG (frame {marker:02X}), which most decoders cannot read")
    if len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
        raise ValueError("its frame header is damaged")
    bits, walk.height, walk.width, walk.components = struct.unpack_from(">BHHB", segment)
    if bits != 8:
        raise ValueError(f"is a JPEG of {bits} bits a sample, which most decoders cannot read")
    walk.frame = marker
    walk.sent = dict.fromkeys(segment[6::3], 0)


def _read_scan(walk: _Walk, segment: bytes) -> None:
    """Notes which coefficients of which components the scan completes: in a progressive JPEG only those that it names,
    and only where it brings their lowest bit."""
    walk.scans += 1
    if walk.scans > MAX_SCANS:
        raise ValueError(f"has more than {MAX_SCANS} scans")
    if not segment or len(segment) != 4 + 2 * segment[0]:
        raise ValueError("a scan header is damaged")
    first, last, bits = segment[-3:]
    progressive = walk.frame in (0xC2, 0xCA)
    brought = _ALL_COEFFICIENTS
    if progressive:
        brought = (1 << min(last, 63) + 1) - (1 << min(first, 63)) if bits & 15 == 0 else 0
    for component in segment[1:-3:2]:
        if component not in walk.sent:
            raise ValueError("a scan is of a component that the frame does not have")
        walk.sent[component] |= max(brought, 0)


def _check_whole(walk: _Walk) -> None:
    if not walk.frame or not walk.width or not walk.height:
        raise ValueError("has no frame header with a width and a height")
    if any(sent != _ALL_COEFFICIENTS for sent in walk.sent.values()):
        raise ValueError("scans are missing: it is cut off")
