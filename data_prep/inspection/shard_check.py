"""One shard against its manifest entry, and each of its rows against itself; nothing in the file is believed."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_prep.imaging.pictures import Caps, check_picture, limit_pillow, rgb_pixels
from data_prep.inspection.findings import Findings
from data_prep.inspection.packed_sets import on_disk
from limoe_dist.config.errors import UserError
from limoe_dist.data.arrow import TYPES
from limoe_dist.data.header import MAX_ENCODED_BYTES, MAX_PIXELS, declared_size
from limoe_dist.data.manifest import COLUMNS, Shard, sha256_of

CAPS = Caps(max_bytes=MAX_ENCODED_BYTES, max_pixels=MAX_PIXELS)
"""What training reads."""
_MOST_SOURCES = 10_000


@dataclass(frozen=True)
class ShardTask:
    place: str
    """Path or URL."""
    shard: Shard
    number: int
    """Of the manifest's shards."""
    decoded: npt.NDArray[np.int64] | None
    """Rows of this shard whose pictures are decoded, sorted; None: all."""


@dataclass
class ShardResult:
    number: int
    findings: Findings = field(default_factory=Findings)
    bytes: int = 0
    rows: int = 0
    """As they were found, not as the manifest says."""
    whole: bool = True
    """Every row was looked at; else what is counted over rows proves nothing."""
    without_caption: int = 0
    without_picture: int = 0
    decoded: int = 0
    of_source: Counter[str] = field(default_factory=Counter)
    keys: bytearray = field(default_factory=bytearray)
    """16 bytes a row: the 128-bit hash of its key."""
    key_rows: list[int] = field(default_factory=list)
    """Rows of this shard that `keys` belong to."""


def check_shard(task: ShardTask) -> ShardResult:
    """Looks at the whole file, all its rows, and the pixels of some. What is wrong is in the result; nothing raises."""
    result = ShardResult(task.number)
    try:
        with on_disk(task.place, limit_bytes=task.shard.bytes) as path:
            _check_file(path, task, result)
            _check_rows(path, task, result)
    except UserError as error:
        result.whole = False
        result.findings.add("missing or unreadable shard", task.shard.file, str(error))
    return result


def _check_file(path: Path, task: ShardTask, result: ShardResult) -> None:
    result.bytes, wanted = path.stat().st_size, task.shard.bytes
    if result.bytes != wanted:
        more = "more than " if result.bytes > wanted else ""
        what = f"{more}{min(result.bytes, wanted) if more else result.bytes} bytes, but the manifest says {wanted}"
        result.findings.add("size of a shard", task.shard.file, what)
    elif (found := sha256_of(path)) != task.shard.sha256:
        what = f"sha256 is {found[:12]}..., but the manifest says {task.shard.sha256[:12]}...: changed after packing"
        result.findings.add("checksum of a shard", task.shard.file, what)


def _check_rows(path: Path, task: ShardTask, result: ShardResult) -> None:
    name = task.shard.file
    try:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            if not _columns_are_right(reader.schema, name, result):
                return
            for index in range(reader.num_record_batches):
                _check_batch(reader.get_batch(index), index, task, result)
    except (pa.ArrowException, OSError) as error:
        result.whole = False
        result.findings.add("no Arrow file", name, " ".join(str(error).split())[:200])
        return
    if result.rows != task.shard.rows:
        what = f"{result.rows} rows, but the manifest says {task.shard.rows}"
        result.findings.add("rows of a shard", name, what)


def _columns_are_right(schema: pa.Schema, name: str, result: ShardResult) -> bool:
    for column in COLUMNS:
        # A name that comes twice has index -1, too.
        index = schema.get_field_index(column)
        if index < 0:
            result.findings.add("schema", name, f'no column "{column}", or more than one')
            result.whole = False
        elif schema.field(index).type not in TYPES[column]:
            what = f'column "{column}" is {schema.field(index).type}, not {TYPES[column][0]}'
            result.findings.add("schema", name, what)
            result.whole = False
    return result.whole


def _check_batch(batch: pa.RecordBatch, index: int, task: ShardTask, result: ShardResult) -> None:
    first = result.rows
    result.rows += batch.num_rows
    columns = {name: batch.column(name) for name in COLUMNS}
    for name, column in columns.items():
        try:
            column.validate(full=True)
        except pa.ArrowException as error:
            # Offsets that point outside, or bytes that are no UTF-8: no value of this batch may be touched.
            result.whole = False
            reason = " ".join(str(error).split())[:200]
            result.findings.add("damaged values", f"{task.shard.file} batch {index}", f'column "{name}": {reason}')
            return
    _count(columns, result)
    keys = columns["key"].to_pylist()
    _check_keys(keys, first, task, result)
    _check_texts(columns, keys, task, result)
    _check_pictures(columns, keys, first, task, result)


def _count(columns: dict[str, pa.Array], result: ShardResult) -> None:
    texts = pc.fill_null(pc.list_value_length(columns["captions"]), 0).to_numpy(zero_copy_only=False)
    sizes = pc.fill_null(pc.binary_length(columns["image"]), 0).to_numpy(zero_copy_only=False)
    result.without_caption += int((texts == 0).sum())
    result.without_picture += int((sizes == 0).sum())
    for one in columns["source"].value_counts().to_pylist():
        # A hostile shard names a source a row; the manifest's names are few.
        if len(result.of_source) < _MOST_SOURCES:
            result.of_source[one["values"] or ""] += one["counts"]


def _check_keys(keys: list[str | None], first: int, task: ShardTask, result: ShardResult) -> None:
    for row, key in enumerate(keys, start=first):
        if not key:
            result.findings.add("row without a key", f"{task.shard.file} row {row}", "the key is empty")
            continue
        result.keys += xxhash.xxh3_128_digest(key.encode())
        result.key_rows.append(row)


def _check_texts(columns: dict[str, pa.Array], keys: list[str | None], task: ShardTask, result: ShardResult) -> None:
    captions = columns["captions"]
    texts = captions.flatten()
    if texts.null_count or pc.any(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)).as_py():
        for key, row in zip(keys, captions.to_pylist(), strict=True):
            if any(not text or text.isspace() for text in row or ()):
                result.findings.add("blank caption", f"{task.shard.file} {key}", "a caption of white space, or none")


def _check_pictures(
    columns: dict[str, pa.Array], keys: list[str | None], first: int, task: ShardTask, result: ShardResult
) -> None:
    rows = _decoded_rows(task.decoded, first, len(keys))
    widths, heights, sums = (columns[name].to_pylist() for name in ("width", "height", "sha256"))
    texts = pc.list_value_length(columns["captions"]).to_pylist()
    for i, key in enumerate(keys):
        buffer = columns["image"][i].as_buffer()
        where = f"{task.shard.file} {key or f'row {first + i}'}"
        declared = (widths[i] or 0, heights[i] or 0)
        if buffer is None or not len(buffer):
            if not texts[i]:
                result.findings.add("empty row", where, "neither picture nor caption")
            if declared != (0, 0):
                result.findings.add("size of a picture", where, f"declared as {_size(declared)}, but there is none")
            continue
        _check_picture(memoryview(buffer), declared, sums[i] or "", where, whole=i in rows, result=result)


def _decoded_rows(decoded: npt.NDArray[np.int64] | None, first: int, count: int) -> range | set[int]:
    """Which rows of a batch, counted from its first, are decoded."""
    if decoded is None:
        return range(count)
    start, end = np.searchsorted(decoded, [first, first + count])
    return {int(row) - first for row in decoded[start:end]}


def _check_picture(
    image: memoryview, declared: tuple[int, int], sha256: str, where: str, *, whole: bool, result: ShardResult
) -> None:
    """The header of every picture; whole: its bytes and its pixels, too."""
    findings = result.findings
    if len(image) > CAPS.max_bytes:
        findings.add("picture that training refuses", where, f"{len(image)} bytes, more than {CAPS.max_bytes}")
        return
    try:
        size = declared_size(np.frombuffer(image, dtype=np.uint8))
    except ValueError as error:
        findings.add("picture that training refuses", where, str(error))
        return
    if size[0] * size[1] > CAPS.max_pixels:
        findings.add("picture that training refuses", where, f"{_size(size)} pixels, more than {CAPS.max_pixels}")
        return
    if size != declared:
        findings.add("size of a picture", where, f"declared as {_size(declared)}, its header says {_size(size)}")
    if not whole:
        return
    result.decoded += 1
    if (found := hashlib.sha256(image).hexdigest()) != sha256:
        what = f"sha256 of its bytes is {found[:12]}..., the column says {sha256[:12]}..."
        findings.add("checksum of a picture", where, what)
    try:
        limit_pillow(CAPS)
        decoded, alike = _decoded(bytes(image))
    except ValueError as error:
        findings.add("picture that cannot be decoded", where, str(error))
        return
    if decoded != declared:
        findings.add("size of a picture", where, f"declared as {_size(declared)}, decoded it is {_size(decoded)}")
    if not alike:
        what = "alpha, a palette, CMYK, 16 bits, rotation, animation, or bytes behind its end: no pack stores it so"
        findings.add("picture that decoders read differently", where, what)


def _decoded(image: bytes) -> tuple[tuple[int, int], bool]:
    """(width and height of its pixels, whether all decoders read it alike). Raises ValueError."""
    if image.startswith(b"RIFF"):
        height, width = rgb_pixels(image, CAPS).shape[:2]
        return (width, height), True
    # As it would be packed: what would be written anew, or cut, was not packed by us.
    packed = check_picture(image, CAPS)
    return (packed.width, packed.height), packed.encoded == image


def _size(of: tuple[int, int]) -> str:
    return f"{of[0]} x {of[1]}"
