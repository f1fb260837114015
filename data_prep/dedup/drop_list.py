"""Keys of rows that `limoe prep pack --drop` leaves out: as `limoe prep dedup` writes them, or a text of one a line.

In memory a row takes 17 bytes whatever its key: the sorted 128-bit xxh3 of the keys, and the reason. That two of ten
million keys have the same is less likely than one in 10^24.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from limoe_dist.config.errors import UserError
from limoe_dist.data import places

REASONS = ("exact", "near", "evaluation")
"""Of the column `reason`; a list without it, or another word, gives LISTED."""
LISTED = len(REASONS)
_SAID = (
    "has the same pixels as a row that is kept (drop list)",
    "looks like a row that is kept (drop list)",
    "is, or looks like, a picture of an evaluation set (drop list)",
    "is in the drop list",
)
LONGEST_LINE = 4096
"""Bytes of a line in a text list."""
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class DropList:
    """Which rows to leave out. It can be pickled, and is the same for the same files in any order."""

    high_R: Any
    """(R,) uint64 in rising order: the upper halves of the keys' hashes."""
    low_R: Any
    """(R,) uint64"""
    reason_R: Any
    """(R,) uint8: an index into REASONS, or LISTED."""
    sha256: str
    """Of the files' contents."""

    @staticmethod
    def open(files: Sequence[str | Path]) -> DropList:
        """Reads the lists: *.parquet with a column `key` (and `reason`), any other file as UTF-8 lines.

        Raises UserError for a file that cannot be read or holds something else.
        """
        parts, digests = [np.empty((0, 2), dtype=np.uint64)], []
        reasons = [np.empty(0, dtype=np.uint8)]
        for place in map(str, files):
            digests.append(_sha256(place))
            for keys, words in _read(place):
                parts.append(_hashes(keys))
                known = {word: number for number, word in enumerate(REASONS)}
                reasons.append(np.array([known.get(word, LISTED) for word in words], dtype=np.uint8))
        hashes_R2, reason_R = np.concatenate(parts), np.concatenate(reasons)
        del parts, reasons
        order = np.lexsort((reason_R, hashes_R2[:, 1], hashes_R2[:, 0]))
        together = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
        return DropList(hashes_R2[order, 0], hashes_R2[order, 1], reason_R[order], together)

    def __len__(self) -> int:
        return len(self.high_R)

    def reason(self, full_key: str) -> str | None:
        """Why the row of this key is left out, or None where it is not."""
        high, low = _hashes([full_key])[0]
        place = int(np.searchsorted(self.high_R, high))
        while place < len(self.high_R) and self.high_R[place] == high:
            if self.low_R[place] == low:
                return _SAID[self.reason_R[place]]
            place += 1
        return None


def _hashes(keys: Iterable[str]) -> Any:
    """(R, 2) uint64: upper and lower half of each key's 128-bit xxh3."""
    digests = b"".join(xxhash.xxh3_128_digest(key.encode("utf-8", "surrogatepass")) for key in keys)
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def _sha256(place: str) -> str:
    with places.failures(place), places.open_binary(place) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _read(place: str) -> Iterator[tuple[list[str], list[str]]]:
    """(keys, reasons), some at a time."""
    with places.failures(place), places.open_binary(place) as file:
        if place.partition("?")[0].endswith(".parquet"):
            yield from _read_parquet(place, file)
        else:
            # Files of a store know no limit for a line.
            yield from _read_lines(place, io.BufferedReader(file))  # type: ignore[type-var]


def _read_parquet(place: str, file: IO[bytes]) -> Iterator[tuple[list[str], list[str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        columns = [name for name in ("key", "reason") if name in schema.names]
        if "key" not in columns or not all(_is_text(schema.field(name).type) for name in columns):
            raise UserError(
                f"{place}: has no column `key` of texts: give the drop.parquet that `limoe prep dedup` wrote, "
                "or a text file with one key a line"
            )
        for batch in table.iter_batches(_BATCH_ROWS, columns=columns):
            keys = batch.column("key").to_pylist()
            if None in keys:
                raise UserError(f"{place}: its column `key` has rows without a key: write it again")
            yield keys, batch.column("reason").to_pylist() if "reason" in columns else [""] * len(keys)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{place}: is no whole parquet file: {' '.join(str(error).split())[:200]}") from None


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)


def _read_lines(place: str, file: IO[bytes]) -> Iterator[tuple[list[str], list[str]]]:
    keys: list[str] = []
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        try:
            if len(line) > LONGEST_LINE:
                raise ValueError(f"is longer than {LONGEST_LINE} bytes")
            # Some editors begin a text with a mark that is no part of the first key.
            key = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except ValueError as error:
            raise UserError(
                f"{place}: line {number} {error}: a drop list is a *.parquet or has one key a line"
            ) from None
        if key:
            keys.append(key)
        if len(keys) == _BATCH_ROWS:
            yield keys, [""] * len(keys)
            keys = []
    yield keys, [""] * len(keys)
