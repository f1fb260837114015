"""What `limoe checkpoint` prints: tables that 80 columns hold, and the words in them."""

from __future__ import annotations

import json
import math
import shlex
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from limoe_dist.checkpoint import catalog
from limoe_dist.checkpoint.contents import TYPE_BYTES, Part, plain
from limoe_dist.checkpoint.manifest import CheckpointManifest
from limoe_dist.checkpoint.state import Layout, State
from limoe_dist.checkpoint.survey import Entry


def checkpoint_table(entries: list[Entry], now: float) -> Table:
    table = _table("step", "written", "age", "size", "written by", "state")
    for column in table.columns:
        column.no_wrap = column.header != "written by"
        column.justify = "right" if column.header in ("step", "age", "size") else "left"
    for entry in entries:
        layout = "" if entry.layout is None else _layout(entry.layout)
        row = (entry.step, _when(entry.written), age(entry.written, now), size(entry.num_bytes), layout)
        style = {"verified": "green", "damaged": "bold red"}.get(entry.kind, "yellow")
        table.add_row(*map(_cell, row), _cell(entry.kind, style=style))
    return table


def todo(entry: Entry, run_dir: Path, trained_by: str | None) -> str:
    """What it is, and what to do."""
    remove = f"limoe checkpoint rm {shlex.quote(str(run_dir))}"
    match entry.kind:
        case "damaged":
            return f"a resume goes back to an older one by itself; {remove} --step {entry.step} removes it"
        case "no manifest":
            return f"no checkpoint without its manifest.json: put that back, or {remove} --step {entry.step}"
        case "put aside":
            return f"damaged, and a resumed run went on without it: {remove} --damaged"
        case "saving" if trained_by:
            return f"a save that goes on, or that failed: leave it to {plain(trained_by)}"
        case "removing" if trained_by:
            return f"on its way out: leave it to {plain(trained_by)}"
    return f"left behind by a save or a removal that was killed: the next save removes it, or {remove} --leftovers"


def state_table(folder: Path, state: State) -> Table:
    spans = ", ".join(f"{first:,} to {end - 1:,}" for first, end in state.quarantined)
    rows = [
        ("step", f"{state.step:,}"),
        ("written", f"{_when(state.written)}, {age(state.written, time.time())} ago"),
        ("verified", "yes" if catalog.is_verified(folder) else "no"),
        ("written by", _layout(state.layout)),
        ("versions", ", ".join(f"{name} {version}" for name, version in state.versions.items())),
        ("position", f"{state.position:,}: the next pair of the data order"),
        ("quarantined", spans or "nothing"),
        ("fingerprint", state.fingerprint),
        ("training data", state.data),
        ("vocabulary", state.tokenizer),
    ]
    table = _table("", "")
    table.show_header = False
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def settings_table(state: State, defaults: dict[str, Any], place: str, *, shows_all: bool) -> Table:
    """place: what the defaults are of."""
    table = _table("setting", "here", f"in {place}")
    for name, value in state.settings.items():
        differs = name not in defaults or defaults[name] != value
        if shows_all or differs:
            there = json.dumps(defaults[name]) if name in defaults else "unknown"
            style = "bold" if differs and shows_all else ""
            table.add_row(*(_cell(text, style=style) for text in (name, json.dumps(value), there)))
    return table


def tensor_table(tensors: dict[str, list[Part]]) -> Table:
    table = _table("kind", "tensors", "numbers", "size", "types")
    for column in table.columns[1:4]:
        column.justify = "right"
    kinds = by_kind(tensors)
    for kind, group in kinds.items():
        figures = (f"{len(group):,}", f"{numbers(group):,}", size(num_bytes(group)), ", ".join(dtypes(group)))
        table.add_row(*map(_cell, (kind, *figures)))
    return table


def file_table(manifest: CheckpointManifest) -> Table:
    table = _table("file", "bytes", "XXH3-128")
    table.columns[1].justify = "right"
    for file in manifest.files:
        table.add_row(*map(_cell, (file.name, f"{file.bytes:,}", file.xxh3)))
    return table


def by_kind(tensors: dict[str, list[Part]]) -> dict[str, list[list[Part]]]:
    """Boxes of tensors by what they are: `model`, `adamw/exp_avg`, ..."""
    kinds: dict[str, list[list[Part]]] = {}
    for name, parts in tensors.items():
        kinds.setdefault(name.rpartition("/")[0], []).append(parts)
    return kinds


def numbers(group: list[list[Part]]) -> int:
    return sum(math.prod(parts[0].shape) for parts in group)


def num_bytes(group: list[list[Part]]) -> int:
    return sum(math.prod(part.size) * TYPE_BYTES[part.dtype] for parts in group for part in parts)


def dtypes(group: list[list[Part]]) -> list[str]:
    return sorted({part.dtype for parts in group for part in parts})


def _table(*columns: str) -> Table:
    # As narrow as it can be: 80 columns have to do.
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show(table: Table) -> None:
    Console(highlight=False).print(table)


def _layout(layout: Layout) -> str:
    ranks = f"{layout.ranks} rank{'s' if layout.ranks > 1 else ''}"
    optimizer = layout.optimizer if layout.engine == "native" else f"{layout.engine} {layout.optimizer}"
    return f"{ranks}, tp {layout.tp}, ep {layout.ep}, {optimizer}"


def size(count: int) -> str:
    return decimal(count)


def _when(unix: float) -> str:
    """Local time."""
    try:
        return datetime.fromtimestamp(unix).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):
        return "unknown"


def age(unix: float, now: float) -> str:
    """`12 s`, `5 min`, `3 h` or `40 days`."""
    seconds = max(0.0, now - unix) if math.isfinite(unix) else 0.0
    for unit, extent in (("days", 48 * 3600), ("h", 2 * 3600), ("min", 120)):
        if seconds >= extent:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.0f} {unit}"
    return f"{seconds:.0f} s"


def _cell(value: object, *, style: str = "") -> Text:
    """Text, not markup: a name may hold square brackets."""
    return Text(plain(str(value)), style=style)
