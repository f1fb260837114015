"""Which columns of a list hold addresses and captions, recognised by name or told, and which are carried through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from limoe_dist.config.errors import UserError, nearest
from limoe_dist.data import places

URL_NAMES = ("url", "image_url", "img_url", "imageurl", "link")
CAPTION_NAMES = ("caption", "text", "alt_text", "alt", "description", "title")
BATCH_ROWS = 2_000
LONGEST_VALUE = 2_000
"""Of a carried text, in characters: a longer one is left out."""
LONGEST_URL = 4_096
LONGEST_CAPTION = 20_000
"""Characters: ten thousand rows of longer ones would not fit into memory."""

Values = tuple[str, str, dict[str, Any]]
"""Address, caption, carried columns."""
Wanted = Callable[[int, int], bool]
"""Whether any row from the first to before the second is of use."""


@dataclass(frozen=True)
class Columns:
    """What the person says of the columns; empty: to be recognised."""

    url: str = ""
    caption: str = ""
    carried: tuple[str, ...] | None = None
    """None: all that hold plain values."""
    header: tuple[str, ...] = ()
    """Names of the columns, for CSV and TSV that have no header."""


@dataclass(frozen=True)
class Chosen:
    """Indices of a file's columns."""

    url: int
    caption: int | None
    carried: dict[str, int]


def chosen_columns(file: str, names: Sequence[str], columns: Columns) -> Chosen:
    """names: as the file has them."""
    url = _index(file, names, columns.url, URL_NAMES, "--url-column")
    if url is None:
        raise UserError(f"{file}: no column of addresses among {', '.join(names)}: name it with --url-column")
    caption = _index(file, names, columns.caption, CAPTION_NAMES, "--caption-column")
    others = {name: index for index, name in enumerate(names) if index not in (url, caption)}
    if columns.carried is None:
        return Chosen(url, caption, others)
    for name in columns.carried:
        if name not in others:
            raise UserError(f"{file}: --keep-columns {name}: not among {', '.join(others)}{nearest(name, others)}")
    return Chosen(url, caption, {name: others[name] for name in columns.carried})


def _index(file: str, names: Sequence[str], given: str, known: Sequence[str], option: str) -> int | None:
    if given:
        if given not in names:
            raise UserError(f"{file}: {option} {given}: not among {', '.join(names)}{nearest(given, names)}")
        return list(names).index(given)
    lowered = [name.lower() for name in names]
    return next((lowered.index(name) for name in known if name in lowered), None)


def bare(file: str) -> str:
    """The name of a file without what a URL has behind its ?."""
    return file.partition("?")[0] if places.is_remote(file) else file


def bounded(url: str, caption: str, carried: dict[str, Any]) -> Values:
    """A longer address is cut where it is known to be too long; a longer caption is left out."""
    return url.strip()[: LONGEST_URL + 1], "" if len(caption) > LONGEST_CAPTION else caption, carried


def carried_values(names: Sequence[str] | dict[str, int], values: Sequence[Any]) -> dict[str, Any]:
    """Without what is missing, not finite or very long: JSON has no word for it."""
    kept = {}
    for name, value in zip(names, values, strict=True):
        kind = type(value)
        if value is None or (kind is float and not math.isfinite(value)):
            continue
        if kind is str and len(value) > LONGEST_VALUE:
            continue
        kept[name] = value
    return kept
