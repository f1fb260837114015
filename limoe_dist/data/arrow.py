"""Rows by number from memory-mapped Arrow shards: only the bytes of the rows that are asked for are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from limoe_dist.config.errors import UserError
from limoe_dist.data.manifest import COLUMNS, Manifest, load_manifest

_TYPES = {
    "key": (pa.string(),),
    "image": (pa.binary(), pa.large_binary()),
    "captions": (pa.list_(pa.string()),),
    "concept": (pa.string(),),
    "width": (pa.int32(),),
    "height": (pa.int32(),),
    "sha256": (pa.string(),),
    "source": (pa.string(),),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One pair, or half of one. `image` is a view of the mapped file, uint8, read-only: the encoded picture."""

    number: int
    """Of the whole set, from 0."""
    key: str
    image: npt.NDArray[np.uint8]
    """(bytes,), none where the row is a text alone."""
    captions: tuple[str, ...]
    """Without those that are empty or blank."""
    concept: str
    source: str
    width: int
    height: int
    """Pixels, as they were when the row was packed; 0 without a picture."""
    shard: int
    index_in_shard: int


@dataclass(frozen=True)
class Part:
    """One manifest of a ShardSet."""

    path: Path
    """Of manifest.json."""
    manifest: Manifest
    first_row: int
    """Its row 0 is this row of the set."""

    @property
    def folder(self) -> Path:
        return self.path.parent


class ShardSet:
    """All rows of a manifest, or of several, one behind the other. For one thread at a time.

    Shards are opened at first use and stay mapped.
    """

    def __init__(self, manifest_path: Path | str, *more: Path | str) -> None:
        """Raises UserError as `load_manifest` does; checksums are compared by `verify_shards`."""
        parts: list[Part] = []
        for given in (Path(manifest_path), *map(Path, more)):
            path = given / "manifest.json" if given.is_dir() else given
            end = parts[-1].first_row + parts[-1].manifest.rows if parts else 0
            parts.append(Part(path, load_manifest(path), end))
        self.parts = tuple(parts)
        # Almost every set has one manifest; what is meant for it alone takes the first.
        self.path, self.manifest, self.folder = parts[0].path, parts[0].manifest, parts[0].folder
        self._entries = [(part.folder / shard.file, shard.rows) for part in parts for shard in part.manifest.shards]
        self._first_rows = np.concatenate([[0], np.cumsum([rows for _, rows in self._entries])])
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def file_of(self, row: Row) -> Path:
        """The shard that holds the row."""
        return self._entries[row.shard][0]

    def row(self, number: int) -> Row:
        """Row `number`, 0 <= number < len(self). Raises IndexError outside, UserError for a damaged shard."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        shard = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        index = number - int(self._first_rows[shard])
        return self._shard(shard).row(index, number=number, shard=shard)

    def open_all(self) -> None:
        """Opens every shard and compares its rows with the manifest's. Raises UserError as `row` would later."""
        for number in range(len(self._entries)):
            self._shard(number)

    def next_in_shard(self, number: int, tries: int) -> Iterator[int]:
        """The rows that stand in for `number`: the next ones of its shard, wrapping to its first; at most `tries`.

        Ends earlier where the shard has no other row. A function of the row alone: every layout takes the same one.
        """
        shard = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        first, rows = int(self._first_rows[shard]), self._entries[shard][1]
        for distance in range(1, min(tries, rows - 1) + 1):
            yield first + (number - first + distance) % rows

    def _shard(self, number: int) -> _Shard:
        shard = self._shards.get(number)
        if shard is None:
            path, rows = self._entries[number]
            shard = self._shards[number] = _Shard(path, rows=rows)
        return shard


class _Shard:
    def __init__(self, path: Path, *, rows: int) -> None:
        self.path = path
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path}: cannot be read as an Arrow file ({error}): pack again, or copy it again"
            ) from None
        self._check_columns(reader.schema)
        self.first_rows = np.concatenate([[0], np.cumsum([batch.num_rows for batch in self.batches])])
        if self.first_rows[-1] != rows:
            raise UserError(f"{path}: {self.first_rows[-1]} rows, but the manifest says {rows}: pack again")
        self.columns: list[dict[str, pa.Array] | None] = [None] * len(self.batches)

    def _check_columns(self, schema: pa.Schema) -> None:
        for name in COLUMNS:
            # A name that comes twice has index -1, too.
            index = schema.get_field_index(name)
            if index < 0:
                raise UserError(f'{self.path}: no column "{name}"; a shard has {", ".join(COLUMNS)}: pack again')
            if schema.field(index).type not in _TYPES[name]:
                raise UserError(
                    f'{self.path}: column "{name}" is {schema.field(index).type}, not {_TYPES[name][0]}: pack again'
                )

    def row(self, index: int, *, number: int, shard: int) -> Row:
        batch = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        columns = self.columns[batch] or self._open_batch(batch)
        i = index - int(self.first_rows[batch])
        buffer = columns["image"][i].as_buffer()
        image = np.frombuffer(buffer if buffer is not None else b"", dtype=np.uint8)
        # The mapping is read-only: a write would end the process, not raise.
        image.flags.writeable = False
        return Row(
            number=number,
            key=columns["key"][i].as_py() or "",
            image=image,
            captions=tuple(text for text in columns["captions"][i].as_py() or () if text and not text.isspace()),
            concept=columns["concept"][i].as_py() or "",
            source=columns["source"][i].as_py() or "",
            width=columns["width"][i].as_py() or 0,
            height=columns["height"][i].as_py() or 0,
            shard=shard,
            index_in_shard=index,
        )

    def _open_batch(self, number: int) -> dict[str, pa.Array]:
        batch = self.batches[number]
        try:
            # Offsets come from the file: unchecked, a hostile one would let a row read outside the mapping.
            batch.validate(full=True)
        except pa.ArrowException as error:
            raise UserError(f"{self.path}: record batch {number} is damaged ({error}): pack again") from None
        columns = self.columns[number] = {name: batch.column(name) for name in COLUMNS}
        return columns
