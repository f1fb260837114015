"""drop.parquet: what duplicates were found, with the keys from the fingerprints' files."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.dedup.drop_list import REASONS
from data_prep.dedup.duplicates import Drops
from data_prep.dedup.fingerprints import read_keys

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("reason", pa.string()),
        ("kept", pa.string()),
        ("bits", pa.uint8()),
    ]
)
GROUP_ROWS = 1 << 17


@dataclass(frozen=True)
class Written:
    sha256: str
    reasons_of_file: list[Counter[int]]
    """For each file of fingerprints, how many of its rows are dropped for a reason."""


def write(drops: Drops, files: Sequence[Path], counts: Sequence[int], out: Path) -> Written:
    """Writes the list in the order of the files, whole or not at all.

    counts: rows of each file. Keys of rows that stay for others are held in memory, the others pass by.
    """
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    kept = np.unique(drops.kept_D)
    kept_keys = [keys for _, _, keys in _keys(kept, files, starts)]
    keys_of_kept = pa.concat_arrays([pa.array([], pa.large_string()), *kept_keys])
    reasons: list[Counter[int]] = [Counter() for _ in files]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    words = np.array(REASONS)
    try:
        with temporary.open("wb") as file:
            with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                for index, part, keys in _keys(drops.row_D, files, starts):
                    reason = drops.reason_D[part]
                    reasons[index].update(reason.tolist())
                    of_kept = keys_of_kept.take(pa.array(np.searchsorted(kept, drops.kept_D[part])))
                    columns = [keys, pa.array(words[reason]), of_kept, pa.array(drops.bits_D[part])]
                    writer.write(_table(columns), row_group_size=GROUP_ROWS)
            file.flush()
            os.fsync(file.fileno())
        with temporary.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return Written(digest, reasons)


def _table(columns: Sequence[Any]) -> pa.Table:
    return pa.table([column.cast(field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _keys(rows: Any, files: Sequence[Path], starts: Any) -> Iterator[tuple[int, slice, Any]]:
    """(index of a file, which of `rows` are in it, their keys); rows: in rising order, no file without any."""
    edges = np.searchsorted(rows, starts)
    for index in np.flatnonzero(np.diff(edges)).tolist():
        part = slice(int(edges[index]), int(edges[index + 1]))
        yield index, part, read_keys(files[index], rows[part].astype(np.int64) - starts[index])
