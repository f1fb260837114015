"""The work on one group of rows: read, refuse or transform, shuffle, write; the note that it is done comes last.

What it writes depends on the plan, the sources and the settings, never on who does it. OUT/groups holds one note a
group, group-000007.json, with the reasons of its rejected rows beside it; a group without its note is done anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.dedup.drop_list import DropList
from data_prep.imaging.filters import Filters
from data_prep.imaging.pictures import limit_pillow
from data_prep.imaging.transform import Picture, Transform, transformed
from data_prep.packing.plan import Plan, blocks_of
from data_prep.packing.shard_file import Rows, cut, write_shard
from data_prep.sources.opening import full_key
from data_prep.sources.source import Sample, Source
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically
from limoe_dist.data.manifest import Shard

NOTES = "groups"
"""Folder in OUT for the notes of what is done."""
TOLD_EVERY = 32
"""Rows between two words to the one who shows progress."""
KINDS = 100
"""Kinds of reasons that are counted apart; strangers write part of them."""


@dataclass(frozen=True)
class GroupSettings:
    """What a row goes through."""

    seed: int
    shard_bytes: int
    transform: Transform
    filters: Filters


@dataclass(frozen=True)
class Work:
    """All that a process needs to do any group; it can be pickled."""

    out: Path
    inputs: str
    """Fingerprint of all that decides the shards: a note with another one is not believed."""
    sources: Sequence[Source]
    """As `by_name` gives them."""
    plan: Plan
    settings: GroupSettings
    drop: DropList | None

    def note(self, group: int) -> Path:
        return self.out / NOTES / f"group-{group:06d}.json"

    def rejected(self, group: int) -> Path:
        return self.out / NOTES / f"group-{group:06d}.rejected.jsonl"


class GroupNote(BaseModel):
    """What a group became."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: str
    shards: tuple[Shard, ...]
    sources: dict[str, int]
    """Rows packed, by the column `source`."""
    read: int
    rejected: int
    rejected_bytes: int
    """Of the file of reasons: with it a file that lost its end is seen."""
    kinds: dict[str, int]
    """Rejected rows by kind of reason."""
    converted: int = 0
    without_caption: int = 0
    without_picture: int = 0


def read_note(work: Work, group: int) -> GroupNote | None:
    """None where the group is not done, or what it wrote is no longer there."""
    try:
        note = GroupNote.model_validate_json(work.note(group).read_bytes())
        sizes = [((work.out / shard.file).stat().st_size, shard.bytes) for shard in note.shards]
        sizes.append((work.rejected(group).stat().st_size, note.rejected_bytes))
    except (OSError, ValidationError):
        return None
    return note if note.inputs == work.inputs and all(there == noted for there, noted in sizes) else None


def pack_group(work: Work, group: int, tell: Callable[[int], None]) -> None:
    """Does one group. tell: called with numbers of rows that have been read since.

    Raises UserError where a source can no longer be read, or OUT not be written; no note is left then.
    """
    try:
        _pack_group(work, group, tell)
    except OSError as error:
        raise UserError(unwritable(work.out, error)) from None


def unwritable(out: Path, error: OSError) -> str:
    return (
        f"--out {out}: cannot be written: {error.strerror or error}: groups that are done are kept, "
        "and the same command goes on with the others when this is mended"
    )


def _pack_group(work: Work, group: int, tell: Callable[[int], None]) -> None:
    # Of this process, which may be a fresh one.
    limit_pillow(work.settings.transform.caps)
    rows = Rows(work.out)
    temporary = work.out / NOTES / f".group-{group:06d}.rejected.tmp"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            counts = _read(work, group, rows, file, tell)
            file.flush()
            os.fsync(file.fileno())
            rejected_bytes = file.tell()
        os.replace(temporary, work.rejected(group))
        order = _shuffled(rows, work.settings.seed)
        shards = tuple(
            write_shard(work.out / name, work.out / f".{name}.tmp", rows, chosen)
            for number, chosen in enumerate(cut(rows, order, work.settings.shard_bytes))
            for name in [f"shard-{group:06d}-{number:02d}.arrow"]
        )
    finally:
        rows.close()
        temporary.unlink(missing_ok=True)
    note = GroupNote(
        inputs=work.inputs,
        shards=shards,
        sources=dict(sorted(counts.sources.items())),
        read=counts.read,
        rejected=counts.kinds.total(),
        rejected_bytes=rejected_bytes,
        kinds=dict(most_common(counts.kinds)),
        converted=counts.converted,
        without_caption=counts.without_caption,
        without_picture=counts.without_picture,
    )
    # The names of the shards before the note that counts on them: a power cut may not keep the one without the other.
    for folder in (work.out, work.out / NOTES):
        sync_folder(folder)
    write_atomically(work.note(group), note.model_dump_json() + "\n")


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def most_common(kinds: Counter[str]) -> list[tuple[str, int]]:
    """By number, then by name; those behind the first KINDS as one."""
    listed = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in listed[KINDS:])
    return listed[:KINDS] + ([("others", rest)] if rest else [])


class _Counts:
    def __init__(self) -> None:
        self.sources: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.read = self.converted = self.without_caption = self.without_picture = 0


def _read(work: Work, group: int, rows: Rows, rejected: IO[str], tell: Callable[[int], None]) -> _Counts:
    """Fills `rows` with the good rows of the group, `rejected` with the others' reasons."""
    counts = _Counts()
    for source, sample in _samples(work, group):
        counts.read += 1
        if counts.read % TOLD_EVERY == 0:
            tell(TOLD_EVERY)
        key = full_key(source, sample)
        try:
            sample, picture = _checked(sample, key, work)
        except ValueError as reason:
            counts.kinds[_kind(str(reason))] += 1
            told = {"key": key, "source": source.name, "place": sample.place, "reason": str(reason)}
            rejected.write(json.dumps(told) + "\n")
            continue
        name = sample.source or source.name
        rows.add(picture, key=key, captions=sample.captions, concept=sample.concept, source=name)
        counts.sources[name] += 1
        counts.converted += picture.converted
        counts.without_caption += not sample.captions
        counts.without_picture += not sample.image
    tell(counts.read % TOLD_EVERY)
    return counts


def _samples(work: Work, group: int) -> Iterator[tuple[Source, Sample]]:
    for source, block in blocks_of(work.plan, work.sources, group):
        for sample in source.read(block):
            yield source, sample


_NO_PICTURE = Picture(b"", width=0, height=0, sha256="", converted=False)


def _checked(sample: Sample, key: str, work: Work) -> tuple[Sample, Picture]:
    """The row as it is packed. Raises ValueError with the reason where it is not.

    What costs nothing is asked first: most rows that are refused are never decoded.
    """
    if sample.problem:
        raise ValueError(sample.problem)
    if work.drop is not None and (reason := work.drop.reason(key)):
        raise ValueError(reason)
    if not all(caption.strip() for caption in sample.captions):
        raise ValueError("has an empty caption")
    try:
        "".join((key, sample.concept, sample.source, *sample.captions)).encode()
    except UnicodeEncodeError:
        raise ValueError("has text that is not Unicode (half of a surrogate pair)") from None
    if refusal := work.settings.filters.refusal(sample):
        raise ValueError(refusal)
    if not sample.image and not sample.captions:
        raise ValueError("has neither a picture nor a caption")
    kept = replace(sample, captions=work.settings.filters.kept_captions(sample.captions))
    return kept, transformed(sample.image, work.settings.transform) if sample.image else _NO_PICTURE


def _kind(reason: str) -> str:
    """A reason without what differs from row to row: "has N x N pixels"."""
    return re.sub(r"\d+(\.\d+)?", "N", reason.partition(":")[0])[:100]


def _shuffled(rows: Rows, seed: int) -> list[int]:
    """By a hash of seed and key: a row's place depends neither on the order of reading nor on its neighbours."""
    hashes = [hashlib.sha256(f"{seed}\0{row.key}".encode()).digest() for row in rows.rows]
    return sorted(range(len(hashes)), key=hashes.__getitem__)
