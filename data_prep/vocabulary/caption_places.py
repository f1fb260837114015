"""Captions alone, from shards, lists and text files by path or URL, a batch in memory at a time."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data_prep.inspection.packed_sets import PackedSet, batches, on_disk, open_set
from limoe_dist.config.errors import UserError, nearest
from limoe_dist.data import places

COLUMNS = ("caption", "captions", "text", "TEXT", "caption_text", "alt_text")
"""Tried in this order where --text names no column."""
KINDS = ("manifest.json", ".parquet", ".csv", ".tsv", ".jsonl", ".txt")
_LONGEST_LINE = 16 << 20
_BLOCK_BYTES = 4 << 20
_BATCH_ROWS = 4096


@dataclass(frozen=True)
class Text:
    """One --text: PLACE or PLACE:COLUMN."""

    place: str
    column: str
    """Empty: the first of COLUMNS that is there. A number: of a CSV or TSV without a line of names, from 0."""

    @staticmethod
    def parse(given: str) -> Text:
        """PLACE:COLUMN is cut at the last colon, where no / comes behind it."""
        place, _, column = given.rpartition(":")
        return Text(place, column) if place and column and "/" not in column else Text(given.removesuffix(":"), "")

    def files(self) -> list[str]:
        """Raises UserError where there is none, or one of another kind."""
        found = places.expand(self.place, suffixes=tuple(f"{kind}{end}" for kind in KINDS for end in ("", ".gz")))
        for file in found:
            _reader_of(file)
        return found


def captions_of_set(packed: PackedSet) -> Iterator[str]:
    """All captions of packed shards, in their order. Raises UserError for a damaged shard."""
    for shard in packed.manifest.shards:
        place = packed.place_of(shard)
        with on_disk(place, limit_bytes=shard.bytes) as path:
            for batch in batches(path, ["captions"], place=place):
                yield from _texts(batch.column("captions"))


def captions_of_file(file: str, column: str) -> Iterator[str]:
    """All captions of one file. Raises UserError where it cannot be read, or has no such column."""
    yield from _reader_of(file)(file, column)


def _reader_of(file: str) -> Callable[[str, str], Iterator[str]]:
    name = places.name_of(file).lower().removesuffix(".gz")
    readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".txt": _lines}
    if name == "manifest.json":
        return lambda place, _: captions_of_set(open_set(place))
    for ending, reader in readers.items():
        if name.endswith(ending):
            return reader
    raise UserError(f"--text {file}: is of no known kind: its name must end with {', '.join(KINDS)}, or these with .gz")


def _parquet(place: str, column: str) -> Iterator[str]:
    with _damage(place), places.open_binary(place) as file:
        opened = pq.ParquetFile(file)
        name = _column(opened.schema_arrow.names, column, place)
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS, columns=[name]):
            yield from _texts(batch.column(0))


def _csv(place: str, column: str) -> Iterator[str]:
    tabs = places.name_of(place).lower().removesuffix(".gz").endswith(".tsv")
    # Lists in TSV do not quote: a caption that begins with " would swallow the lines behind it.
    parse = pa.csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char=False if tabs else '"',
        newlines_in_values=not tabs,
        invalid_row_handler=lambda row: "skip",
    )
    read = pa.csv.ReadOptions(block_size=_BLOCK_BYTES, autogenerate_column_names=column.isdigit(), use_threads=False)
    with _damage(place):
        if column.isdigit():
            name = f"f{column}"
        else:
            with _opened(place) as file:
                reader = pa.csv.open_csv(file, read_options=read, parse_options=parse)
                name = _column(reader.schema.names, column, place)
        # As bytes: one that is no UTF-8 spoils its own caption, not the file.
        convert = pa.csv.ConvertOptions(include_columns=[name], column_types={name: pa.binary()})
        with _opened(place) as file:
            for batch in pa.csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert):
                for value in batch.column(0).to_pylist():
                    if value:
                        yield value.decode("utf-8", "replace")


def _jsonl(place: str, column: str) -> Iterator[str]:
    for number, line in _numbered(place):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"--text {place}: line {number} is no JSON") from None
        if not isinstance(row, dict):
            raise UserError(f"--text {place}: line {number} is no object with captions")
        names = [column] if column else [name for name in COLUMNS if name in row][:1]
        values = [row.get(name) for name in names]
        for value in values[0] if values and isinstance(values[0], list) else values:
            if isinstance(value, str) and value:
                yield value.encode("utf-8", "replace").decode()


def _lines(place: str, column: str) -> Iterator[str]:
    if column:
        raise UserError(f"--text {place}:{column}: a text file has no columns: each line is a caption")
    yield from (text for _, text in _numbered(place))


def _numbered(place: str) -> Iterator[tuple[int, str]]:
    """(number of the line in the file, its text) of every line that is not blank."""
    number = 0
    with _damage(place), _opened(place) as file:
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                raise UserError(f"--text {place}: a line of more than {_LONGEST_LINE} bytes: this is no list")
            if text := line.decode("utf-8", "replace").strip():
                yield number, text


def _texts(column: pa.Array) -> Iterator[str]:
    """The texts of a column of texts, or of lists of texts, without empty ones."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    # As bytes: one that is no UTF-8 spoils its own caption, not the file.
    if pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    for text in column.to_pylist():
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        if text and isinstance(text, str):
            yield text


def _column(names: Sequence[str], asked: str, place: str) -> str:
    if asked in names or (not asked and any(name in names for name in COLUMNS)):
        return asked or next(name for name in COLUMNS if name in names)
    shown = ", ".join(names[:30])
    hint = nearest(asked, names) if asked else f": name one, as in --text {place}:{names[0] if names else 'COLUMN'}"
    what = f'no column "{asked}"' if asked else f"none of the columns {', '.join(COLUMNS)}"
    raise UserError(f"--text {place}: has {what}{hint} (it has: {shown})")


def _opened(place: str) -> IO[bytes]:
    file = places.open_binary(place)
    if places.name_of(place).lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    # Files of a store know no limit for a line.
    return io.BufferedReader(file)  # type: ignore[type-var]


class _damage:
    """Turns what parsers raise on broken files, and stores while being read, into a UserError that names the file."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        broken = isinstance(error, pa.ArrowException | EOFError | OSError | KeyError | UnicodeDecodeError | zlib.error)
        if broken or type(error).__module__.split(".")[0] in places.STORES:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--text {self._place}: cannot be read: {reason}") from None
