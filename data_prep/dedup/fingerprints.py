"""Fingerprints of every picture of a source, in files that are written once: what `limoe prep dedup` searches in.

A unit is a run of blocks with about a thousand rows; its file appears whole or not at all, so a run that was killed
goes on behind the units that are done. In memory a fingerprint takes 39 bytes; keys stay in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_prep.imaging import phash
from data_prep.imaging.pictures import Caps, rgb_pixels
from data_prep.imaging.transform import versions
from data_prep.sources.opening import full_key
from data_prep.sources.source import Block, Source
from limoe_dist.config.errors import UserError

FORMAT_VERSION = 1
"""Raised when the same picture begins to give another fingerprint: then all are made again."""
UNIT_ROWS = 1024
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("key_hash", pa.uint64()),
        ("sha256", pa.binary(32)),
        ("hash", pa.uint64()),
        ("information", pa.uint8()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.uint16()),
    ]
)
_LARGEST_U16, _LARGEST_U32 = (1 << 16) - 1, (1 << 32) - 1


@dataclass(frozen=True)
class Unit:
    """Blocks of one source whose fingerprints are one file."""

    source: int
    """Index into the sources of the command."""
    file: Path
    blocks: tuple[Block, ...]
    rows: int


@dataclass(frozen=True)
class Tally:
    """Rows by what they are; each is one of the three."""

    pictures: int
    """Rows with a fingerprint."""
    texts: int
    """Rows without a picture."""
    refused: int
    """Rows that the source refuses, or whose picture cannot be decoded: left to `pack`, which names the reason."""


def folder_of(source: Source, caps: Caps) -> str:
    """Name of the folder for a source's fingerprints; changes where they would: other decoders give other pixels."""
    told = json.dumps([FORMAT_VERSION, UNIT_ROWS, versions(), source.name, source.fingerprint(), asdict(caps)])
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def units_of(sources: Sequence[Source], folder: Path, caps: Caps) -> list[Unit]:
    """The units of all sources; their cut depends on the blocks alone."""
    units: list[Unit] = []
    for index, source in enumerate(sources):
        place, number, rows, blocks = folder / folder_of(source, caps), 0, 0, list[Block]()
        for block in source.blocks:
            blocks.append(block)
            rows += block.rows
            if rows >= UNIT_ROWS:
                units.append(Unit(index, place / f"{number:06d}.arrow", tuple(blocks), rows))
                number, rows, blocks = number + 1, 0, []
        if blocks:
            units.append(Unit(index, place / f"{number:06d}.arrow", tuple(blocks), rows))
    return units


def write_fingerprints(source: Source, unit: Unit, caps: Caps) -> None:
    """Decodes every picture of the unit once, and writes the file. Raises UserError and OSError."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    texts = refused = 0
    for block in unit.blocks:
        for sample in source.read(block):
            if not sample.image and not sample.problem:
                texts += 1
                continue
            try:
                if sample.problem:
                    raise ValueError(sample.problem)
                key = full_key(source, sample)
                values = (key, _key_hash(key), *_of_picture(sample.image, caps), len(sample.captions))
            except ValueError:
                refused += 1
                continue
            for name, value in zip(SCHEMA.names, values, strict=True):
                columns[name].append(value)
    columns["captions"] = [min(count, _LARGEST_U16) for count in columns["captions"]]
    batch = pa.RecordBatch.from_pydict(columns, schema=SCHEMA)
    write_unit(unit.file, batch, Tally(batch.num_rows, texts, refused))


def write_unit(file: Path, batch: pa.RecordBatch, tally: Tally) -> None:
    """Beside the place, to disk, and renamed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    schema = SCHEMA.with_metadata({"tally": json.dumps(asdict(tally))})
    try:
        with pa.OSFile(str(temporary), "wb") as opened, pa.ipc.new_file(opened, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _key_hash(key: str) -> int:
    # A key that is no text (half of a surrogate pair) raises UnicodeEncodeError, a ValueError: pack refuses it too.
    return xxhash.xxh3_64_intdigest(key.encode())


def _of_picture(encoded: bytes, caps: Caps) -> tuple[bytes, int, int, int, int]:
    """(sha256 of the pixels and their shape, hash, information, width, height)."""
    pixels_HW3 = np.ascontiguousarray(rgb_pixels(encoded, caps))
    height, width, _ = pixels_HW3.shape
    digest = hashlib.sha256(f"{width}x{height}\n".encode())
    digest.update(pixels_HW3.data)
    found = phash.dct_hash(pixels_HW3)
    return digest.digest(), found.bits, found.information, width, height


@dataclass
class Prints:
    """All fingerprints, R of them, in the order of the units. Not frozen: a search lets go of what it has used."""

    sha_R2: Any
    """(R, 2) uint64: the first 128 bits."""
    hash_R: Any
    """(R,) uint64"""
    plain_R: Any
    """(R,) bool: the hash has too little information to compare pictures by."""
    pixels_R: Any
    """(R,) uint32: width * height."""
    captions_R: Any
    """(R,) uint16"""
    key_R: Any
    """(R,) uint64: xxh3 of the key, which decides between rows that are alike in all else."""


def read_tally(file: Path) -> Tally:
    with opened_unit(file) as reader:
        return Tally(**json.loads(reader.schema.metadata[b"tally"]))


def read_prints(files: Sequence[Path], rows: Sequence[int]) -> Prints:
    """Fills arrays from unit files that hold so many rows each."""
    total = sum(rows)
    prints = Prints(
        sha_R2=np.empty((total, 2), dtype=np.uint64),
        hash_R=np.empty(total, dtype=np.uint64),
        plain_R=np.empty(total, dtype=bool),
        pixels_R=np.empty(total, dtype=np.uint32),
        captions_R=np.empty(total, dtype=np.uint16),
        key_R=np.empty(total, dtype=np.uint64),
    )
    start = 0
    for file, count in zip(files, rows, strict=True):
        with opened_unit(file) as reader:
            batch = reader.get_batch(0)
            if batch.num_rows != count:
                raise _broken(file)
            part = slice(start, start + count)
            digests = np.frombuffer(batch.column("sha256").buffers()[1], dtype=np.uint64, count=count * 4)
            prints.sha_R2[part] = digests.reshape(count, 4)[:, :2]
            prints.hash_R[part] = batch.column("hash")
            prints.plain_R[part] = np.asarray(batch.column("information")) < phash.LEAST_INFORMATION
            sides = [np.asarray(batch.column(name)).astype(np.int64) for name in ("width", "height")]
            prints.pixels_R[part] = np.minimum(sides[0] * sides[1], _LARGEST_U32)
            prints.captions_R[part] = batch.column("captions")
            prints.key_R[part] = batch.column("key_hash")
            start += count
    return prints


def read_keys(file: Path, rows: Any) -> pa.Array:
    """The keys of these rows of a unit's file, as large_string."""
    with opened_unit(file) as reader:
        keys = reader.get_batch(0).column("key").take(pa.array(rows, type=pa.int64()))
        return keys.cast(pa.large_string())


@contextmanager
def opened_unit(file: Path) -> Iterator[Any]:
    """A unit's file, mapped for as long as the block lasts. Raises UserError where it is not as it was written."""
    try:
        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_file(mapped)
            if not reader.schema.equals(SCHEMA) or reader.num_record_batches != 1:
                raise pa.ArrowInvalid("another schema")
            yield reader
    except (pa.ArrowException, OSError, KeyError):
        raise _broken(file) from None


def _broken(file: Path) -> UserError:
    return UserError(f"{file}: is missing or damaged: delete {file.parent} and run again")
