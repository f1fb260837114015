"""What every source of samples looks like to `limoe prep pack`, `dedup` and `stats`, whatever format it is in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

BLOCK_ROWS = 256
"""About so many rows are read in one go, where the format lets it: what lies together on disk is read together."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as it came from strangers: of its values only the types are known."""

    key: str
    """Unique within its source, and the same at every reading; path-like, without the name of the source."""
    image: bytes
    """The encoded picture; empty: a text alone, or see `problem`."""
    captions: tuple[str, ...]
    """None of them: a picture alone."""
    concept: str = ""
    source: str = ""
    """Whom the row is from, for the column `source` and its licence; empty: the source's own name."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Values of the score columns that were asked for; one that is missing or no number is left out."""
    problem: str = ""
    """Why the source itself refuses the row, as "the path leaves the source folder"; it is rejected for that reason."""
    place: str = ""
    """Where a person finds the row: a file, and a line or member in it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring rows of one source that are read in one go."""

    file: int
    """Index into the source's files, or into whatever it reads one behind the other."""
    first: int
    """First row in that file."""
    rows: int
    """>= 1"""
    start: int = 0
    end: int = 0
    """Where the rows lie, for formats that need it: bytes of a tar, a row group of a parquet file."""


@dataclass(frozen=True)
class License:
    license: str
    """SPDX identifier."""
    attribution: str


class Source(Protocol):
    """Samples in blocks that can be read in any order, by any process.

    A source is opened by `data_prep.sources.opening.open_sources`. To open it reads what it needs to number the rows
    (footers, member headers, a captions file), no pictures. Two processes that open the same files get the same blocks.
    It can be pickled: pools hand it to their workers.
    """

    @property
    def name(self) -> str:
        """A plain name, unique among the sources of a command: keys of packed rows begin with it."""
        ...

    @property
    def blocks(self) -> Sequence[Block]:
        """All blocks, in the order of the source; together they hold every row once."""
        ...

    @property
    def licenses(self) -> Mapping[str, License]:
        """By the value of a row's `source`; what is not in it is of unknown licence."""
        ...

    def fingerprint(self) -> str:
        """Changes where the files do: names with sizes and times of change, or checksums that the store keeps."""
        ...

    def read(self, block: Block) -> Iterator[Sample]:
        """The rows of a block, `block.rows` of them, in order: a refused row is a Sample with a `problem`.

        Raises UserError where the file itself can no longer be read.
        """
        ...
