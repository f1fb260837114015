"""`limoe prep dedup`: fingerprints of all pictures, a search in them, and the list of keys to drop.

In OUT: fingerprints/ (kept, so that a run goes on, or finds again with another radius, without decoding), drop.parquet
(what `limoe prep pack --drop` takes) and dedup.json, written last: counts, settings, what they were counted from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.dedup import drop_file
from data_prep.dedup.drop_list import REASONS
from data_prep.dedup.duplicates import find_duplicates
from data_prep.dedup.fingerprint_pool import make_fingerprints
from data_prep.dedup.fingerprints import (
    Tally,
    Unit,
    folder_of,
    read_prints,
    read_tally,
    units_of,
)
from data_prep.imaging.pictures import Caps
from data_prep.lock import Lock
from data_prep.sources.source import Source
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically

RADIUS = 4
MAX_RADIUS = 12
"""Beyond it, different pictures are near each other by chance in any large set."""
REPORT, DROPS, FINGERPRINTS, LOCK = "dedup.json", "drop.parquet", "fingerprints", ".lock"


@dataclass(frozen=True)
class Found:
    """Of one source."""

    name: str
    fingerprint: str
    """Changes where its files do."""
    rows: int
    pictures: int
    texts: int
    refused: int
    dropped: dict[str, int]
    """By reason; of an evaluation set, none."""

    @property
    def kept(self) -> int:
        return self.pictures - sum(self.dropped.values())


@dataclass(frozen=True)
class Deduplicated:
    sources: tuple[Found, ...]
    against: tuple[Found, ...]
    made: int
    """Units whose fingerprints were made by this run; the others were there."""


def dedup(
    sources: Sequence[Source],
    against: Sequence[Source],
    out: Path,
    *,
    radius: int | None,
    caps: Caps,
    workers: int,
) -> Deduplicated:
    """Writes OUT. The same rows give the same list, in any order of the sources and for any number of workers.

    radius: in bits; None: the same pixels only. Raises UserError where OUT is not ours or cannot be written, a source
    cannot be read, or another process works in OUT.
    """
    check_out(out)
    # By name: the order of the sources is the order of the list.
    sources, against = (sorted(some, key=lambda source: source.name) for some in (sources, against))
    with _disk_errors(out):
        (out / FINGERPRINTS).mkdir(parents=True, exist_ok=True)
        with Lock(out / LOCK, f"the list of duplicates in {out}"):
            # An old list is of other rows or settings: it must not pass for this run's.
            for name in (REPORT, DROPS):
                (out / name).unlink(missing_ok=True)
            everything = [*against, *sources]
            units = units_of(everything, out / FINGERPRINTS, caps)
            made = make_fingerprints(everything, units, caps, workers=workers)
            return _search(against, sources, units, out, radius=radius, caps=caps, made=made)


def check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / FINGERPRINTS).is_dir():
        raise UserError(f"--out {out}: holds files that no `limoe prep dedup` wrote: give a new folder")


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: {error}: make room or give another folder; what is done is kept") from None


def _search(
    against: Sequence[Source],
    sources: Sequence[Source],
    units: Sequence[Unit],
    out: Path,
    *,
    radius: int | None,
    caps: Caps,
    made: int,
) -> Deduplicated:
    tallies = [read_tally(unit.file) for unit in units]
    counts = [tally.pictures for tally in tallies]
    files = [unit.file for unit in units]
    evaluation = sum(count for unit, count in zip(units, counts, strict=True) if unit.source < len(against))
    prints = read_prints(files, counts)
    drops = find_duplicates(prints, evaluation, radius)
    del prints
    written = drop_file.write(drops, files, counts, out / DROPS)
    founds = _founds([*against, *sources], units, tallies, written.reasons_of_file, caps)
    result = Deduplicated(tuple(founds[len(against) :]), tuple(founds[: len(against)]), made)
    report = {
        "format": 1,
        "settings": {"radius": radius, **asdict(caps)},
        "sources": [{**asdict(one), "kept": one.kept} for one in result.sources],
        "against": [asdict(one) for one in result.against],
        "dropped": sum(sum(one.dropped.values()) for one in result.sources),
        "list": {"file": DROPS, "sha256": written.sha256},
    }
    write_atomically(out / REPORT, json.dumps(report, indent=2) + "\n")
    return result


def _founds(
    sources: Sequence[Source],
    units: Sequence[Unit],
    tallies: Sequence[Tally],
    reasons: Sequence[Counter[int]],
    caps: Caps,
) -> list[Found]:
    sums: list[Counter[str]] = [Counter() for _ in sources]
    dropped: list[Counter[int]] = [Counter() for _ in sources]
    for unit, tally, reason in zip(units, tallies, reasons, strict=True):
        sums[unit.source].update(asdict(tally))
        dropped[unit.source].update(reason)
    return [
        Found(
            name=source.name,
            fingerprint=folder_of(source, caps),
            rows=total["pictures"] + total["texts"] + total["refused"],
            pictures=total["pictures"],
            texts=total["texts"],
            refused=total["refused"],
            dropped={word: out_of[number] for number, word in enumerate(REASONS)},
        )
        for source, total, out_of in zip(sources, sums, dropped, strict=True)
    ]


def table(result: Deduplicated) -> Any:
    """What was found, for people: a line for each source."""
    from rich.table import Column, Table

    shown = Table(Column("source", no_wrap=True), box=None, pad_edge=False, header_style="bold")
    for name in ("rows", "pictures", "refused", *REASONS, "kept"):
        shown.add_column(name, justify="right")
    for one in result.against:
        numbers = (one.rows, one.pictures, one.refused)
        shown.add_row(f"{one.name} (against)", *(f"{number:,}" for number in numbers), "", "", "", "")
    for one in result.sources:
        numbers = (one.rows, one.pictures, one.refused)
        last = (*(one.dropped[word] for word in REASONS), one.kept)
        shown.add_row(one.name, *(f"{number:,}" for number in (*numbers, *last)))
    return shown


def summary(result: Deduplicated, out: Path) -> list[str]:
    """What to do next, for people."""
    lines = []
    if refused := sum(one.refused for one in (*result.sources, *result.against)):
        lines.append(f"{refused:,} rows cannot be decoded or are refused: `limoe prep pack` names each with its reason")
    total = sum(sum(one.dropped.values()) for one in result.sources)
    lines.append(f"{out / DROPS}: {total:,} keys; leave them out with `limoe prep pack --drop {out / DROPS}`")
    return lines
