"""`limoe prep pack`: folder sources into Arrow shards with a manifest.

Every picture is decoded once before it is packed; what cannot be packed is named with its reason in rejected.jsonl.
Order of writing: pack.json (what from), shards, rejected.jsonl, manifest.json. Shards without it are no data set.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.progress import track

from data_prep.pictures import Caps, Picture, limit_pillow, read_picture
from data_prep.sources.folder import SOURCES_FILE, Folder, Row, image_file, read_folder
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically
from limoe_dist.data import manifest as manifests
from limoe_dist.data.manifest import Manifest, Shard, Source

FORMAT_VERSION = 1
"""Raised when the same inputs begin to give other shards."""
OURS = ("shard-*.arrow", ".shard-*.tmp", "tokenizer.model", "tokenizer.json", "rejected.jsonl")
"""Files of an output folder that are written anew."""
BATCH_ROWS = 256
BATCH_BYTES = 32_000_000  # well below the 2 GB that the offsets of a `binary` column can address
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


@dataclass(frozen=True)
class PackSettings:
    name: str
    shard_bytes: int
    seed: int
    caps: Caps


@dataclass(frozen=True)
class Packed:
    manifest: Manifest
    rejected: int
    converted: int
    skipped: bool
    """The same inputs had been packed before."""


@dataclass(frozen=True)
class Keyed:
    key: str
    row: Row


@dataclass
class Counts:
    """Of the rows that were packed."""

    of_source: Counter[str]
    converted: int = 0
    without_caption: int = 0
    without_picture: int = 0


@dataclass(frozen=True)
class Rejection:
    image: str
    folder: str
    line: int
    reason: str


def pack(
    sources: Sequence[Path], out: Path, settings: PackSettings, *, threads: int, overwrite: bool, console: Console
) -> Packed:
    """Packs all sources, their rows mixed by the seed. The same inputs give the same bytes, for any number of threads.

    Raises UserError for unreadable captions, where OUT holds shards of other inputs, or where no row is left.
    """
    folders = [read_folder(source) for source in sources]
    names = [folder.path.resolve().name for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f'--source: two folders are named "{twice[0]}", and keys begin with a folder\'s name: '
            "rename one, or pack the folder above them with one captions file"
        )
    inputs = _fingerprint(folders, settings)
    if done := _already_packed(out, inputs, overwrite=overwrite):
        return done
    _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "pack.json", json.dumps({"inputs": inputs, "done": False}) + "\n")

    rejections: list[Rejection] = []
    rows = _shuffled(_keyed(folders, rejections), settings.seed)
    counts = Counts(Counter())
    limit_pillow(settings.caps)
    shown = track(rows, "packing", console=console, transient=True, disable=not console.is_terminal)
    good = _checked(shown, settings.caps, threads, rejections, counts)
    shards = [_finish(out, index, writer) for index, writer in enumerate(_write_shards(out, good, settings))]

    rejections.sort(key=lambda rejection: (rejection.folder, rejection.line, rejection.image))
    lines = (json.dumps(asdict(rejection)) + "\n" for rejection in rejections)
    write_atomically(out / "rejected.jsonl", "".join(lines))
    if not shards:
        first = rejections[0]
        raise UserError(
            f"{out}: all {len(rejections)} rows were rejected, the first because "
            f"{first.image or f'line {first.line}'} {first.reason}: see rejected.jsonl there"
        )
    manifest = Manifest(
        name=settings.name,
        rows=sum(shard.rows for shard in shards),
        shards=tuple(shards),
        sources=_sources(folders, counts.of_source),
        without_caption=counts.without_caption,
        without_picture=counts.without_picture,
    )
    converted = counts.converted
    done_note = {"inputs": inputs, "done": True, "rejected": len(rejections), "converted": converted}
    write_atomically(out / "pack.json", json.dumps(done_note) + "\n")
    manifests.save_manifest(manifest, out / "manifest.json")
    return Packed(manifest, len(rejections), converted, skipped=False)


def _fingerprint(folders: Iterable[Folder], settings: PackSettings) -> str:
    """Changes with the settings, the captions, the licences, and every picture's size or time of change."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, asdict(settings)], sort_keys=True).encode())
    for folder in folders:
        for file in (folder.captions_file, folder.path / SOURCES_FILE):
            digest.update((manifests.sha256_of(file) if file.is_file() else "none").encode())
        digest.update(folder.path.resolve().name.encode())
        for row in folder.rows:
            # Older versions rejected rows of one modality: only with such rows did the same inputs give other shards.
            state = "" if row.image and row.captions else "alone\0"
            try:
                found = os.stat(folder.path / row.image) if row.image else None
                state += f"{row.image}\0{found.st_size}\0{found.st_mtime_ns}\n" if found else ""
            except (OSError, ValueError):
                state += f"{row.image}\0none\n"
            digest.update(state.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _already_packed(out: Path, inputs: str, *, overwrite: bool) -> Packed | None:
    """What is whole and made of these inputs; None where OUT is free, interrupted or may be overwritten."""
    manifest_file = out / "manifest.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file: name a folder")
    try:
        note = json.loads((out / "pack.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        note = None
    if manifest_file.is_file() and isinstance(note, dict) and note.get("inputs") == inputs and note.get("done"):
        try:
            manifest = manifests.load_manifest(manifest_file)
            return Packed(manifest, note["rejected"], note["converted"], skipped=True)
        except UserError:
            return None  # a shard is missing or cut off: the same inputs are packed again
    if note is None and out.is_dir() and not manifest_file.is_file() and any(out.iterdir()):
        raise UserError(f"--out {out}: holds files that are not shards of ours: give a new folder")
    if manifest_file.is_file() and not overwrite:
        raise UserError(
            f"--out {out}: holds shards packed from other inputs or settings: "
            "give another folder, or --overwrite to replace them"
        )
    return None


def _clear(out: Path) -> None:
    """Removes what an earlier run left, the manifest first, so that half of it never passes for a data set."""
    (out / "manifest.json").unlink(missing_ok=True)
    for pattern in OURS:
        for file in out.glob(pattern):
            file.unlink()


def _keyed(folders: Iterable[Folder], rejections: list[Rejection]) -> list[Keyed]:
    """Every row with its key: source/path without suffix; with suffix where that is taken; rejected where both are.

    A text alone has its line in place of a path, and the folder's name too where that key is taken.
    """
    taken: set[str] = set()
    keyed = []
    for folder in folders:
        for row in folder.rows:
            wanted = _keys(row)
            key = next((key for key in wanted if key not in taken), None)
            if key is None:
                rejections.append(_rejection(row, f"its key {wanted[-1]} is taken by an earlier row"))
            else:
                taken.add(key)
                keyed.append(Keyed(key, row))
    return keyed


def _keys(row: Row) -> tuple[str, str]:
    """The key that a row would have, and the one that it has where that is taken."""
    if not row.image:
        line = f"{row.source}/line-{row.line}"
        return line, f"{row.folder.resolve().name}/{line}"
    path = posixpath.normpath(row.image)
    inside = path if path.startswith(row.source + "/") else f"{row.source}/{path}"
    return posixpath.splitext(inside)[0], inside


def _rejection(row: Row, reason: str) -> Rejection:
    return Rejection(row.image, row.folder.resolve().name, row.line, reason)


def _shuffled(rows: Iterable[Keyed], seed: int) -> list[Keyed]:
    """Sorted by a hash of seed and key: a row's place does not depend on the order of the sources."""
    return sorted(
        rows, key=lambda keyed: hashlib.sha256(f"{seed}\0{keyed.key}".encode("utf-8", "surrogatepass")).digest()
    )


def _checked(
    rows: Iterable[Keyed], caps: Caps, threads: int, rejections: list[Rejection], counts: Counts
) -> Iterator[dict[str, Any]]:
    """The rows that can be packed, in order; fills `rejections` and `counts`."""
    with ThreadPoolExecutor(threads) as pool:
        for keyed, future in _ahead(pool, rows, caps, 4 * threads):
            try:
                picture = future.result()
            except (ValueError, OSError) as reason:
                rejections.append(_rejection(keyed.row, str(reason)))
                continue
            counts.of_source[keyed.row.source] += 1
            counts.converted += picture.converted
            counts.without_caption += not keyed.row.captions
            counts.without_picture += not keyed.row.image
            yield {
                "key": keyed.key,
                "image": picture.encoded,
                "captions": list(keyed.row.captions),
                "concept": keyed.row.concept,
                "width": picture.width,
                "height": picture.height,
                "sha256": picture.sha256,
                "source": keyed.row.source,
            }


def _ahead(
    pool: ThreadPoolExecutor, rows: Iterable[Keyed], caps: Caps, window: int
) -> Iterator[tuple[Keyed, Future[Picture]]]:
    """Decodes at most `window` pictures ahead, so that memory stays bounded; yields in the order of `rows`."""
    waiting: list[tuple[Keyed, Future[Picture]]] = []
    for keyed in rows:
        waiting.append((keyed, pool.submit(_check_row, keyed.row, caps)))
        if len(waiting) >= window:
            yield waiting.pop(0)
    yield from waiting


_NO_PICTURE = Picture(b"", width=0, height=0, sha256="", converted=False)


def _check_row(row: Row, caps: Caps) -> Picture:
    if not all(row.captions):
        raise ValueError("has an empty caption")
    try:
        "".join((row.image, row.concept, row.source, *row.captions)).encode()
    except UnicodeEncodeError:
        raise ValueError("has text that is not Unicode (half of a surrogate pair)") from None
    return read_picture(image_file(row), caps) if row.image else _NO_PICTURE


def _write_shards(out: Path, rows: Iterator[dict[str, Any]], settings: PackSettings) -> Iterator[tuple[Path, int]]:
    """Writes (temporary file, rows) one shard after another; each closes with the row that fills it."""
    index = 0
    while (first := next(rows, None)) is not None:
        temporary = out / f".shard-{index:05d}.arrow.{os.getpid()}.tmp"
        count, shard_bytes, batch_bytes, batch = 0, 0, 0, []
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
            row: dict[str, Any] | None = first
            while row is not None:
                batch.append(row)
                # A text alone is all that its row holds; beside a picture, texts do not count.
                size = len(row["image"]) or sum(len(caption.encode()) for caption in row["captions"])
                count, batch_bytes = count + 1, batch_bytes + size
                full = shard_bytes + batch_bytes >= settings.shard_bytes
                if full or len(batch) == BATCH_ROWS or batch_bytes >= BATCH_BYTES:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
                    shard_bytes, batch_bytes, batch = shard_bytes + batch_bytes, 0, []
                row = None if full else next(rows, None)
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))
        yield temporary, count
        index += 1


def _finish(out: Path, index: int, written: tuple[Path, int]) -> Shard:
    """Brings a shard to disk and gives it its name."""
    temporary, rows = written
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    final = out / f"shard-{index:05d}.arrow"
    os.replace(temporary, final)
    return Shard(file=final.name, rows=rows, bytes=final.stat().st_size, sha256=manifests.sha256_of(final))


def _sources(folders: Iterable[Folder], counts: Counter[str]) -> tuple[Source, ...]:
    licenses = {name: license_ for folder in folders for name, license_ in folder.licenses.items()}
    sources = []
    for name in sorted(counts):
        known = licenses.get(name)
        sources.append(
            Source(
                name=name,
                rows=counts[name],
                license=known.license if known else "unknown",
                attribution=known.attribution if known else "",
            )
        )
    return tuple(sources)


def summary(packed: Packed, out: Path) -> list[str]:
    """What was packed, for people: one line for each source, and what was left out."""
    manifest = packed.manifest
    state = "unchanged since it was packed" if packed.skipped else "packed"
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    lines = [
        f"{out / 'manifest.json'}: {state}: {manifest.rows} rows in {len(manifest.shards)} shards, {megabytes:.1f} MB"
    ]
    lines += [f"  {one.name}: {one.rows} rows, licence {one.license}" for one in manifest.sources]
    lines.append(
        f"  {packed.converted} pictures converted to RGB PNG, {packed.rejected} rows rejected (rejected.jsonl)"
    )
    if count := manifest.without_caption:
        lines.append(f"  {count} rows without a caption: pictures alone, for evaluation; {_TRAINING}")
    if count := manifest.without_picture:
        lines.append(f"  {count} rows without a picture: texts alone, for evaluation; {_TRAINING}")
    return lines


_TRAINING = "training needs pairs"
