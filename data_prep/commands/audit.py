"""The options of `limoe prep audit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Settings:
    """Prove which rows a run has read: each once in every epoch of its source, or the reason why not.

    The run's ledger (positions.jsonl) tells which positions of the data order its steps consumed, and a checksum of the
    rows that its ranks used. All positions are turned into rows again, whatever numbers of ranks and batches read them.
    Explained are rows that could not be decoded (another row of the shard stood in), and ranges that were jumped over.
    Exit status: 0 where every row is accounted for, 1 where one is not.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a run."""
    list: Path | None = None
    """Write what each position read into this file, .parquet or .csv: position, source, epoch, row, shard, row in the
    shard, and the row that stood in for a bad one."""
    json: Path | None = None
    """Write the result into this file, too."""


def run(settings: Settings) -> int:
    from data_prep.inspection import audit_tables

    return audit_tables.run(settings.run, listing=settings.list, result=settings.json)
