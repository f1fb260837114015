"""`limoe prep stats`: what packed sets hold, in one pass over all columns but the pictures' bytes.

Memory does not grow with the rows, but for 24 bytes a caption and a picture, which beyond 32 MB lie in the temporary
folder: 10 million rows stay below 1 GB.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_prep.inspection import scripts
from data_prep.inspection.contact_sheet import Card, card
from data_prep.inspection.near_result import NearResult
from data_prep.inspection.packed_sets import PackedSet, batches, on_disk
from data_prep.inspection.repeats import Repeats
from data_prep.inspection.tallies import Distribution, Frequent
from data_prep.inspection.token_lengths import TokenLengths
from data_prep.watched import Advance

_CHUNK_ROWS, _CHUNK_BYTES = 8192, 64 << 20
_COLUMNS = ("key", "image", "captions", "concept", "width", "height", "sha256", "source")
_WORD = re.compile(r"\w+")
MOST = 30
"""Captions, words, concepts and sources that are named."""
HELD_CAPTIONS, HELD_WORDS, HELD_NAMES = 200_000, 100_000, 100_000
TOKEN_ROWS = 20_000
"""Rows whose captions are cut into tokens."""


@dataclass
class Stats:
    sets: Sequence[PackedSet]
    near: NearResult | None
    tokens: TokenLengths | None
    rows: int = 0
    without_caption: int = 0
    without_picture: int = 0
    encoded_bytes: Distribution = field(default_factory=Distribution)
    width: Distribution = field(default_factory=Distribution)
    height: Distribution = field(default_factory=Distribution)
    shorter_side: Distribution = field(default_factory=Distribution)
    aspect: Distribution = field(default_factory=Distribution)
    """Thousandths of width / height."""
    captions_a_row: Distribution = field(default_factory=Distribution)
    characters: Distribution = field(default_factory=Distribution)
    words: Distribution = field(default_factory=Distribution)
    of_script: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(scripts.NAMES), dtype=np.int64))
    frequent_captions: Frequent = field(default_factory=lambda: Frequent(HELD_CAPTIONS))
    frequent_words: Frequent = field(default_factory=lambda: Frequent(HELD_WORDS, longest=40))
    concepts: Frequent = field(default_factory=lambda: Frequent(HELD_NAMES))
    sources: Frequent = field(default_factory=lambda: Frequent(HELD_NAMES))
    pictures: Repeats = field(default_factory=Repeats)
    captions: Repeats = field(default_factory=Repeats)
    cards: list[Card] = field(default_factory=list)
    """The contact sheet, in the order of the rows."""

    def add(self, chunk: pa.Table) -> None:
        first, self.rows = self.rows, self.rows + chunk.num_rows
        self._add_pictures(chunk, first)
        self._add_captions(chunk["captions"], first)
        for name, tally in (("concept", self.concepts), ("source", self.sources)):
            counts = pc.value_counts(chunk[name])
            tally.add_counts(Counter({one["values"] or "": one["counts"] for one in counts.to_pylist()}))

    def _add_pictures(self, chunk: pa.Table, first: int) -> None:
        sizes = _integers(pc.binary_length(chunk["image"]))
        there = sizes > 0
        self.without_picture += int((~there).sum())
        width, height = (_integers(chunk[name])[there] for name in ("width", "height"))
        self.encoded_bytes.add(sizes[there])
        self.width.add(width)
        self.height.add(height)
        self.shorter_side.add(np.minimum(width, height))
        self.aspect.add(np.rint(1000 * width / np.maximum(height, 1)).astype(np.int64))
        sums = chunk["sha256"].to_pylist()
        rows = np.flatnonzero(there)
        self.pictures.add(b"".join(_digest(sums[row]) for row in rows), rows + first)

    def _add_captions(self, column: pa.ChunkedArray, first: int) -> None:
        counts = _integers(pc.list_value_length(column))
        self.without_caption += int((counts == 0).sum())
        self.captions_a_row.add(counts[counts > 0])
        texts = [text or "" for text in pc.list_flatten(column).to_pylist()]
        if not texts:
            return
        self.characters.add(np.array([len(text) for text in texts]))
        found = [_WORD.findall(text.lower()) for text in texts]
        self.words.add(np.array([len(words) for words in found]))
        self.frequent_words.add(word for words in found for word in words)
        self.frequent_captions.add(texts)
        self.of_script += np.bincount(scripts.scripts_of(texts), minlength=len(scripts.NAMES))
        hashes = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in texts)
        self.captions.add(hashes, np.repeat(np.arange(len(counts)) + first, counts))

    def to_json(self) -> dict[str, Any]:
        return {
            "sets": [_set(packed) for packed in self.sets],
            "rows": {
                "total": self.rows,
                "without_caption": self.without_caption,
                "without_picture": self.without_picture,
            },
            "pictures": {
                "encoded_bytes": self.encoded_bytes.to_json(),
                "width": self.width.to_json(),
                "height": self.height.to_json(),
                "shorter_side": self.shorter_side.to_json(),
                "aspect": self.aspect.to_json(unit=0.001),
            },
            "captions": {
                "total": self.characters.count,
                "a_row": self.captions_a_row.to_json(),
                "characters": self.characters.to_json(),
                "words": self.words.to_json(),
                "scripts": _shares(self.of_script),
                "frequent": self.frequent_captions.to_json(MOST),
                "frequent_words": self.frequent_words.to_json(MOST),
            },
            "tokens": self.tokens.to_json() if self.tokens else None,
            "sources": _sources(self.sets, self.sources),
            "concepts": self.concepts.to_json(MOST),
            "duplicates": {
                "pictures": _repeats(self.pictures),
                "captions": _repeats(self.captions),
                "near": self.near.to_json() if self.near else None,
            },
            "rules": RULES,
        }


RULES = {
    "distributions": "exact below 4,096, to 0.07 % above; smallest, largest and mean are exact",
    "frequent": "exact while at most 200,000 captions, 100,000 words or names differ; beyond that a count is too small "
    "by at most counts_too_small_by_at_most; captions count by their first 200 characters, words by 40, in lower case",
    "scripts": "by the script of most letters of a caption; no letters: digits, signs and emoji alone",
    "duplicates": "pictures by the column sha256, captions by all of their characters; surplus: rows that would go if "
    "each stayed once",
    "tokens": "of the captions of at most 20,000 rows, drawn by --seed",
}


def collect(
    sets: Sequence[PackedSet],
    *,
    sample: int,
    seed: int,
    tokens: TokenLengths | None,
    near: NearResult | None,
    advance: Advance,
) -> Stats:
    """One pass over all shards. sample: pictures on the contact sheet, drawn by the seed.

    Raises UserError where a shard cannot be read: `limoe prep verify` says more.
    """
    stats = Stats(sets, near, tokens)
    # A manifest may declare any number.
    total = min(sum(packed.manifest.rows for packed in sets), 1 << 62)
    chosen = np.random.default_rng(seed)
    sheet, cut = (np.sort(chosen.choice(total, min(total, n), replace=False)) for n in (sample, TOKEN_ROWS))
    for chunk in _chunks(sets):
        first, end = stats.rows, stats.rows + chunk.num_rows
        stats.add(chunk)
        for row in sheet[np.searchsorted(sheet, first) : np.searchsorted(sheet, end)] - first:
            stats.cards.append(card({name: chunk[name][int(row)] for name in _COLUMNS}))
        if tokens:
            rows = cut[np.searchsorted(cut, first) : np.searchsorted(cut, end)] - first
            tokens.add([text or "" for row in chunk["captions"].take(rows).to_pylist() for text in row or ()])
        advance(chunk.num_rows)
    return stats


def _chunks(sets: Sequence[PackedSet]) -> Iterator[pa.Table]:
    """The rows of all shards, some thousand at a time: numpy and pyarrow cost by the call."""
    for packed in sets:
        for shard in packed.manifest.shards:
            place = packed.place_of(shard)
            with on_disk(place, limit_bytes=shard.bytes) as path:
                held: list[pa.RecordBatch] = []
                for batch in batches(path, _COLUMNS, place=place):
                    held.append(batch)
                    rows, size = sum(one.num_rows for one in held), sum(_text_bytes(one) for one in held)
                    if rows >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
                        yield pa.Table.from_batches(held)
                        held = []
                if held:
                    yield pa.Table.from_batches(held)


def _text_bytes(batch: pa.RecordBatch) -> int:
    """Without the pictures, of which only a few are read."""
    return sum(batch.column(name).nbytes for name in batch.schema.names if name != "image")


def _integers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Null as 0."""
    return np.asarray(pc.fill_null(column, 0).combine_chunks().to_numpy(zero_copy_only=False)).astype(np.int64)


def _digest(sha256: str | None) -> bytes:
    """The first 128 bits of a checksum in hexadecimal; of what is none, those of its text."""
    try:
        found = bytes.fromhex((sha256 or "")[:32])
    except ValueError:
        found = b""
    return found if len(found) == 16 else xxhash.xxh3_128_digest((sha256 or "").encode())


def _set(packed: PackedSet) -> dict[str, Any]:
    shards = packed.manifest.shards
    return {
        "manifest": packed.place,
        "name": packed.manifest.name,
        "rows": packed.manifest.rows,
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "made_with": packed.manifest.made_with,
        "settings": packed.manifest.settings,
    }


def _shares(of_script: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    total = max(1, int(of_script.sum()))
    order = sorted(range(len(of_script)), key=lambda number: (-of_script[number], number))
    return [
        {"script": scripts.NAMES[number], "captions": int(of_script[number]), "share": int(of_script[number]) / total}
        for number in order
        if of_script[number]
    ]


def _sources(sets: Sequence[PackedSet], counted: Frequent) -> dict[str, Any]:
    known = {source.name: source for packed in sets for source in packed.manifest.sources}
    largest = []
    for name, rows in counted.largest(MOST):
        source = known.get(name)
        largest.append(
            {
                "name": name,
                "rows": rows,
                "license": source.license if source else "unknown",
                "attribution": source.attribution if source else "",
            }
        )
    return {"distinct": counted.distinct, "counts_too_small_by_at_most": counted.error, "largest": largest}


def _repeats(repeats: Repeats) -> dict[str, Any]:
    found = repeats.summary(most=5)
    return {
        "values": found.values,
        "distinct": found.distinct,
        "groups": found.groups,
        "surplus": found.surplus,
        "largest_groups": [one.count for one in found.largest],
    }
