"""The parts of a download: those of a list, and those of rows that failed before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from pathlib import Path

from data_prep.fetching import ledger
from data_prep.fetching.download_state import Part
from data_prep.sources.url_list import Row, UrlList
from data_prep.units import Unit

MOST_ROWS_PER_PART = 100_000
"""Parts are held in memory while they are fetched."""


def stem_of(part: int) -> str:
    return f"part-{part:05d}"


def key_of(part: int, row: int, rows_per_part: int) -> str:
    """A plain name that sorts as the list does; the same whatever was fetched before."""
    return f"{part:05d}{row - part * rows_per_part:0{len(str(rows_per_part - 1))}d}"


class ListParts:
    """The parts of a list that a unit has yet to fetch. `rows`: the list's length; None while that is not known."""

    def __init__(self, listed: UrlList, out: Path, rows_per_part: int, unit: Unit) -> None:
        self._listed, self._rows_per_part, self._unit = listed, rows_per_part, unit
        # Lines beside the table: killed between the two; the part is opened once more, which removes them.
        self._whole = {part for part in ledger.whole_parts(out) if not (out / f"{part}.jsonl").exists()}
        self.rows = listed.rows()

    def __iter__(self) -> Iterator[Part]:
        for number, rows in self._listed.parts(self._rows_per_part, self._wanted):
            keyed = [(key_of(number, row.number, self._rows_per_part), row) for row in rows]
            yield Part(stem_of(number), keyed)
        self.rows = self._listed.rows_read

    def _wanted(self, part: int) -> bool:
        return part % self._unit.count == self._unit.index and stem_of(part) not in self._whole

    def rows_left(self) -> int | None:
        """Rows of the parts that this unit has yet to make whole; None where the list does not tell its length."""
        rows = self.rows
        if rows is None:
            return None
        parts = [part for part in range(-(-rows // self._rows_per_part)) if self._wanted(part)]
        return sum(min(self._rows_per_part, rows - part * self._rows_per_part) for part in parts)


def failed_parts(out: Path, classes: Set[str], unit: Unit) -> Iterator[Part]:
    """Of each whole part the rows that failed so, at last, and a retry that was stopped before."""
    for part in ledger.whole_parts(out):
        if int(part.removeprefix("part-")) % unit.count != unit.index:
            continue
        stem = _next_retry(out, part)
        rows = ledger.latest(out, part)
        failed = {key: row for key, row in rows.items() if row["error"] != ledger.FETCHED}
        chosen = [(key, _row(row)) for key, row in failed.items() if row["error"] in classes]
        if chosen or (out / f"{stem}.jsonl").exists():
            yield Part(stem, chosen, {key: row["error"] for key, row in failed.items()})


def _next_retry(out: Path, part: str) -> str:
    return f"{part}-retry-{len(list(out.glob(f'{part}-retry-*.parquet'))) + 1:02d}"


def _row(row: dict[str, object]) -> Row:
    carried = json.loads(str(row["carried"])) if row["carried"] else {}
    return Row(int(str(row["row"])), str(row["url"]), str(row["caption"]), carried)
