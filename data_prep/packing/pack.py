"""`limoe prep pack`: rows of any sources into Arrow shards with a manifest, by one process or by many.

plan.py says which rows belong together, group.py does the work on them, pack_folder.py keeps the output folder,
units.py divides the groups among processes. The same sources and settings give the same bytes, whoever does what part
of the work, in what order, and however often it is killed and begun again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from data_prep.dedup.drop_list import DropList
from data_prep.imaging.filters import Filters
from data_prep.imaging.transform import Transform, versions
from data_prep.inspection.findings import printable
from data_prep.packing.group import GroupSettings, Work, read_note, unwritable
from data_prep.packing.pack_folder import Packed, Recipe, enter, finish, refuse_foreign
from data_prep.packing.pack_pool import run_groups
from data_prep.packing.plan import by_name, plan
from data_prep.sources.source import Source
from data_prep.units import ALONE, WHOLE, Meeting, Unit
from limoe_dist.config.errors import UserError

FORMAT_VERSION = 2
"""Raised when the same inputs begin to give other shards."""
GROUP_ROWS = 4096


@dataclass(frozen=True)
class PackSettings:
    name: str
    transform: Transform
    shard_bytes: int = 64_000_000
    seed: int = 0
    group_rows: int = GROUP_ROWS
    filters: Filters = field(default_factory=Filters)


def pack(
    open_sources: Callable[[], Sequence[Source]],
    out: Path,
    settings: PackSettings,
    *,
    drop: DropList | None = None,
    unit: Unit = WHOLE,
    meeting: Meeting = ALONE,
    workers: int = 1,
    overwrite: bool = False,
    console: Console,
) -> Packed:
    """Does the groups of a unit, and writes the manifest where all groups of all units are done then.

    open_sources: called once; of the ranks of a meeting the first calls it before the others.
    meeting: the units that were started together; all raise where one does.
    Raises UserError for sources that cannot be read, where OUT holds other shards or cannot be written, where another
    process is doing the unit, or where no row is left.
    """
    meeting.all_or_none(lambda: refuse_foreign(out))
    sources = by_name(meeting.first_then_others(open_sources))
    recipe = _recipe(sources, settings, drop)
    entered = meeting.all_or_none(lambda: _on(out, lambda: enter(out, recipe, unit, overwrite=overwrite)))
    if isinstance(entered, Packed):
        # Another rank may have come before the last group was done: it waits for this one at both meetings.
        meeting.all_or_none(lambda: None)
        return meeting.all_or_none(lambda: entered)
    with entered:
        work = Work(
            out=out,
            inputs=recipe.inputs,
            sources=sources,
            plan=plan(sources, seed=settings.seed, group_rows=settings.group_rows),
            settings=GroupSettings(settings.seed, settings.shard_bytes, settings.transform, settings.filters),
            drop=drop,
        )
        to_do = [group for group in unit.share(work.plan.groups) if read_note(work, group) is None]
        meeting.all_or_none(lambda: run_groups(work, to_do, workers=workers, console=console))
        return meeting.all_or_none(lambda: _on(out, lambda: finish(work, recipe)))


def _on(out: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except OSError as error:
        raise UserError(unwritable(out, error)) from None


def _recipe(sources: Sequence[Source], settings: PackSettings, drop: DropList | None) -> Recipe:
    """What the shards are made from: changes with every setting and with every file of the sources."""
    told = _plain(asdict(settings) | {"drop": drop.sha256 if drop else ""})
    name = told.pop("name")
    content = [FORMAT_VERSION, name, told, [[source.name, source.fingerprint()] for source in sources]]
    inputs = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Recipe(name, inputs, {**versions(), "pyarrow": pa.__version__}, told | {"inputs": inputs})


def _plain(value: Any) -> Any:
    """As JSON has it, so that what is written equals what is read: tuples are lists, no limit is null."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def summary(packed: Packed, out: Path, unit: Unit = WHOLE) -> list[str]:
    """What was packed, for people: one line for each source, and what was left out."""
    manifest = packed.manifest
    if manifest is None:
        return [
            f"{out}: {unit} is done; {packed.done} of {packed.groups} groups are: the unit that does the last one "
            "writes the manifest"
        ]
    state = "unchanged since it was packed" if packed.skipped else "packed"
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    lines = [
        f"{out / 'manifest.json'}: {state}: {manifest.rows} rows in {len(manifest.shards)} shards, {megabytes:.1f} MB"
    ]
    # Names and licences are strangers' texts, and so are parts of reasons: none may move a terminal's cursor.
    lines += [f"  {printable(one.name)}: {one.rows} rows, licence {printable(one.license)}" for one in manifest.sources]
    lines.append(
        f"  {packed.converted} pictures converted to plain RGB, {packed.rejected} rows rejected (rejected.jsonl)"
    )
    lines += [f"    {count} {printable(kind)}" for kind, count in list(packed.kinds.items())[:SHOWN_KINDS]]
    if count := manifest.without_caption:
        lines.append(f"  {count} rows without a caption: pictures alone, for evaluation; {_TRAINING}")
    if count := manifest.without_picture:
        lines.append(f"  {count} rows without a picture: texts alone, for evaluation; {_TRAINING}")
    return lines


SHOWN_KINDS = 10
_TRAINING = "training needs pairs"
