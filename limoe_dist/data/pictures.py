"""Rows to pixels where some rows are bad: one bad picture fails DALI's whole batch, so then each is tried alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limoe_dist.data.arrow import Row
from limoe_dist.data.augment import AugmentParams
from limoe_dist.data.dali import DecodeError, Decoder


@dataclass(frozen=True)
class Pictures:
    images: Tensor
    """(n, 3, size, size) float32; zeros where the row is bad."""
    reasons: tuple[str | None, ...]
    """Why a row is bad, or None; n of them."""


MOST_REMEMBERED = 65_536
"""Bad rows that a reader knows by number; one more, and it forgets them all and meets them anew."""


class PictureReader:
    """Decodes rows, and remembers bad ones by their number, so that each fails a batch only once."""

    def __init__(self, decoder: Decoder, refusal: Callable[[Row], str | None]) -> None:
        self.decoder = decoder
        self._refusal = refusal
        self._bad: dict[int, str] = {}

    def read(self, rows: Sequence[Row], params: AugmentParams) -> Pictures:
        """The pictures of n rows with n parameters, at most the decoder's batch size."""
        if len(self._bad) > MOST_REMEMBERED:
            self._bad.clear()
        good = [i for i, row in enumerate(rows) if not self._is_bad(row)]
        size = self.decoder.image.size
        images = None
        if good:
            try:
                images = self.decoder.decode([rows[i].image for i in good], params.take(good))
            except DecodeError:
                good, images = self._one_by_one(rows, params, good)
        if images is None or len(good) < len(rows):
            spread = torch.zeros((len(rows), 3, size, size), dtype=torch.float32, device=self.decoder.device)
            if images is not None:
                spread[torch.as_tensor(good, device=spread.device)] = images
            images = spread
        return Pictures(images=images, reasons=tuple(self._bad.get(row.number) for row in rows))

    def _is_bad(self, row: Row) -> bool:
        if row.number not in self._bad and (reason := self._refusal(row)) is not None:
            self._bad[row.number] = reason
        return row.number in self._bad

    def _one_by_one(
        self, rows: Sequence[Row], params: AugmentParams, indices: Sequence[int]
    ) -> tuple[list[int], Tensor | None]:
        good, images = [], []
        for i in indices:
            try:
                images.append(self.decoder.decode([rows[i].image], params.take([i])))
                good.append(i)
            except DecodeError as error:
                self._bad[rows[i].number] = f"cannot be decoded ({error})"
        return good, torch.cat(images) if images else None
