"""Example retrievals for a page: what a text found among the pictures, and a picture among the texts.

The search itself is limoe_dist.eval.retrieval's; here its rows become small pictures, and right answers are marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limoe_dist.analysis.evaluated import Figure
from limoe_dist.analysis.thumbnails import thumbnail
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import normalised

MOST_CHARACTERS = 240
"""Of a text, so that one hostile caption does not fill the page."""


@dataclass(frozen=True)
class Query:
    """One row, its text, and what each found first, best first."""

    row: int
    text: str
    texts: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Picture:
    text: str
    """Its first caption."""
    source: str
    address: str | None
    """data:image/...; None where it cannot be shown."""
    right: bool


@dataclass(frozen=True)
class FoundText:
    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    text: str
    own: Picture
    pictures: tuple[Picture, ...]
    """What the text found. Right: every picture that carries the text."""
    texts: tuple[FoundText, ...]
    """What the picture found."""

    @property
    def picture_found(self) -> bool:
        return any(picture.right for picture in self.pictures)

    @property
    def text_found(self) -> bool:
        return any(text.right for text in self.texts)


@dataclass(frozen=True)
class Examples:
    step: int
    """Of the checkpoint that searched."""
    data: str
    """The manifest that was searched."""
    role: str
    """What the manifest is to the run."""
    rows: int
    """Pictures that were searched; damaged ones and those without a caption are not."""
    rows_read: int
    """The first so many rows of the manifest were read ..."""
    rows_of: int
    """... of so many."""
    texts: int
    figures: tuple[Figure, ...]
    shown: tuple[Example, ...]


def example_of(query: Query, shards: ShardSet) -> Example:
    """Reads the rows' pictures. Texts count as equal as in retrieval: after NFKC, lower case and white space."""
    wanted = normalised(query.text)
    return Example(
        text=cut(query.text),
        own=_picture(query.row, shards, wanted),
        pictures=tuple(_picture(row, shards, wanted) for row in query.rows),
        texts=tuple(FoundText(cut(text), normalised(text) == wanted) for text in query.texts),
    )


def spread(queries: Sequence[Query], count: int) -> list[Query]:
    """`count` of them, or all, evenly spread."""
    count = min(count, len(queries))
    return [queries[i * len(queries) // count] for i in range(count)]


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _picture(number: int, shards: ShardSet, wanted: str) -> Picture:
    row = shards.row(number)
    caption = row.captions[0] if row.captions else ""
    return Picture(
        text=cut(caption or row.key),
        source=row.source,
        address=thumbnail(row.image),
        right=bool(caption) and normalised(caption) == wanted,
    )
