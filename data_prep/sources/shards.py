"""Shards that `limoe prep pack` wrote, to pack again: with filters, another size, a drop list, or mixed with others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources import files as source_files
from data_prep.sources.columns import Columns, captions_of, key_problem, scores_of
from data_prep.sources.source import Block, License, Sample
from limoe_dist.config.errors import UserError
from limoe_dist.data import manifest as manifests
from limoe_dist.data import places
from limoe_dist.data.manifest import Manifest

VERSION = 1
"""Raised when the same shard gives other blocks."""
READ = ("key", "image", "captions", "concept", "source")


@dataclass(frozen=True)
class Shards:
    """Packed shards as a Source; a block is a record batch."""

    name: str
    folder: str
    manifest: Manifest = field(repr=False)
    scores: tuple[str, ...]
    blocks: tuple[Block, ...] = field(repr=False)
    """file: the shard; start: the record batch."""

    @property
    def licenses(self) -> Mapping[str, License]:
        return {one.name: License(one.license, one.attribution) for one in self.manifest.sources}

    def fingerprint(self) -> str:
        # The manifest holds every shard's checksum.
        return source_files.fingerprint_of(["shards", json.dumps(self.manifest.model_dump(mode="json")), *self.scores])

    def read(self, block: Block) -> Iterator[Sample]:
        place = _place(self.folder, self.manifest, block.file)
        rows = _batch(place, block.start, (*READ, *self.scores))
        if rows.num_rows != block.rows:
            raise UserError(f"{place}: changed while it was read: run again")
        columns = {name: rows.column(name) for name in rows.schema.names}
        for number in range(block.rows):
            values = {name: columns[name][number].as_py() for name in columns}
            yield _sample(values, self.scores, f"{place}, row {block.first + number}", (block, number))


def _sample(values: dict[str, Any], scores: tuple[str, ...], place: str, at: tuple[Block, int]) -> Sample:
    key = values["key"] or ""
    problem = key_problem(key)
    return Sample(
        # No key of a whole row begins with a slash.
        f"/{at[0].file}/{at[0].first + at[1]}" if problem else key,
        values["image"] or b"",
        () if problem else captions_of(values["captions"]),
        concept=values["concept"] or "",
        source=values["source"] or "",
        scores=scores_of(values, scores),
        problem=problem,
        place=place,
    )


def open_shards(place: str, *, name: str, columns: Columns, index: Path | None, progress: Any) -> Shards:
    """place: manifest.json or its folder, also a URL.

    Raises UserError where the manifest is none, a shard is missing, of another size, or no Arrow file of ours.
    """
    folder = places.parent(manifests.manifest_place(place))
    manifest = manifests.load_manifest(place)
    shards = [_place(folder, manifest, shard) for shard in range(len(manifest.shards))]
    scores = columns.scores
    what = f"shards {VERSION} {scores}"
    found = source_files.learned(
        shards, lambda one: _batch_rows(one, scores), what=what, index=index, progress=progress
    )
    blocks: list[Block] = []
    for number, (shard, (_, batches)) in enumerate(zip(shards, found, strict=True)):
        first = 0
        for batch, rows in enumerate(batches):
            if rows:
                blocks.append(Block(number, first, rows, start=batch))
            first += rows
        if first != manifest.shards[number].rows:
            raise UserError(f"{shard}: {first} rows, but the manifest says {manifest.shards[number].rows}: pack again")
    return Shards(name, folder, manifest, scores, tuple(blocks))


def _place(folder: str, manifest: Manifest, shard: int) -> str:
    return places.join(folder, manifest.shards[shard].file)


@contextmanager
def _opened(place: str, *, columns: Sequence[int] | None = None) -> Iterator[Any]:
    """An Arrow file, of a disk mapped, of a store by range reads. Raises UserError where it is none.

    columns: indices of those that are read; None: all.
    """
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(included_fields=list(columns) if columns is not None else None)
    try:
        with places.failures(place):
            if not places.is_remote(place):
                # Not closed here: the mapping goes with the last array that lies in it.
                yield pa.ipc.open_file(pa.memory_map(str(places.local(place))), options=options)
                return
            with places.open_binary(place) as file:
                yield pa.ipc.open_file(file, options=options)
    except pa.ArrowException as error:
        raise UserError(
            f"{place}: cannot be read as an Arrow file ({' '.join(str(error).split())[:200]}): pack again"
        ) from None


def _batch_rows(place: str, scores: tuple[str, ...]) -> list[int]:
    """Rows of each record batch, read from its smallest columns alone; the columns are checked."""
    with _opened(place) as reader:
        _check(reader.schema, scores, place)
        source = reader.schema.get_field_index("source")
    with _opened(place, columns=[source]) as reader:
        return [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]


def _check(schema: Any, scores: tuple[str, ...], place: str) -> None:
    import pyarrow as pa

    types = {"image": (pa.binary(), pa.large_binary()), "captions": (pa.list_(pa.string()),)}
    for name in (*READ, *scores):
        if schema.get_field_index(name) < 0:
            raise UserError(f'{place}: no column "{name}"; it has {", ".join(schema.names)}')
        kind = schema.field(name).type
        if name not in scores and kind not in types.get(name, (pa.string(),)):
            raise UserError(f'{place}: column "{name}" is {kind}, as in no shard of ours: pack again')


def _batch(place: str, number: int, names: tuple[str, ...]) -> Any:
    """A record batch. Its offsets come from the file: unchecked, a hostile one would let a row read outside of it."""
    with _opened(place) as reader:
        batch = reader.get_batch(number).select(list(names))
        batch.validate(full=True)
    return batch
