"""What a download is told, what it is given to do, and what it has done so far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from data_prep.fetching.addresses import AddressPolicy, Lookup
from data_prep.fetching.fetch import Limits
from data_prep.fetching.hosts import Job
from data_prep.fetching.landing import Arrival
from data_prep.fetching.part_file import PartFile
from data_prep.sources.url_list import Row


@dataclass(frozen=True)
class Settings:
    """How a download goes about its work; none of it decides which row is in which part."""

    connections: int = 256
    per_host: int = 32
    retries: int = 4
    """The most for any class; see fetch_errors.CLASSES."""
    patience_s: float = 60.0
    """A host that is to be left alone for longer is given up for this run."""
    memory_bytes: int = 512_000_000
    """Of bodies."""
    max_pixels: int = 64_000_000
    limits: Limits = field(default_factory=Limits)
    policy: AddressPolicy = field(default_factory=AddressPolicy)
    lookup: Lookup | None = None


@dataclass(frozen=True)
class Part:
    """Rows that are fetched into one tar, with their keys."""

    stem: str
    rows: list[tuple[str, Row]]
    replaced: Mapping[str, str] = field(default_factory=dict)
    """By key: the class of the row of an earlier ledger whose place this one takes."""


@dataclass
class Progress:
    """What a run has done so far; changes while it runs."""

    errors: Counter[str] = field(default_factory=Counter)
    """By class, `ok` among them."""
    bytes: int = 0
    before: int = 0
    """Rows that earlier runs left in the ledger."""
    parts: int = 0
    active: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        return self.errors.total()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


@dataclass
class Opened:
    """A part whose file is open: what is to be asked for, and what is refused unasked."""

    file: PartFile
    jobs: list[Job]
    refused: list[Arrival]
    before: int
