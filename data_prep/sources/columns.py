"""What strangers call the fields of a row, and how their values become captions, scores and keys."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes")
CAPTION_NAMES = ("caption", "captions", "text", "txt")
CONCEPT_NAMES = ("concept",)
MOST_CAPTIONS = 1000
"""Of one row: more are no captions, and would fill the memory."""
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What would break a line of a list or a terminal, and halves of surrogate pairs, which no file can hold."""
LONGEST_KEY = 512
"""Characters."""


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns, or of fields in the JSON beside a picture."""

    image: str = ""
    """Column with the encoded picture (parquet); empty: image, jpg, jpeg, png, webp, img, picture or image_bytes."""
    caption: str = ""
    """Column or field with one caption or a list; empty: caption, captions, text or txt. In tars "txt" is the text
    file beside the picture, and empty takes that file's and the fields' captions together."""
    key: str = ""
    """Column (parquet) whose value ends a row's key; empty: the key is the file's name and the row's number."""
    concept: str = ""
    """Column or field with the name of what is seen; empty: concept, where there is one."""
    scores: tuple[str, ...] = ()
    """Columns or fields with numbers to filter by, such as similarity, punsafe, pwatermark."""


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a field's value: a text, or a list of texts; blanks within are one space, repeats are left out.

    None and empty lists give (). A blank text stays as "": the row has a place for its caption, and nothing in it.
    Raises ValueError with the reason for anything else.
    """
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        raise ValueError("its caption is neither a text nor a list of texts")
    if len(texts) > MOST_CAPTIONS:
        raise ValueError(f"has {len(texts)} captions, more than {MOST_CAPTIONS}")
    return joined([" ".join((text or "").split()) for text in texts])


def joined(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions without repeats, and without blank ones where another is not blank."""
    different = tuple(dict.fromkeys(captions))
    return tuple(text for text in different if text) or different


def score_of(value: Any) -> float | None:
    """A finite number, also one that is written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > 40:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def scores_of(values: dict[str, Any], names: Iterable[str]) -> dict[str, float]:
    found = {name: score_of(values.get(name)) for name in names}
    return {name: score for name, score in found.items() if score is not None}


def key_problem(key: str) -> str:
    """Why a stranger's name cannot be part of a key; empty where it can."""
    if not key:
        return "has an empty name"
    if len(key) > LONGEST_KEY:
        return f"has a name of {len(key)} characters, more than {LONGEST_KEY}"
    if key.startswith("/") or ".." in key.split("/"):
        return "its name leaves the source: it must be relative and without .."
    if UNPRINTABLE.search(key):
        return "its name has characters that cannot be printed"
    return ""
