"""One shard: rows in columns, to an Arrow IPC file that has its name only when it is whole and on disk."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

from data_prep.imaging.transform import Picture
from limoe_dist.data import manifest as manifests
from limoe_dist.data.manifest import Shard

BATCH_ROWS = 256
BATCH_BYTES = 32_000_000
"""Of pictures and texts: well below the 2 GB that the offsets of a `binary` column can address."""
HELD_BYTES = 128_000_000
"""Of a group's pictures in memory; what comes then waits on disk."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("concept", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("source", pa.string()),
    ]
)
assert tuple(SCHEMA.names) == manifests.COLUMNS


@dataclass(frozen=True, slots=True)
class PackedRow:
    """All columns but the picture's bytes, which are in `Rows`."""

    key: str
    captions: tuple[str, ...]
    concept: str
    width: int
    height: int
    sha256: str
    source: str
    bytes: int
    """Of its picture and texts."""


class Rows:
    """The rows of a group until they are written, in any order.

    folder: where the pictures wait that are more than `held_bytes` together.
    The waiting file has no name, so a process that dies leaves nothing behind.
    """

    def __init__(self, folder: Path, *, held_bytes: int = HELD_BYTES) -> None:
        self.rows: list[PackedRow] = []
        self._folder, self._room = folder, held_bytes
        self._pictures: list[bytes | tuple[int, int]] = []
        self._file: IO[bytes] | None = None

    def add(self, picture: Picture, *, key: str, captions: tuple[str, ...], concept: str, source: str) -> None:
        """Raises OSError where the disk has no room either."""
        encoded = picture.encoded
        texts = sum(len(text.encode()) for text in (key, *captions, concept, source))
        self.rows.append(
            PackedRow(
                key, captions, concept, picture.width, picture.height, picture.sha256, source, len(encoded) + texts
            )
        )
        if len(encoded) <= self._room:
            self._room -= len(encoded)
            self._pictures.append(encoded)
            return
        # From now on all wait on disk: the few that might still fit are not worth a search.
        self._room = 0
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix=".group-", suffix=".tmp")  # noqa: SIM115
        self._pictures.append((self._file.tell(), len(encoded)))
        self._file.write(encoded)

    def picture(self, row: int) -> bytes:
        held = self._pictures[row]
        if isinstance(held, bytes):
            return held
        assert self._file is not None
        self._file.flush()
        return os.pread(self._file.fileno(), held[1], held[0])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def cut(rows: Rows, order: Sequence[int], shard_bytes: int) -> Iterator[Sequence[int]]:
    """Cuts the rows, in their order, into as few shards of equal rows as hold about `shard_bytes` at most."""
    total = sum(rows.rows[row].bytes for row in order)
    shards = min(len(order), -(-total // shard_bytes))
    for shard in range(shards):
        yield order[shard * len(order) // shards : (shard + 1) * len(order) // shards]


def write_shard(file: Path, temporary: Path, rows: Rows, chosen: Sequence[int]) -> Shard:
    """Writes the chosen rows and gives the file its name. Raises OSError; what was written until then is removed."""
    try:
        with _Hashed(temporary) as sink:
            with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), SCHEMA) as writer:
                for batch in _batches(rows, chosen):
                    writer.write_batch(batch)
            sink.sync()
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return Shard(file=file.name, rows=len(chosen), bytes=sink.count, sha256=sink.sha256.hexdigest())


def _batches(rows: Rows, chosen: Sequence[int]) -> Iterator[pa.RecordBatch]:
    batch, batch_bytes = list[int](), 0
    for row in chosen:
        size = rows.rows[row].bytes
        if batch and (len(batch) == BATCH_ROWS or batch_bytes + size > BATCH_BYTES):
            yield _record_batch(rows, batch)
            batch, batch_bytes = [], 0
        batch.append(row)
        batch_bytes += size
    if batch:
        yield _record_batch(rows, batch)


def _record_batch(rows: Rows, chosen: Sequence[int]) -> pa.RecordBatch:
    these = [rows.rows[row] for row in chosen]
    columns = {
        "image": [rows.picture(row) for row in chosen],
        "captions": [list(row.captions) for row in these],
    }
    arrays = [
        pa.array(columns.get(field.name) or [getattr(row, field.name) for row in these], field.type) for field in SCHEMA
    ]
    return pa.record_batch(arrays, schema=SCHEMA)


class _Hashed(io.FileIO):
    """A new file that counts and hashes what is written: its checksum needs no second reading."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.sha256, self.count = hashlib.sha256(), 0

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            # A raw file may take a part only, as the last of a disk's room; the next write then tells why.
            written += super().write(view[written:]) or 0
        self.sha256.update(view)
        self.count += len(view)
        return written

    def sync(self) -> None:
        os.fsync(self.fileno())
