"""Rows by number from memory-mapped Arrow shards: only the bytes of the rows that are asked for are read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Data
from limoe_dist.data.manifest import COLUMNS, Manifest, load_manifest, manifest_place
from limoe_dist.data.places import is_remote, join, parent

if TYPE_CHECKING:
    from limoe_dist.data.cache import ShardCache

MOST_OPEN = 64
"""Shards that stay mapped, where nobody asks for more."""

TYPES = {
    "key": (pa.string(),),
    "image": (pa.binary(), pa.large_binary()),
    "captions": (pa.list_(pa.string()),),
    "concept": (pa.string(),),
    "width": (pa.int32(),),
    "height": (pa.int32(),),
    "sha256": (pa.string(),),
    "source": (pa.string(),),
}
"""Of each column of a shard: what it may be; the first is what pack writes."""


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

    path: str
    """Of manifest.json; a path or a URL."""
    manifest: Manifest
    first_row: int
    """Its row 0 is this row of the set."""

    @property
    def folder(self) -> str:
        return parent(self.path)


class ShardSet:
    """All rows of a manifest, or of several, one behind the other. For one thread at a time.

    Shards are opened, and fetched where they have a URL, when a row of theirs is asked for; the `most_open` used last
    stay mapped, so that memory does not grow with what was read.
    """

    def __init__(self, manifest: Path | str, *more: Path | str, data: Data | None = None) -> None:
        """data: the settings data.cache and data.cache_gb, for shards from a URL.

        Raises UserError as `load_manifest` does; checksums are compared by `verify_shards`, or on arrival.
        """
        parts: list[Part] = []
        for given in (manifest, *more):
            path = manifest_place(given)
            end = parts[-1].first_row + parts[-1].manifest.rows if parts else 0
            parts.append(Part(path, load_manifest(path), end))
        self.parts = tuple(parts)
        # Almost every set has one manifest; what is meant for it alone takes the first.
        self.path, self.manifest, self.folder = parts[0].path, parts[0].manifest, parts[0].folder
        self.cache = _cache_for(parts, data or Data())
        # What a rank has open it holds in the host's cache.
        self.most_open = MOST_OPEN if self.cache is None else 2
        self._entries = [(join(part.folder, shard.file), shard) for part in parts for shard in part.manifest.shards]
        self._first_rows = np.concatenate([[0], np.cumsum([shard.rows for _, shard in self._entries])])
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def file_of(self, row: Row) -> str:
        """The shard that holds the row: a path or a URL."""
        return self._entries[row.shard][0]

    def row(self, number: int) -> Row:
        """Row `number`, 0 <= number < len(self). Raises IndexError outside, UserError for a damaged shard."""
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        shard = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        index = number - int(self._first_rows[shard])
        return self._shard(shard).row(index, number=number, shard=shard)

    def open_all(self, *, rank: int = 0, world: int = 1) -> None:
        """Opens every `world`-th local shard from the `rank`-th on, and compares its rows with the manifest's.

        Raises UserError as `row` would later.
        """
        for number in range(rank, len(self._entries), world):
            if not is_remote(self._entries[number][0]):
                self._shard(number)

    def want(self, numbers: Sequence[int]) -> None:
        """The shards that will be read next, in this order: those with a URL are fetched ahead."""
        if self.cache is not None:
            from limoe_dist.data.cache import Wanted

            entries = [self._entries[number] for number in numbers]
            self.cache.want([Wanted(url, one.bytes, one.sha256) for url, one in entries if is_remote(url)])

    def next_in_shard(self, number: int, tries: int) -> Iterator[int]:
        """The rows that stand in for `number`: the next ones of its shard, wrapping to its first; at most `tries`.

        Ends earlier where the shard has no other row. A function of the row alone: every layout takes the same one.
        """
        shard = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        first, rows = int(self._first_rows[shard]), self._entries[shard][1].rows
        for distance in range(1, min(tries, rows - 1) + 1):
            yield first + (number - first + distance) % rows

    def close(self) -> None:
        """Gives back all shards and ends the fetching; rows that were handed out stay readable."""
        while self._open:
            self._open.popitem()[1].close()
        if self.cache is not None:
            self.cache.close()

    def _shard(self, number: int) -> _Shard:
        shard = self._open.get(number)
        if shard is None:
            # First, so that a small cache has room for the next one.
            while len(self._open) >= self.most_open:
                self._open.popitem(last=False)[1].close()
            shard = self._open[number] = self._opened(number)
        self._open.move_to_end(number)
        return shard

    def _opened(self, number: int) -> _Shard:
        place, entry = self._entries[number]
        if self.cache is None or not is_remote(place):
            return _Shard(Path(place), rows=entry.rows)
        fetched = self.cache.local_path(place, bytes=entry.bytes, sha256=entry.sha256)
        try:
            return _Shard(fetched.path, rows=entry.rows, place=place, close=fetched.release)
        except BaseException:
            fetched.release()
            raise


def _cache_for(parts: Sequence[Part], data: Data) -> ShardCache | None:
    if not any(is_remote(part.path) for part in parts):
        return None
    from limoe_dist.data.cache import open_cache

    return open_cache(data)


def _nothing() -> None:
    """A local shard is given back by being forgotten: no page stays mapped."""


class _Shard:
    def __init__(self, path: Path, *, rows: int, place: str = "", close: Callable[[], None] = _nothing) -> None:
        """place: where `path` was fetched from. close: called once the shard is no longer read."""
        self.path, self.close = place or path, close
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
            if schema.field(index).type not in TYPES[name]:
                raise UserError(
                    f'{self.path}: column "{name}" is {schema.field(index).type}, not {TYPES[name][0]}: pack again'
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
