"""Parquet files that hold the pictures themselves, as Hugging Face's datasets: bytes in a column, captions beside.

A block is a row group, or a slice of a long one. Rows are read in small batches, so that neither a long row group nor
a large cell fills the memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources import files as source_files
from data_prep.sources.columns import MOST_CAPTIONS, Columns, captions_of, key_problem, scores_of
from data_prep.sources.parquet_fields import Fields, fields_of
from data_prep.sources.picture_folder import LARGEST_PICTURE
from data_prep.sources.source import Block, License, Sample
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

VERSION = 1
"""Raised when the same file gives other blocks."""
SLICE_ROWS = 1024
MOST_SLICES = 8
"""Of a row group: to reach a slice, what lies before it in the group is decoded too."""
BATCH_ROWS = 256
BATCH_BYTES = 64 << 20
LARGEST_TEXT = 1 << 20
"""Bytes of a row's captions, or characters of its concept."""
_THRIFT = {"thrift_string_size_limit": 64 << 20, "thrift_container_size_limit": 1_000_000}
"""Of a footer, which is read before anything else is known."""
_EXPANSION = {"UNCOMPRESSED": 1, "SNAPPY": 22}
"""How many bytes one of a codec can become at most, where that is little."""


@dataclass(frozen=True)
class Parquet:
    """Parquet files as a Source."""

    name: str
    files: tuple[str, ...]
    labels: tuple[str, ...]
    identities: tuple[str, ...]
    fields: tuple[Fields, ...] = field(repr=False)
    """Of each file."""
    blocks: tuple[Block, ...] = field(repr=False)
    """first: in the file; start: the row group; end: how many of its rows lie before the block."""
    licenses: Mapping[str, License]

    def fingerprint(self) -> str:
        tables = (f"{label}\0{mark}" for label, mark in zip(self.labels, self.identities, strict=True))
        named = (repr(one) for one in dict.fromkeys(self.fields))
        return source_files.fingerprint_of(["parquet", str(VERSION), *named, *tables])

    def read(self, block: Block) -> Iterator[Sample]:
        place, fields = self.files[block.file], self.fields[block.file]
        before, left, number = block.end, block.rows, block.first
        with _opened(place) as table:
            for batch in _batches(table, block.start, fields):
                skipped = min(before, batch.num_rows)
                before -= skipped
                columns = {name: batch.column(name) for name in batch.schema.names}
                for row in range(skipped, min(batch.num_rows, skipped + left)):
                    yield self._sample(columns, row, fields, block.file, number)
                    number, left = number + 1, left - 1
                if not left:
                    return
        raise UserError(f"{place}: changed while it was read: {left} rows of row group {block.start} are gone")

    def _sample(self, columns: Mapping[str, Any], row: int, fields: Fields, file: int, number: int) -> Sample:
        key, place = f"{self.labels[file]}/{number}", f"{self.files[file]}, row {number}"
        try:
            if fields.key:
                key += f"/{_key(columns[fields.key][row])}"
            image = _picture(columns[fields.image][row], fields)
            captions = _captions(columns[fields.caption][row]) if fields.caption else ()
            concept = _concept(columns[fields.concept][row], fields) if fields.concept else ""
        except UnicodeDecodeError:
            problem = "has text that is not UTF-8"
        except ValueError as reason:
            problem = str(reason)
        else:
            values = {name: columns[name][row].as_py() for name in fields.scores}
            return Sample(key, image, captions, concept=concept, scores=scores_of(values, fields.scores), place=place)
        return Sample(f"{self.labels[file]}//{number}", b"", (), problem=problem, place=place)


def _key(value: Any) -> str:
    key = str(value.as_py())
    if problem := key_problem(key):
        raise ValueError(f"its key {problem}")
    return key


def _picture(value: Any, fields: Fields) -> bytes:
    if fields.struct and value.is_valid:
        value = value["bytes"]
    if not value.is_valid:
        # A struct with a path alone tells where the picture was on somebody's disk.
        raise ValueError("has no bytes of a picture")
    size = getattr(value, "value", value).as_buffer().size  # of a dictionary's index, the entry
    if not size:
        raise ValueError("its picture is empty")
    if size > LARGEST_PICTURE:
        raise ValueError(f"its picture has {size} bytes, more than {LARGEST_PICTURE}")
    content: bytes = value.as_py()
    return content


def _captions(value: Any) -> tuple[str, ...]:
    listed = getattr(value, "values", None)
    # A hundred million empty ones are a few bytes in the file.
    if listed is not None and len(listed) > MOST_CAPTIONS:
        raise ValueError(f"has {len(listed)} captions, more than {MOST_CAPTIONS}")
    texts = value.as_py()
    length = len(texts) if isinstance(texts, str) else sum(len(text or "") for text in texts or ())
    if length > LARGEST_TEXT:
        raise ValueError(f"has captions of {length} characters, more than {LARGEST_TEXT}")
    captions = captions_of(texts)
    # The table has a place for captions: a row without one is a gap, not a picture that is meant to be alone.
    if captions in ((), ("",)):
        raise ValueError("has an empty caption")
    return captions


def _concept(value: Any, fields: Fields) -> str:
    given = value.as_py()
    if given is None:
        return ""
    if fields.classes:
        # Hugging Face writes -1 where a test set's classes are kept secret.
        if not 0 <= given < len(fields.classes):
            raise ValueError(f"its class {given} has no name")
        return fields.classes[given]
    if len(given) > LARGEST_TEXT:
        raise ValueError(f"has a concept of {len(given)} characters")
    return " ".join(given.split())


@contextmanager
def _opened(place: str) -> Iterator[Any]:
    """The file, its footer read. Raises UserError for what is no parquet, also while it is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with places.open_binary(place) as file:
        try:
            with places.failures(place):
                # buffer_size: pages are read as they are needed, not whole column chunks.
                yield pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, **_THRIFT)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{place}: is no parquet file, or no whole one: {_short(error)}: fetch it again") from None


def _batches(table: Any, group: int, fields: Fields) -> Iterator[Any]:
    rows = _batch_rows(table.metadata.row_group(group), fields)
    yield from table.iter_batches(rows, row_groups=[group], columns=fields.read, use_threads=False)


def _batch_rows(group: Any, fields: Fields) -> int:
    """How many rows at a time stay below BATCH_BYTES; 1 at least.

    A dictionary's entry is stored once and may be in every row: of such a column, each row may be the whole dictionary.
    """
    row_bytes = 1
    for number in range(group.num_columns):
        column = group.column(number)
        if not any(
            column.path_in_schema == name or column.path_in_schema.startswith(f"{name}.") for name in fields.read
        ):
            continue
        whole = column.total_uncompressed_size
        row_bytes += whole // max(group.num_rows, 1)
        if column.has_dictionary_page and column.dictionary_page_offset is not None:
            packed = max(column.data_page_offset - column.dictionary_page_offset, 0)
            row_bytes += min(whole, packed * _EXPANSION.get(column.compression, whole))
    return max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def open_parquet(place: str, *, name: str, columns: Columns, index: Path | None, progress: Any) -> Parquet:
    """Files of a folder, a pattern or a URL. Raises UserError where there are none, one is broken, or none has rows."""
    files = source_files.files_of(place, suffix=".parquet")
    labels = source_files.labels_of(files, suffix=".parquet")

    def learn(file: str) -> dict[str, Any]:
        with _opened(file) as table:
            fields = fields_of(table.schema_arrow, columns, file)
            groups = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
        return {"fields": asdict(fields), "groups": groups}

    what = f"parquet {VERSION} {columns}"
    found = source_files.learned(files, learn, what=what, index=index, progress=progress)
    shared: dict[Fields, Fields] = {}
    fields, blocks = [], []
    for number, (file, (_, learned)) in enumerate(zip(files, found, strict=True)):
        try:
            parts: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in learned["fields"].items()}
            one = Fields(**parts)
            blocks += list(_blocks(number, learned["groups"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{file}: what the index folder says of it is broken: delete that folder") from None
        # Thousands of files have the same columns, and perhaps the same thousand class names.
        fields.append(shared.setdefault(one, one))
    if not blocks:
        raise UserError(f"{place}: has no rows")
    identities = tuple(identity for identity, _ in found)
    licenses = source_files.licenses_beside(places.parent(files[0]))
    return Parquet(name, tuple(files), tuple(labels), identities, tuple(fields), tuple(blocks), licenses)


def _blocks(file: int, groups: list[int]) -> Iterator[Block]:
    first = 0
    for group, rows in enumerate(groups):
        slices = min(MOST_SLICES, -(-rows // SLICE_ROWS))
        length = -(-rows // slices) if slices else 0
        for before in range(0, rows, length or 1):
            yield Block(file, first + before, min(length, rows - before), start=group, end=before)
        first += rows
