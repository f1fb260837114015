"""What became of each row of a list: a line as soon as it is known, a parquet file once its part is whole.

OUT/part-00000.tar.partial   pictures of a part that is being worked on
OUT/part-00000.jsonl         its rows so far; a line is written after the bytes of its picture
OUT/part-00000.tar           the pictures, whole
OUT/part-00000.parquet       all rows of the part; its metadata counts them by class
OUT/part-00000-retry-01.*    the same for rows that `limoe prep retry-failed` asked for again: they replace earlier ones
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limoe_dist.config.errors import UserError

FETCHED = "ok"
"""The class of a row whose picture is in the tar, beside those of fetch_errors.CLASSES."""
COUNTS = b"limoe.counts"


@dataclass(slots=True)
class Entry:
    """One row's end. The fields are the columns of the parquet file, in order."""

    key: str
    row: int
    url: str
    error: str
    """A class of fetch_errors.CLASSES, or `ok`."""
    message: str = ""
    http_status: int = 0
    """0: no answer came."""
    bytes: int = 0
    sha256: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    final_url: str = ""
    tries: int = 0
    seconds: float = 0.0
    """Of the last try."""
    caption: str = ""
    carried: str = ""
    """JSON of the list's other columns."""
    at: int = 0
    """Where the picture's bytes begin in the tar; 0 where there is none."""
    end: int = 0
    """Where the tar ended when this was written."""


def schema() -> Any:
    import pyarrow as pa

    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float32()}
    kinds_of = Entry.__annotations__.items()
    return pa.schema([pa.field(name, kinds[kind]) for name, kind in kinds_of if name not in ("at", "end")])


def line_of(entry: Entry) -> bytes:
    return json.dumps([getattr(entry, name) for name in NAMES], separators=(",", ":")).encode() + b"\n"


NAMES = tuple(Entry.__annotations__)


def read_lines(path: Path) -> tuple[list[Entry], int]:
    """(the rows of a part in work, bytes of their lines); a last line that is torn is left out."""
    entries: list[Entry] = []
    length = 0
    try:
        with path.open("rb") as file:
            for line in file:
                values = _values(line)
                if values is None:
                    break
                entries.append(Entry(*values))
                length += len(line)
    except FileNotFoundError:
        pass
    return entries, length


def _values(line: bytes) -> list[Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, list) and len(values) == len(NAMES) else None


def write_table(path: Path, entries: Sequence[Entry], replaced: Counter[str]) -> None:
    """Writes the parquet file under its name once it is on disk.

    replaced: how many rows of each class of earlier files these take the place of.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts = Counter(entry.error for entry in entries)
    counts.subtract(replaced)
    told = {COUNTS: json.dumps({"rows": dict(counts), "bytes": sum(entry.bytes for entry in entries)}).encode()}
    ordered = sorted(entries, key=lambda entry: entry.row)
    columns = {name: [getattr(entry, name) for entry in ordered] for name in schema().names}
    table = pa.table(columns, schema=schema().with_metadata(told))
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class Totals:
    rows: Counter[str]
    """By class, `ok` among them; rows that were asked for again count once."""
    bytes: int
    parts: int

    @property
    def all(self) -> int:
        return self.rows.total()


def totals(out: Path) -> Totals:
    """Of all parts that are whole: the footers of their parquet files, no rows."""
    rows: Counter[str] = Counter()
    size = parts = 0
    for path in sorted(out.glob("part-*.parquet")):
        told = _counts(path)
        rows.update(told["rows"])
        size += told["bytes"]
        parts += 1 if "-retry-" not in path.name else 0
    return Totals(+rows, size, parts)


def _counts(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        told = json.loads(pq.read_schema(path).metadata[COUNTS])
        return {"rows": Counter(told["rows"]), "bytes": int(told["bytes"])}
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no ledger of `limoe prep download`: {error!r}: was it changed?") from None


def latest(out: Path, part: str) -> dict[str, dict[str, Any]]:
    """By key, the rows of a part as they are after all retries. part: "part-00000"."""
    import pyarrow.parquet as pq

    rows: dict[str, dict[str, Any]] = {}
    for path in [out / f"{part}.parquet", *sorted(out.glob(f"{part}-retry-*.parquet"))]:
        for row in pq.read_table(path).to_pylist():
            rows[row["key"]] = row
    return rows


def whole_parts(out: Path) -> Iterator[str]:
    """Names of the parts that are whole, without their retries."""
    for path in sorted(out.glob("part-*.parquet")):
        if "-retry-" not in path.name:
            yield path.stem


def remove_temporaries(out: Path, stem: str) -> None:
    with suppress(OSError):
        (out / f".{stem}.parquet.tmp").unlink()
