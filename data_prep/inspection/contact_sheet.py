"""Small pictures with their captions for a page, from strangers' bytes: made anew or left out, never passed on."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_prep.imaging.pictures import Caps, limit_pillow, rgb_pixels

SIDE = 192
_CAPS = Caps(max_bytes=64 << 20, max_pixels=32 << 20)
_MOST_CAPTIONS = 5
_LONGEST = 400


@dataclass(frozen=True)
class Card:
    address: str
    """data:image/jpeg, at most SIDE pixels wide and high; empty: a text alone, or a picture that cannot be shown."""
    key: str
    captions: tuple[str, ...]
    """Those that are shown; cut after 400 characters."""
    more: int
    concept: str
    source: str
    width: int
    height: int
    bytes: int


def card(row: Mapping[str, Any]) -> Card:
    """From a row of a shard: by column, an Arrow scalar."""
    image = row["image"].as_buffer()
    texts = [_shown(text or "") for text in row["captions"].as_py() or ()]
    return Card(
        address=thumbnail(bytes(image)) if image is not None and len(image) else "",
        key=_shown(row["key"].as_py() or ""),
        captions=tuple(texts[:_MOST_CAPTIONS]),
        more=max(0, len(texts) - _MOST_CAPTIONS),
        concept=_shown(row["concept"].as_py() or ""),
        source=_shown(row["source"].as_py() or ""),
        width=row["width"].as_py() or 0,
        height=row["height"].as_py() or 0,
        bytes=0 if image is None else len(image),
    )


def thumbnail(encoded: bytes) -> str:
    """A data: address of the picture as a small JPEG that was encoded here; empty for what cannot be decoded."""
    limit_pillow(_CAPS)
    try:
        small = Image.fromarray(rgb_pixels(encoded, _CAPS, shorter_side=SIDE))
    except ValueError:
        return ""
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _shown(text: str) -> str:
    """Cut, and without control characters. Joiners and marks of direction stay: many scripts need them."""
    clean = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text[:_LONGEST])
    return clean if len(text) <= _LONGEST else clean + "\N{HORIZONTAL ELLIPSIS}"
