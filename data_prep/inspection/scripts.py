"""Which script texts are written in, by Unicode's blocks: a cheap stand-in for the language."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_RANGES = (
    (0x41, 0x5A, "Latin"),
    (0x61, 0x7A, "Latin"),
    (0xAA, 0xAA, "Latin"),
    (0xBA, 0xBA, "Latin"),
    (0xC0, 0xD6, "Latin"),
    (0xD8, 0xF6, "Latin"),
    (0xF8, 0x24F, "Latin"),
    (0x370, 0x3FF, "Greek"),
    (0x400, 0x52F, "Cyrillic"),
    (0x530, 0x58F, "Armenian"),
    (0x590, 0x5FF, "Hebrew"),
    (0x600, 0x6FF, "Arabic"),
    (0x750, 0x77F, "Arabic"),
    (0x8A0, 0x8FF, "Arabic"),
    (0x900, 0x97F, "Devanagari"),
    (0x980, 0x9FF, "Bengali"),
    (0xA00, 0xD7F, "other Indic"),
    (0xD80, 0xDFF, "Sinhala"),
    (0xE00, 0xE7F, "Thai"),
    (0xE80, 0xEFF, "Lao"),
    (0xF00, 0xFFF, "Tibetan"),
    (0x1000, 0x109F, "Burmese"),
    (0x10A0, 0x10FF, "Georgian"),
    (0x1100, 0x11FF, "Hangul"),
    (0x1200, 0x139F, "Ethiopic"),
    (0x1780, 0x17FF, "Khmer"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x1F00, 0x1FFF, "Greek"),
    (0x2E80, 0x2FDF, "Han"),
    (0x3040, 0x30FF, "Kana"),
    (0x3130, 0x318F, "Hangul"),
    (0x31F0, 0x31FF, "Kana"),
    (0x3400, 0x4DBF, "Han"),
    (0x4E00, 0x9FFF, "Han"),
    (0xAC00, 0xD7AF, "Hangul"),
    (0xF900, 0xFAFF, "Han"),
    (0xFB50, 0xFDFF, "Arabic"),
    (0xFE70, 0xFEFF, "Arabic"),
    (0xFF66, 0xFF9D, "Kana"),
    (0x20000, 0x323AF, "Han"),
)
NONE = "no letters"
"""Digits, signs and emoji alone, and blocks that are not listed."""
NAMES = (NONE, *dict.fromkeys(name for _, _, name in _RANGES))
_STARTS = np.array([start for low, high, _ in _RANGES for start in (low, high + 1)], dtype=np.uint32)
_SCRIPTS = np.array([number for _, _, name in _RANGES for number in (NAMES.index(name), 0)], dtype=np.int64)


def scripts_of(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """The script that most letters of each text are of, as an index into NAMES: (n,); 0 for a text without letters.

    Of two scripts with as many letters, the one that NAMES has first.
    """
    if not texts:
        return np.zeros(0, dtype=np.int64)
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    found = np.searchsorted(_STARTS, points, side="right") - 1
    scripts = np.where(found < 0, 0, _SCRIPTS[np.maximum(found, 0)])
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    counts = np.bincount(owner * len(NAMES) + scripts, minlength=len(texts) * len(NAMES))
    counts_TN = counts.reshape(len(texts), len(NAMES))
    counts_TN[:, 0] = 0  # letters decide; a text without any keeps index 0
    return counts_TN.argmax(axis=1).astype(np.int64)
