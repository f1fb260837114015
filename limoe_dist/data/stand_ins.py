"""Rows for positions where some rows are bad: the next rows of the shard stand in; bad rows are counted and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.data.arrow import Row, ShardSet
from limoe_dist.data.augment import AugmentParams
from limoe_dist.data.header import NO_CAPTION, NO_PICTURE
from limoe_dist.data.mixture import MIN_BAD_ROWS
from limoe_dist.data.pictures import PictureReader

MAX_TRIES = 16
"""Rows of the same shard that are tried in place of one that is bad."""
_NAMED = 5


@dataclass(frozen=True)
class BadRow:
    position: int
    """The position that met the row; in evaluation, the row's number."""
    row: int
    """Its number in the ShardSet."""
    key: str
    reason: str


@dataclass(frozen=True)
class Filled:
    positions: tuple[int, ...]
    rows: tuple[Row, ...]
    """The rows that were used, one a position."""
    images: Tensor
    """(n, 3, size, size) float32"""
    replaced: tuple[BadRow, ...]
    """Bad rows that were met on the way, in the order of their positions and tries."""


def fill(
    shards: ShardSet, reader: PictureReader, positions: Sequence[int], numbers: Sequence[int], params: AugmentParams
) -> Filled:
    """Row and picture of each position. A stand-in keeps the parameters of its position.

    Raises UserError where a row and all of its at most MAX_TRIES stand-ins are bad.
    """
    rows = [shards.row(int(number)) for number in numbers]
    pictures = reader.read(rows, params)
    images, reasons = pictures.images, dict(enumerate(pictures.reasons))
    pending = [i for i, reason in reasons.items() if reason]
    stand_ins = {i: shards.next_in_shard(int(numbers[i]), MAX_TRIES) for i in pending}
    replaced: dict[int, list[BadRow]] = {i: [] for i in pending}
    while pending:
        for i in pending:
            replaced[i].append(BadRow(int(positions[i]), rows[i].number, rows[i].key, reasons[i] or ""))
            number = next(stand_ins[i], None)
            if number is None:
                raise UserError(_exhausted(shards, int(numbers[i]), replaced[i]))
            rows[i] = shards.row(number)
        again = reader.read([rows[i] for i in pending], params.take(pending))
        images[torch.as_tensor(pending, device=images.device)] = again.images
        reasons = dict(zip(pending, again.reasons, strict=True))
        pending = [i for i, reason in reasons.items() if reason]
    return Filled(tuple(positions), tuple(rows), images, tuple(bad for i in sorted(replaced) for bad in replaced[i]))


def _exhausted(shards: ShardSet, number: int, met: Sequence[BadRow]) -> str:
    row = shards.row(number)
    file = shards.file_of(row)
    return (
        f'{file}: row {row.index_in_shard} (key "{row.key}": {met[0].reason}) is bad, and so are the '
        f"{len(met) - 1} rows after it that could stand in "
        f"(the last: {met[-1].reason}): {_remedy(met, 'pack the shard again from whole pictures')}"
    )


def _remedy(met: Sequence[BadRow], otherwise: str) -> str:
    """What to do about bad rows: whole rows of one modality are no damage, but nothing to train on either."""
    if all(bad.reason in (NO_CAPTION, NO_PICTURE) for bad in met):
        return "training needs pairs, rows with a picture and a caption: pack those alone"
    return otherwise


class BadCount:
    """Bad rows among the rows read so far by one rank."""

    def __init__(self, limit_frac: float, place: str, *, report: str = "") -> None:
        """limit_frac: data.max_bad_frac. place: what is read, for the message. report: the file that names them all."""
        self.bad = self.seen = 0
        self._limit_frac, self._place, self._report = limit_frac, place, report
        self._first: list[BadRow] = []

    def add(self, filled: Filled) -> None:
        """Counts. Raises UserError once more than `limit_frac` of the rows, and at least MIN_BAD_ROWS, are bad."""
        self.seen += len(filled.rows) + len(filled.replaced)
        self.bad += len(filled.replaced)
        self._first += filled.replaced[: _NAMED - len(self._first)]
        if self.bad >= MIN_BAD_ROWS and self.bad > self._limit_frac * self.seen:
            named = "; ".join(f'"{bad.key}": {bad.reason}' for bad in self._first)
            raise UserError(
                f"{self._place}: {self.bad} of the {self.seen} rows read so far are bad, more than "
                f"data.max_bad_frac={self._limit_frac:g} (the first: {named}"
                + (f"; all of them: {self._report}" if self._report else "")
                + f"): {_remedy(self._first, 'pack again from whole pictures')}, or raise data.max_bad_frac"
            )
