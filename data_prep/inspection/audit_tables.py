"""What `limoe prep audit` shows and writes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_prep.console import console
from data_prep.inspection.audit import Audit, audit
from data_prep.writing import writing
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run, write_atomically
from limoe_dist.data.mixture import Drawn, entries_of, load_manifests
from limoe_dist.data.order import Ints

SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("epoch", pa.int64()),
        ("row", pa.int64()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("row_in_shard", pa.int64()),
        ("stand_in", pa.int64()),
    ]
)
MOST_EPOCHS = 12
"""Epochs of a source that the table shows one by one: the last ones."""


def run(run_dir: Path, *, listing: Path | None, result: Path | None) -> int:
    """Audits, shows, writes; the exit status."""
    if listing is not None and listing.suffix not in (".parquet", ".csv"):
        raise UserError(f"--list {listing}: must end in .parquet or .csv")
    shown = console()
    writer = _Listing(run_dir, listing) if listing is not None else None
    columns = (
        TextColumn("working out the rows"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("", total=None)
        try:
            found = audit(
                run_dir,
                advance=lambda done, total: bar.update(task, completed=done, total=total),
                take=writer.write if writer else lambda positions, drawn, used: None,
            )
            if writer:
                writer.finish()
        finally:
            if writer:
                writer.close()
    if result is not None:
        with writing(result):
            write_atomically(result, json.dumps(asdict(found) | {"proved": not found.faults}, indent=2) + "\n")
    _show(found, shown)
    return 1 if found.faults else 0


def _show(found: Audit, shown: Console) -> None:
    table = Table(title=f"rows that {found.run} has read, up to step {found.step}", title_justify="left")
    for name in ("source", "epoch", "rows", "once", "replaced", "jumped", "ahead", "faults"):
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for source in dict.fromkeys(epoch.source for epoch in found.epochs):
        epochs = [epoch for epoch in found.epochs if epoch.source == source]
        table.add_section()
        label = source
        if (hidden := epochs[:-MOST_EPOCHS]) and all(not one.more and not one.missing for one in hidden):
            sums = [sum(getattr(one, name) for one in hidden) for name in ("rows", "once", "replaced", "jumped")]
            table.add_row(label, f"0-{hidden[-1].epoch}", *(f"{count:,}" for count in sums), "", "")
            epochs, label = epochs[-MOST_EPOCHS:], ""
        for one in epochs:
            counts = (one.rows, one.once, one.replaced, one.jumped, one.ahead, one.more + one.missing)
            table.add_row(label, str(one.epoch), *(f"{count:,}" if count else "" for count in counts))
            label = ""
    shown.print(table)
    for note in found.notes:
        shown.print(f"explained: {note}", highlight=False, markup=False, soft_wrap=True)
    for fault in found.faults:
        shown.print(f"not explained: {fault}", highlight=False, markup=False, soft_wrap=True)
    proof = f"{found.checked} of {found.checked + found.unchecked} stretches prove it by the checksum of the rows used"
    shown.print(
        "some rows are not accounted for"
        if found.faults
        else f"every row was read once in each epoch, or it is explained: {proof}",
        highlight=False,
        soft_wrap=True,
    )


class _Listing:
    """The file of --list, written as the positions are worked out; it has its name when it is whole."""

    def __init__(self, run_dir: Path, path: Path) -> None:
        data = load_run(run_dir / "run.json").data if (run_dir / "run.json").is_file() else None
        self.manifests = load_manifests(data) if data else ()
        self.places = [entry.path for entry in entries_of(data)] if data else []
        rows = [shard.rows for one in self.manifests for shard in one.shards]
        self.shards = pa.array([shard.file for one in self.manifests for shard in one.shards], pa.string())
        self.ends = np.cumsum(rows)
        self.starts = self.ends - rows
        self.first_rows = np.cumsum([0, *(one.rows for one in self.manifests)])
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writer: Any = (
                pyarrow.parquet.ParquetWriter(self.temporary, SCHEMA, compression="zstd")
                if path.suffix == ".parquet"
                else pyarrow.csv.CSVWriter(self.temporary, _plain(SCHEMA))
            )
        self.plain = path.suffix == ".csv"

    def write(self, positions: Ints, drawn: Drawn, used: Ints) -> None:
        numbers = self.first_rows[drawn.sources] + drawn.rows
        shards = np.searchsorted(self.ends, numbers, side="right")
        table = pa.table(
            [
                pa.array(positions),
                pa.DictionaryArray.from_arrays(pa.array(drawn.sources, pa.int32()), pa.array(self.places, pa.string())),
                pa.array(drawn.epochs),
                pa.array(drawn.rows),
                pa.DictionaryArray.from_arrays(pa.array(shards, pa.int32()), self.shards),
                pa.array(numbers - self.starts[shards]),
                pa.array(used - self.first_rows[drawn.sources], mask=used == numbers),
            ],
            schema=SCHEMA,
        )
        with writing(self.path):
            self.writer.write_table(table.cast(_plain(SCHEMA)) if self.plain else table)

    def finish(self) -> None:
        with writing(self.path):
            self.writer.close()
            os.replace(self.temporary, self.path)

    def close(self) -> None:
        """What was not finished goes."""
        with suppress(OSError):
            self.writer.close()
        self.temporary.unlink(missing_ok=True)


def _plain(schema: pa.Schema) -> pa.Schema:
    """CSV has no dictionaries."""
    return pa.schema([(one.name, pa.string() if pa.types.is_dictionary(one.type) else one.type) for one in schema])
