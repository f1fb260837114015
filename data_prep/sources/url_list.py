"""Lists of picture addresses with captions: parquet, CSV and TSV (also .gz), by path, pattern or URL, read as a stream.

The columns are recognised by name: LAION's URL and TEXT, DataComp's url, text and uid, and the others of
data_prep/sources/url_columns.py. A CSV or TSV of two columns without a header is known by its address: CC3M has the
caption first, CC12M the address. TSV has no quotes: a caption may begin with one. All other columns of plain values are
carried through, as scores for `limoe prep pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.sources import url_list_parquet as parquet
from data_prep.sources import url_list_text as text
from data_prep.sources.url_columns import Columns, Values, Wanted, bare, bounded
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

SUFFIXES = (".parquet", ".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")


@dataclass(frozen=True, slots=True)
class Row:
    number: int
    """Counted from 0 over the whole list."""
    url: str
    caption: str
    carried: dict[str, Any] = field(default_factory=dict)


@dataclass
class UrlList:
    files: tuple[str, ...]
    columns: Columns
    rows_read: int = 0
    """Rows that `parts` has passed, of use or not."""

    def identity(self) -> list[list[str]]:
        """Changes where a file does: place and size with checksum or time."""
        return [[file, places.identity(file)] for file in self.files]

    def rows(self) -> int | None:
        """Rows of all files; None where that is known only by reading them, as for CSV."""
        if not all(bare(file).endswith(".parquet") for file in self.files):
            return None
        return sum(parquet.number_of_rows(file) for file in self.files)

    def parts(self, rows_per_part: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Row]]]:
        """The wanted parts in order, part p being rows p * rows_per_part and on; of others as little as can be is read.

        Memory: one part, and one batch. Raises UserError where a file cannot be read.
        """
        part, held = 0, list[Row]()

        def of_use(first: int, end: int) -> bool:
            return any(wanted(one) for one in range(first // rows_per_part, (end - 1) // rows_per_part + 1))

        for first, batch in self._batches(of_use):
            for number, values in enumerate(batch, start=first):
                if number // rows_per_part != part:
                    if held:
                        yield part, held
                    part, held = number // rows_per_part, []
                if wanted(part):
                    held.append(Row(number, *bounded(*values)))
        if held:
            yield part, held

    def _batches(self, of_use: Wanted) -> Iterator[tuple[int, list[Values]]]:
        first = self.rows_read = 0
        for file in self.files:
            for rows, batch in _format(file).batches(file, self.columns, _shifted(of_use, first)):
                if batch:
                    yield first, batch
                first += rows
                self.rows_read = first


def open_list(given: Sequence[str], columns: Columns) -> UrlList:
    """Finds the files and checks their columns. Raises UserError naming the columns a file has where one is lacking."""
    files = [file for place in given for file in places.expand(place, suffixes=SUFFIXES)]
    seen: set[str] = set()
    for file in files:
        # One may be named by its path, and again by a pattern, which gives whole paths.
        one = file if places.is_remote(file) else str(places.local(file).resolve())
        if one in seen:
            raise UserError(f"--list: {file} is named twice: its pictures would be fetched twice")
        seen.add(one)
    for file in files:
        if not bare(file).endswith(SUFFIXES):
            raise UserError(f"--list {file}: the name of a list ends in {', '.join(SUFFIXES)}")
        _format(file).check(file, columns)
    return UrlList(tuple(files), columns)


def _format(file: str) -> Any:
    return parquet if bare(file).endswith(".parquet") else text


def _shifted(of_use: Wanted, first: int) -> Wanted:
    """The same of rows that are counted from this one."""
    return lambda begin, end: of_use(first + begin, first + end)
