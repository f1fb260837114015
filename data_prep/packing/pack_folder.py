"""The output folder of `limoe prep pack`: whose it is, what of it is done, and its end.

pack.json comes first (what from), then shards with a note for each group, then rejected.jsonl, pack.json again with
the figures, and manifest.json at last: shards without a manifest are no data set.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data_prep.lock import Lock
from data_prep.packing.claims import at_work, claim, door
from data_prep.packing.group import NOTES, GroupNote, Work, most_common, read_note, sync_folder
from data_prep.sources.source import Source
from data_prep.units import Unit
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically
from limoe_dist.data import manifest as manifests
from limoe_dist.data.manifest import Manifest
from limoe_dist.data.manifest import Source as SourceEntry

OURS = ("shard-*.arrow", "tokenizer.model", "tokenizer.json", "rejected.jsonl")
"""Files of an output folder that are written anew."""
TEMPORARY = (".shard-*.tmp", f"{NOTES}/.group-*.tmp", f"{NOTES}/group-*.tmp", ".*.json.*.tmp", ".rejected.jsonl.tmp")
INDEX = f"{NOTES}/index"
"""What sources learn about their files, for other processes and later runs."""


@dataclass(frozen=True)
class Recipe:
    """What decides the shards."""

    name: str
    inputs: str
    """Fingerprint of the sources, the settings and the drop lists."""
    made_with: Mapping[str, str]
    """Versions of what encodes: not in the fingerprint, for a data set that is whole stays so under later versions."""
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Packed:
    """What is in the folder when a unit has ended."""

    manifest: Manifest | None
    """None: other units have not done their groups yet."""
    done: int
    groups: int
    rejected: int
    converted: int
    kinds: Mapping[str, int]
    """Rejected rows by kind of reason, most first."""
    skipped: bool
    """The same inputs had been packed before."""


def refuse_foreign(out: Path) -> None:
    """Raises UserError where OUT is a file, or holds what no pack wrote. Changes nothing."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file: name a folder")
    if not out.is_dir() or _note(out) is not None or (out / "manifest.json").is_file():
        return
    # An earlier start may have come no further than its folder of notes and half a pack.json.
    if any(one.name != NOTES and not fnmatch(one.name, ".pack.json.*.tmp") for one in out.iterdir()):
        raise UserError(f"--out {out}: holds files that are not shards of ours: give a new folder")


def enter(out: Path, recipe: Recipe, unit: Unit, *, overwrite: bool) -> Lock | Packed:
    """Makes OUT ready for the recipe and the unit this process's own; or tells that all of it is packed.

    Raises UserError where OUT holds shards of other inputs (unless `overwrite`), where other versions began it, or
    where another process does the unit, or divides the work differently.
    """
    (out / NOTES).mkdir(parents=True, exist_ok=True)
    with door(out / NOTES):
        note, others = _note(out), at_work(out / NOTES)
        same = note is not None and note.get("inputs") == recipe.inputs
        if same and note and (packed := _whole(out, note)):
            return packed
        anew = not (same and note and note.get("made_with") == dict(recipe.made_with))
        if anew:
            _refuse_to_begin_anew(out, note, recipe, overwrite=overwrite, busy=bool(others))
        lock = claim(out / NOTES, unit, f"--out {out}")
        (out / "manifest.json").unlink(missing_ok=True)
        if not others:
            _remove(out, TEMPORARY)
        if anew:
            _clear(out)
        begun = {"inputs": recipe.inputs, "made_with": dict(recipe.made_with), "done": False}
        if _note(out) != begun:
            write_atomically(out / "pack.json", json.dumps(begun) + "\n")
        return lock


def _refuse_to_begin_anew(
    out: Path, note: Mapping[str, Any] | None, recipe: Recipe, *, overwrite: bool, busy: bool
) -> None:
    if busy:
        raise UserError(f"--out {out}: other inputs or settings are being packed there now: give another folder")
    if overwrite:
        return
    if note and note.get("inputs") == recipe.inputs:
        raise UserError(
            f"--out {out}: was begun with {_versions(note.get('made_with'))}, and this is "
            f"{_versions(recipe.made_with)}: their pictures would differ; go on with those versions, or begin anew "
            "with --overwrite"
        )
    if (out / "manifest.json").is_file():
        raise UserError(
            f"--out {out}: holds shards packed from other inputs or settings: "
            "give another folder, or --overwrite to replace them"
        )
    if done := sum(1 for _ in out.glob(f"{NOTES}/group-*.json")):
        raise UserError(
            f"--out {out}: {done} groups of other inputs or settings are done there: go on with those, "
            "give another folder, or --overwrite to begin anew"
        )


def _versions(made_with: object) -> str:
    listed = made_with.items() if isinstance(made_with, Mapping) else ()
    return ", ".join(f"{name} {version}" for name, version in listed) or "unknown versions"


def _note(out: Path) -> dict[str, Any] | None:
    try:
        note = json.loads((out / "pack.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _whole(out: Path, note: Mapping[str, Any]) -> Packed | None:
    """What was packed before; None where it is not whole, or a shard is missing or cut off."""
    if not note.get("done") or not (out / "manifest.json").is_file():
        return None
    try:
        manifest = manifests.load_manifest(out / "manifest.json")
        groups, kinds = int(note["groups"]), {str(kind): int(count) for kind, count in note["kinds"].items()}
        return Packed(manifest, groups, groups, int(note["rejected"]), int(note["converted"]), kinds, skipped=True)
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _clear(out: Path) -> None:
    """Removes what an earlier run left; the manifest is gone already, so half of it never passes for a data set."""
    _remove(out, (f"{NOTES}/group-*", *OURS))


def _remove(out: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for file in out.glob(pattern):
            file.unlink(missing_ok=True)


def finish(work: Work, recipe: Recipe) -> Packed:
    """Writes rejected.jsonl and the manifest where every group is done, whichever unit comes last; tells what is there.

    Raises UserError where every row was rejected.
    """
    with door(work.out / NOTES):
        begun = _note(work.out)
        if begun and begun.get("inputs") == recipe.inputs and (packed := _whole(work.out, begun)):
            return replace(packed, skipped=False)
        notes = [note for group in range(work.plan.groups) if (note := read_note(work, group))]
        packed = _figures(work, notes)
        if packed.done < packed.groups:
            return packed
        _join_rejected(work)
        if packed.rejected == work.plan.rows:
            raise UserError(_all_rejected(work, packed.rejected))
        manifest = _manifest(work, recipe, notes)
        _remove(work.out, TEMPORARY)
        done = {"inputs": recipe.inputs, "made_with": dict(recipe.made_with), "done": True}
        done |= {"groups": packed.groups, "rows": manifest.rows, "rejected": packed.rejected}
        done |= {"converted": packed.converted, "kinds": dict(packed.kinds)}
        write_atomically(work.out / "pack.json", json.dumps(done, indent=2) + "\n")
        sync_folder(work.out)
        manifests.save_manifest(manifest, work.out / "manifest.json")
        return replace(packed, manifest=manifest)


def _figures(work: Work, notes: Sequence[GroupNote]) -> Packed:
    kinds = Counter[str]()
    for note in notes:
        kinds.update(note.kinds)
    return Packed(
        manifest=None,
        done=len(notes),
        groups=work.plan.groups,
        rejected=sum(note.rejected for note in notes),
        converted=sum(note.converted for note in notes),
        kinds=dict(most_common(kinds)),
        skipped=False,
    )


def _join_rejected(work: Work) -> None:
    """One file of all reasons, a group behind the other; never more of it in memory than a part of one."""
    temporary = work.out / ".rejected.jsonl.tmp"
    with temporary.open("wb") as joined:
        for group in range(work.plan.groups):
            with work.rejected(group).open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(temporary, work.out / "rejected.jsonl")


def _all_rejected(work: Work, rejected: int) -> str:
    with (work.out / "rejected.jsonl").open(encoding="utf-8") as file:
        first = json.loads(file.readline()) if rejected else None
    if first is None:
        return f"{work.out}: the sources have no rows"
    place = f" ({first['place']})" if first["place"] else ""
    return (
        f"{work.out}: all {rejected} rows were rejected, the first because {first['key']}{place} {first['reason']}: "
        "see rejected.jsonl there"
    )


def _manifest(work: Work, recipe: Recipe, notes: Sequence[GroupNote]) -> Manifest:
    shards = tuple(shard for note in notes for shard in note.shards)
    counts = Counter[str]()
    for note in notes:
        counts.update(note.sources)
    return Manifest(
        name=recipe.name,
        rows=sum(shard.rows for shard in shards),
        shards=shards,
        sources=_entries(work.sources, counts),
        without_caption=sum(note.without_caption for note in notes),
        without_picture=sum(note.without_picture for note in notes),
        made_with=dict(recipe.made_with),
        settings=dict(recipe.settings),
    )


def _entries(sources: Sequence[Source], counts: Mapping[str, int]) -> tuple[SourceEntry, ...]:
    licenses = {name: license_ for source in sources for name, license_ in source.licenses.items()}
    entries = []
    for name in sorted(counts):
        known = licenses.get(name)
        license_, attribution = (known.license, known.attribution) if known else ("unknown", "")
        entries.append(SourceEntry(name=name, rows=counts[name], license=license_, attribution=attribution))
    return tuple(entries)
