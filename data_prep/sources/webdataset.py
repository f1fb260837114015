"""WebDataset tars, as img2dataset, webdataset and `limoe prep download` write them.

A row is a run of members with one key, the name up to the first dot of its last part: KEY.jpg (png, webp, gif, bmp,
tif), KEY.txt (caption, text), and KEY.json with fields such as caption (a text or a list), concept and scores. Other
members are passed over; nothing is unpickled, extracted or opened by a name that the tar gives.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources import files as source_files
from data_prep.sources.columns import (
    CAPTION_NAMES,
    CONCEPT_NAMES,
    Columns,
    captions_of,
    joined,
    scores_of,
)
from data_prep.sources.picture_folder import LARGEST_PICTURE
from data_prep.sources.source import Block, License, Sample
from data_prep.sources.tar import BrokenTarError, Bytes, Member, members
from data_prep.sources.tar_rows import (
    BLOCK_BYTES,
    INDEX_VERSION,
    TEXTS,
    TarIndex,
    TarRow,
    index_tar,
    problem_of,
    tar_rows,
)
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

LARGEST_TEXT = 1 << 20
"""Bytes of a text or JSON member."""


@dataclass(frozen=True)
class WebDataset:
    """Tars as a Source."""

    name: str
    files: tuple[str, ...]
    labels: tuple[str, ...]
    """What keys call each tar."""
    identities: tuple[str, ...]
    columns: Columns
    blocks: tuple[Block, ...] = field(repr=False)
    repeated: tuple[frozenset[int], ...] = field(repr=False)
    """Of each tar, the rows whose key is not the only one."""
    licenses: Mapping[str, License]

    def fingerprint(self) -> str:
        tars = (f"{label}\0{mark}" for label, mark in zip(self.labels, self.identities, strict=True))
        return source_files.fingerprint_of(["webdataset", str(INDEX_VERSION), repr(self.columns), *tars])

    def read(self, block: Block) -> Iterator[Sample]:
        place = self.files[block.file]
        length = block.end - block.start
        count = 0
        try:
            with places.failures(place), places.open_binary(place, block_bytes=min(length, BLOCK_BYTES)) as file:
                opened: Any = file
                # In one go where it can be held: rows are then read with no way back to the disk or the store.
                if length <= 2 * BLOCK_BYTES:
                    file.seek(block.start)
                    opened = io.BytesIO(file.read(length))
                base = block.start if opened is not file else 0
                tar = Bytes(opened, size=block.end, base=base)
                for row in tar_rows(members(tar, block.start, block.end)):
                    yield self._sample(tar, row, block, block.first + count)
                    count += 1
        except BrokenTarError as error:
            raise UserError(f"{place}: changed while it was read: {error}") from None
        if count != block.rows:
            raise UserError(f"{place}: changed while it was read: {count} rows where {block.rows} were: run again")

    def _sample(self, tar: Bytes, row: TarRow, block: Block, number: int) -> Sample:
        label, place = self.labels[block.file], self.files[block.file]
        shown = row.key[:200].decode("utf-8", "backslashreplace")
        where = f"{place}, {shown if shown.isprintable() else repr(row.key[:200])}"
        problem = problem_of(row)
        if number in self.repeated[block.file]:
            problem = problem or "its key is at several places of the tar"
        if not problem:
            try:
                return self._whole(tar, row, f"{label}/{row.key.decode()}", where)
            except ValueError as reason:
                if isinstance(reason, BrokenTarError):
                    raise
                problem = str(reason)
        # No name of a whole row begins with a slash, so this key is nobody else's.
        return Sample(f"{label}//{number}", b"", (), problem=problem, place=where)

    def _whole(self, tar: Bytes, row: TarRow, key: str, where: str) -> Sample:
        """Raises ValueError with the reason for refusing it."""
        fields = _fields(tar, row.json)
        image = _content(tar, row.picture, "picture", LARGEST_PICTURE) if row.picture else b""
        if row.picture and not image:
            raise ValueError("its picture is empty")
        captions = self._captions(_text(tar, row.text), fields)
        if captions == ("",):
            raise ValueError("has an empty caption")
        if not image and not captions:
            raise ValueError("has neither a picture nor a caption")
        return Sample(
            key,
            image,
            captions,
            concept=self._concept(fields),
            scores=scores_of(fields, self.columns.scores),
            place=where,
        )

    def _captions(self, text: str | None, fields: dict[str, Any]) -> tuple[str, ...]:
        wanted = self.columns.caption
        if wanted and wanted not in TEXTS:
            return captions_of(fields.get(wanted))
        found = captions_of(text)
        if not wanted:
            for name in CAPTION_NAMES:
                found += captions_of(fields.get(name))
        return joined(found)

    def _concept(self, fields: dict[str, Any]) -> str:
        for name in (self.columns.concept,) if self.columns.concept else CONCEPT_NAMES:
            value = fields.get(name)
            if isinstance(value, str):
                return " ".join(value.split())
        return ""


def _content(tar: Bytes, member: Member, what: str, limit: int) -> bytes:
    if member.size > limit:
        raise ValueError(f"its {what} has {member.size} bytes, more than {limit}")
    return tar.content(member)


def _text(tar: Bytes, member: Member | None) -> str | None:
    if member is None:
        return None
    try:
        return _content(tar, member, "text", LARGEST_TEXT).decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("its text is not UTF-8") from None


def _fields(tar: Bytes, member: Member | None) -> dict[str, Any]:
    if member is None:
        return {}
    content = _content(tar, member, "JSON", LARGEST_TEXT)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON is broken: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError("its JSON is no object")
    return fields


def open_webdataset(place: str, *, name: str, columns: Columns, index: Path | None, progress: Any) -> WebDataset:
    """Tars of a folder, a pattern or a URL. Raises UserError where there is none, or one is broken or packed."""
    files = _tars(place)
    labels = source_files.labels_of(files, suffix=".tar")
    what = f"webdataset {INDEX_VERSION}"
    found = source_files.learned(files, _index, what=what, index=index, progress=progress)
    indices = [_revived(file, learned) for file, (_, learned) in zip(files, found, strict=True)]
    return WebDataset(
        name,
        tuple(files),
        tuple(labels),
        tuple(identity for identity, _ in found),
        columns,
        tuple(Block(number, *span) for number, one in enumerate(indices) for span in one.blocks),
        tuple(one.repeated for one in indices),
        source_files.licenses_beside(places.parent(files[0])),
    )


def _tars(place: str) -> list[str]:
    try:
        return source_files.files_of(place, suffix=".tar")
    except UserError:
        packed = places.exists(place) and places.is_folder(place) and _packed(place)
        if packed:
            raise UserError(f"{packed}: is packed, and cannot be read from the middle: unpack it to .tar") from None
        raise


def _packed(folder: str) -> str:
    fs, path = places.filesystem(folder)
    with places.failures(folder):
        names = sorted(str(one) for one in fs.find(path, maxdepth=1))
    return next((name for name in names if ".tar." in name or name.endswith(".tgz")), "")


def _index(file: str) -> dict[str, Any]:
    try:
        with places.failures(file), places.open_binary(file) as opened:
            found = index_tar(Bytes(opened, size=opened.seek(0, io.SEEK_END)))
    except BrokenTarError as error:
        raise UserError(f"{file}: {error}") from None
    return {"blocks": found.blocks, "repeated": sorted(found.repeated)}


def _revived(file: str, kept: Any) -> TarIndex:
    try:
        blocks = tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in kept["blocks"])
        return TarIndex(blocks, frozenset(int(row) for row in kept["repeated"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: what the index folder says of it is broken: delete that folder") from None
