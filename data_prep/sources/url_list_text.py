"""Lists in CSV and TSV, with or without a header line, also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from typing import IO, Any

from data_prep.sources.url_columns import (
    BATCH_ROWS,
    Chosen,
    Columns,
    Values,
    Wanted,
    bare,
    carried_values,
    chosen_columns,
)
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

LONGEST_LINE = 1 << 20
BEGINS = ("http://", "https://")
WHOLE = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")
DECIMAL = re.compile(r"-?(?:(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,40})?|\.[0-9]{1,40})(?:[eE][-+][0-9]{1,3})?")
NONE = ("nan", "inf", "infinity")


def _first_line(file: str, columns: Columns) -> tuple[Chosen, list[str] | None]:
    """(the columns, the first row where it is one of values)."""
    with places.failures(file), _text(file) as opened:
        try:
            cells = next(_cells(file, opened), [])
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
    if not cells:
        raise UserError(f"{file}: is empty")
    if any("\0" in cell for cell in cells):
        raise UserError(f"{file}: is no text in UTF-8, but perhaps in UTF-16: convert it, as with iconv -t UTF-8")
    addresses = [index for index, cell in enumerate(cells) if cell.startswith(BEGINS)]
    if columns.header:
        if len(cells) != len(columns.header):
            raise UserError(f"{file}: has {len(cells)} columns, but --header names {len(columns.header)}")
        return chosen_columns(file, columns.header, columns), cells
    if not addresses:
        return chosen_columns(file, cells, columns), None
    if len(cells) > 2 or len(addresses) > 1:
        raise UserError(
            f"{file}: has {len(cells)} columns and no header ({', '.join(cells)[:100]}): name them, as with "
            "--header url caption score"
        )
    url = addresses[0]
    return Chosen(url, 1 - url if len(cells) == 2 else None, {}), cells


def check(file: str, columns: Columns) -> None:
    """Raises UserError where it cannot be read, or lacks a column."""
    _first_line(file, columns)


def batches(file: str, columns: Columns, of_use: Wanted) -> Iterator[tuple[int, list[Values]]]:
    """(rows, their values), in order; no values where they are of no use. Raises UserError where it cannot be read."""
    chosen, first_row = _first_line(file, columns)
    with places.failures(file), _text(file) as opened:
        rows = _cells(file, opened)
        if first_row is None:
            next(rows)
        first, count, batch = 0, 0, list[Values]()
        use = of_use(0, BATCH_ROWS)
        try:
            for cells in rows:
                if use:
                    batch.append(_values(cells, chosen))
                count += 1
                if count == BATCH_ROWS:
                    yield count, batch
                    first, count, batch = first + count, 0, []
                    use = of_use(first, first + BATCH_ROWS)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
        if count:
            yield count, batch


def _values(cells: list[str], chosen: Chosen) -> Values:
    """A row that is too short has an empty address: it ends in the ledger as such."""

    def cell(index: int | None) -> str:
        return cells[index] if index is not None and index < len(cells) else ""

    carried = {name: _number(cell(index)) for name, index in chosen.carried.items() if cell(index)}
    return cell(chosen.url).strip(), cell(chosen.caption), carried_values(list(carried), list(carried.values()))


def _number(text: str) -> Any:
    """A number where the text is how one is written; "00012", "1_000" and the hexadecimal "12e4567" are names."""
    if WHOLE.fullmatch(text):
        return int(text)
    if DECIMAL.fullmatch(text) or text.lower().lstrip("+-") in NONE:
        return float(text)
    return text


def _text(file: str) -> IO[str]:
    """Bytes that are no UTF-8 are replaced: one caption in millions must not end the run."""
    opened: Any = places.open_binary(file)
    if bare(file).endswith(".gz"):
        opened = gzip.GzipFile(fileobj=opened)
    return io.TextIOWrapper(opened, encoding="utf-8-sig", errors="replace", newline="")


def _cells(file: str, opened: IO[str]) -> Iterator[list[str]]:
    if bare(file).removesuffix(".gz").endswith(".csv"):
        reader = csv.reader(_lines(file, opened))
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{file}, line {reader.line_num}: is not CSV: {error}") from None
            if row:
                yield row
    for line in _lines(file, opened):
        if text := line.rstrip("\r\n"):
            yield text.split("\t")


def _lines(file: str, opened: IO[str]) -> Iterator[str]:
    """Lines, of which none is held that has no end."""
    number = 0
    while line := opened.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            raise UserError(f"{file}, line {number}: is longer than {LONGEST_LINE} characters: this is no list")
        yield line
