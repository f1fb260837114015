"""Every row once, un-augmented, over any number of ranks: for everything that `limoe eval` measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import Row, ShardSet
from limoe_dist.data.augment import identity_params
from limoe_dist.data.dali import Decoder
from limoe_dist.data.header import picture_refusal, refusal
from limoe_dist.data.pictures import PictureReader, Pictures
from limoe_dist.data.stand_ins import BadRow
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.data.transfer import copies_finished, on_device, use_on_current_stream


@dataclass(frozen=True)
class EvalBatch:
    """b rows of one rank, on the device. Rows past the last one are repeats of the first, and are not real."""

    rows: npt.NDArray[np.int64]
    """(b,) their numbers in the manifest."""
    places: npt.NDArray[np.int64]
    """(b,) their places among the rows that were asked for: all rows, or `numbers`."""
    real: Tensor
    """(b,) bool: False for a repeat and for a bad row; over all ranks and batches, each good row is real once."""
    images: Tensor
    """(b, 3, size, size) float32, normalised; zeros for a bad row."""
    keys: tuple[str, ...]
    concepts: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    """All captions of each row, none of them blank."""
    tokens: Tensor | None
    """(b, length) int64, of each row's first caption; None without a tokenizer."""
    valid: Tensor | None
    """(b, length) bool"""
    bad: tuple[BadRow, ...]
    """The rows of this batch that could not be used."""


def evaluation_batches(
    run: Run,
    shards: ShardSet,
    tokenizer: Tokenizer | None,
    *,
    batch_pairs: int,
    rank: int,
    world: int,
    device: torch.device,
    numbers: Sequence[int] | None = None,
) -> Iterator[EvalBatch]:
    """Every row exactly once over all ranks; every rank makes as many batches, each of `batch_pairs` rows.

    With a tokenizer, a row without a caption is bad, as in training; without one, only its picture counts.
    numbers: the rows that are asked for, in this order; None: all of them.
    """
    asked = np.arange(len(shards)) if numbers is None else np.array(numbers, dtype=np.int64)
    decoder = Decoder(run.image, mode="evaluation", batch_size=batch_pairs, threads=run.data.threads, device=device)
    reader = PictureReader(decoder, refusal if tokenizer else picture_refusal)
    for first in range(rank * batch_pairs, _rounded_up(len(asked), world * batch_pairs), world * batch_pairs):
        places = np.arange(first, first + batch_pairs, dtype=np.int64)
        inside = places < len(asked)
        places[~inside] = 0
        rows = [shards.row(int(number)) for number in asked[places]]
        with copies_finished(device):
            pictures = reader.read(rows, identity_params(batch_pairs))
            batch = _batch(rows, places, inside, pictures, tokenizer, device)
        use_on_current_stream(batch.images)
        yield batch


def num_evaluation_batches(rows: int, *, batch_pairs: int, world: int) -> int:
    """Batches that each rank makes of `rows` rows."""
    return _rounded_up(rows, world * batch_pairs) // (world * batch_pairs)


def decode_rows(run: Run, shards: ShardSet, numbers: Sequence[int], *, device: torch.device) -> Pictures:
    """Un-augmented pictures of any rows, in this order; `reasons` says which are bad and why."""
    decoder = Decoder(run.image, mode="evaluation", batch_size=len(numbers), threads=run.data.threads, device=device)
    rows = [shards.row(int(number)) for number in numbers]
    return PictureReader(decoder, picture_refusal).read(rows, identity_params(len(rows)))


def _batch(
    rows: Sequence[Row],
    places: npt.NDArray[np.int64],
    inside: npt.NDArray[np.bool_],
    pictures: Pictures,
    tokenizer: Tokenizer | None,
    device: torch.device,
) -> EvalBatch:
    good = np.array([reason is None for reason in pictures.reasons])
    tokens = tokenizer([row.captions[0] if row.captions else "" for row in rows]) if tokenizer else None
    return EvalBatch(
        rows=np.array([row.number for row in rows], dtype=np.int64),
        places=places,
        real=on_device(good & inside, device),
        images=pictures.images,
        keys=tuple(row.key for row in rows),
        concepts=tuple(row.concept for row in rows),
        captions=tuple(row.captions for row in rows),
        tokens=on_device(tokens.tokens, device) if tokens else None,
        valid=on_device(tokens.valid, device) if tokens else None,
        bad=tuple(
            BadRow(row.number, row.number, row.key, reason)
            for row, reason, counts in zip(rows, pictures.reasons, inside, strict=True)
            if reason and counts
        ),
    )


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
