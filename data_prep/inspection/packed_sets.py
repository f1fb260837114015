"""Packed sets as `verify`, `stats` and `tokenizer` read them: by path or URL, a shard at a time, nothing believed."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import parse_text
from limoe_dist.data import places
from limoe_dist.data.manifest import SCHEMA_VERSION, Manifest, Shard, manifest_place

_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class PackedSet:
    place: str
    """Path or URL of its manifest.json."""
    manifest: Manifest

    @property
    def folder(self) -> str:
        return places.parent(self.place)

    def place_of(self, shard: Shard) -> str:
        return places.join(self.folder, shard.file)


def open_set(place: str) -> PackedSet:
    """A manifest by path or URL, or by the folder that holds it. Looks at no shard: what is wrong with them is found.

    Raises UserError where it cannot be read, is no manifest, or is of another schema.
    """
    place = manifest_place(place)
    manifest = parse_text(Manifest, places.read_small(place), place=place)
    if manifest.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{place}: schema_version={manifest.schema_version}, but this version reads {SCHEMA_VERSION}: "
            "pack the shards again with `limoe prep pack`"
        )
    return PackedSet(place, manifest)


@contextmanager
def on_disk(place: str, *, limit_bytes: int) -> Iterator[Path]:
    """The file itself where it is local; of a store a copy in the temporary folder, gone at the end.

    limit_bytes: a copy ends one byte behind it, so that an endless answer is seen as too long. Raises UserError.
    The copy has no name, so a process that is killed leaves nothing behind; the path is this process's alone.
    """
    if not places.is_remote(place):
        with places.failures(place), places.local(place).open("rb"):
            pass
        yield places.local(place)
        return
    with tempfile.TemporaryFile() as copy:
        with places.failures(place), places.open_binary(place) as file:
            left = limit_bytes + 1
            while left and (part := file.read(min(_COPY_BYTES, left))):
                left -= len(part)
                _write(copy, part)
        yield Path(f"/proc/self/fd/{copy.fileno()}")


def batches(path: Path, columns: Sequence[str], *, place: str = "") -> Iterator[pa.RecordBatch]:
    """The record batches of a shard, with these columns alone; the others are not read from the disk.

    place: how errors name the file. Raises UserError where it is no shard, or a value lies outside of the file.
    """
    place = place or str(path)
    try:
        with pa.memory_map(str(path)) as mapped:
            with pa.ipc.open_file(mapped) as reader:
                fields = [reader.schema.get_field_index(name) for name in columns]
                if -1 in fields:
                    raise UserError(f'{place}: no column "{columns[fields.index(-1)]}": pack again')
            options = pa.ipc.IpcReadOptions(included_fields=sorted(fields))
            with pa.ipc.open_file(mapped, options=options) as reader:
                for index in range(reader.num_record_batches):
                    batch = reader.get_batch(index)
                    # Before a value is read: offsets of a damaged shard point anywhere.
                    batch.validate(full=True)
                    yield batch
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: cannot be read as a shard ({reason}): pack again, or copy it again") from None


def _write(copy: IO[bytes], part: bytes) -> None:
    try:
        copy.write(part)
        copy.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{tempfile.gettempdir()}: no space for a copy of a remote shard: set TMPDIR to a larger disk"
        ) from None
