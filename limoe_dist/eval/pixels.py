"""The nearest neighbour in pixels: what classification without learning gets from the same training pictures.

A picture is taken for the class of the training picture at the smallest L2 distance, on the run's un-augmented
normalised pixels. The candidates are the classes of the zero-shot evaluation: training pictures of other concepts are
passed over, so that both choose from the same list.

Shapes: Q evaluated pictures, b training pictures, K classes, D = 3 * size * size pixel values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import evaluation_batches, num_evaluation_batches
from limoe_dist.eval.classes import (
    NO_CLASS,
    ClassNames,
    class_numbers,
    classes_of_concepts,
    concepts_of,
    true_classes,
)
from limoe_dist.eval.embed import Progress, pass_size, silent
from limoe_dist.eval.ranking import first_places
from limoe_dist.parallel.collectives import all_gather_rows, max_over, sum_over
from limoe_dist.parallel.mesh import Mesh

CHUNK_BYTES = 512 << 20
"""Evaluated pictures and their distances that a rank holds at a time; for each chunk the training set is read once."""


@dataclass(frozen=True)
class PixelNeighbour:
    rows: int
    """Pictures that were classified."""
    training_rows: int
    """Good training pictures of these classes."""
    classes: int
    classes_in_training: int
    """Classes of which there is a training picture; a picture of another class counts as wrong."""
    top1: float
    top5: float
    """Shares of the rows; top5 looks at the five nearest distinct classes."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@torch.no_grad()
def pixel_nearest_neighbour(
    run: Run,
    train_shards: ShardSet,
    shards: ShardSet,
    *,
    mesh: Mesh,
    device: torch.device,
    classes: Sequence[ClassNames] | None = None,
    progress: Progress = silent,
) -> PixelNeighbour:
    """Classifies every picture of `shards` by the nearest picture of `train_shards`; the same on every rank.

    A collective over all ranks: each compares its part of the training pictures. Memory is bounded by CHUNK_BYTES.
    classes: None takes the distinct concepts of `shards`. Raises UserError as `zeroshot` does.
    """
    concepts, place = concepts_of(shards), shards.path
    if classes is None:
        classes = classes_of_concepts(concepts, place=place)
    class_R = torch.tensor(true_classes(concepts, classes, place=place), device=device)
    train_class_R = torch.tensor(class_numbers(concepts_of(train_shards), classes), device=device)
    rows = top1 = top5 = 0
    seen_K = torch.zeros(len(classes), dtype=torch.int64, device=device)
    for query in _chunks(run, shards, class_R, len(classes), mesh=mesh, device=device):
        nearest = _nearest_of_class(
            query.pixels_QD, run, train_shards, train_class_R, len(classes), mesh=mesh, device=device, progress=progress
        )
        place_Q5 = first_places(-nearest.distance_QK, 5)
        reached_Q5 = nearest.distance_QK.gather(1, place_Q5).isfinite()
        right_Q5 = (place_Q5 == query.class_Q[:, None]) & reached_Q5
        rows += len(right_Q5)
        top1 += int(right_Q5[:, 0].sum())
        top5 += int(right_Q5.any(1).sum())
        seen_K = nearest.pictures_K
    if rows == 0:
        raise UserError(f"{place}: no row has both a concept and a picture that can be decoded: pack again", told_by=0)
    return PixelNeighbour(
        rows=rows,
        training_rows=int(seen_K.sum()),
        classes=len(classes),
        classes_in_training=int((seen_K > 0).sum()),
        top1=top1 / rows,
        top5=top5 / rows,
    )


@dataclass(frozen=True)
class _Query:
    pixels_QD: Tensor
    """(Q, D) float32"""
    class_Q: Tensor
    """(Q,) int64"""


def _chunks(
    run: Run, shards: ShardSet, class_R: Tensor, num_classes: int, *, mesh: Mesh, device: torch.device
) -> Iterator[_Query]:
    """All good rows that have a class, the same chunks on every rank, each of at most CHUNK_BYTES (or one pass)."""
    world = mesh.world.size
    size = pass_size(run, len(shards), world=world)
    row_bytes = 4 * (3 * run.image.size**2 + 2 * num_classes)
    passes = max(1, CHUNK_BYTES // (row_bytes * size * world))
    batches = evaluation_batches(run, shards, None, batch_pairs=size, rank=mesh.rank, world=world, device=device)
    total = num_evaluation_batches(len(shards), batch_pairs=size, world=world)
    pixels, numbers, real = [], [], []
    for done, batch in enumerate(batches, start=1):
        pixels.append(batch.images.flatten(1))
        numbers.append(torch.from_numpy(batch.rows).to(device))
        real.append(batch.real)
        if len(pixels) < passes and done < total:
            continue
        class_Q = class_R[all_gather_rows(torch.cat(numbers), mesh.world)]
        used_Q = all_gather_rows(torch.cat(real).to(torch.uint8), mesh.world).bool() & (class_Q != NO_CLASS)
        pixels_QD = all_gather_rows(torch.cat(pixels), mesh.world)
        pixels, numbers, real = [], [], []
        if used_Q.any():
            yield _Query(pixels_QD[used_Q], class_Q[used_Q])


@dataclass(frozen=True)
class _Nearest:
    distance_QK: Tensor
    """(Q, K) squared L2 distance to the nearest training picture of each class, less the query's own square: an order.
    Infinite where the class has no training picture."""
    pictures_K: Tensor
    """(K,) int64: good training pictures of each class, over all ranks."""


def _nearest_of_class(
    pixels_QD: Tensor,
    run: Run,
    train_shards: ShardSet,
    train_class_R: Tensor,
    num_classes: int,
    *,
    mesh: Mesh,
    device: torch.device,
    progress: Progress,
) -> _Nearest:
    distance_QK = torch.full((len(pixels_QD), num_classes), math.inf, device=device)
    pictures_K = torch.zeros(num_classes, dtype=torch.int64, device=device)
    world = mesh.world.size
    size = pass_size(run, len(train_shards), world=world)
    total = num_evaluation_batches(len(train_shards), batch_pairs=size, world=world)
    batches = evaluation_batches(run, train_shards, None, batch_pairs=size, rank=mesh.rank, world=world, device=device)
    for done, batch in enumerate(batches, start=1):
        class_b = train_class_R[torch.from_numpy(batch.rows).to(device)]
        used_b = batch.real & (class_b != NO_CLASS)
        class_b = class_b[used_b]
        keep_nearest(distance_QK, pixels_QD, batch.images[used_b].flatten(1), class_b)
        pictures_K += class_b.bincount(minlength=num_classes)
        progress("training pictures", done, total)
    return _Nearest(-max_over(-distance_QK, mesh.world), sum_over(pictures_K, mesh.world))


def keep_nearest(distance_QK: Tensor, pixels_QD: Tensor, training_bD: Tensor, class_b: Tensor) -> None:
    """Lowers distance_QK, in place, to the nearest of b further training pictures, each for its class.

    |q - t|^2 = |q|^2 - 2 q.t + |t|^2; |q|^2 is left out, for it changes no order within a row.
    """
    distance_Qb = training_bD.square().sum(1) - 2 * (pixels_QD @ training_bD.T)
    distance_QK.scatter_reduce_(1, class_b.expand(len(pixels_QD), -1), distance_Qb, "amin")
