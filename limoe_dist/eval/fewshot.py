"""Few-shot classification: a linear classifier on a few training pictures of each class, in closed form.

LIMoE's "10-shot": the tower stays as it is; its features of a picture, averaged over the tokens and before the
projection, are classified by ridge regression (limoe_dist/eval/ridge.py), several times with other pictures.

Shapes: T training pictures that any seed draws, R evaluated pictures, K classes, D width.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.mixture import manifest_file
from limoe_dist.data.philox import uniforms
from limoe_dist.data.tokenizer import normalised
from limoe_dist.eval.embed import Progress, picture_features, silent
from limoe_dist.eval.ridge import fit
from limoe_dist.model.tower import Limoe
from limoe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Shots:
    shots: int = 10
    """Training pictures of each class."""
    seeds: int = 3
    """How many times they are drawn: seeds 0, 1, ..."""
    l2: tuple[float, ...] = (1024.0,)
    """Penalties; the first one is the result. big_vision takes 2^10."""
    short_classes: Literal["skip", "use"] = "skip"
    """Classes with fewer training pictures: left out, with their evaluated pictures; or used with all they have."""


@dataclass(frozen=True)
class Accuracy:
    """At one penalty: shares of the evaluated pictures, 0 to 1."""

    l2: float
    of_seeds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.of_seeds)

    @property
    def std(self) -> float | None:
        """Standard deviation over the seeds (of n - 1); None for one seed."""
        return statistics.stdev(self.of_seeds) if len(self.of_seeds) > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {
            "l2": self.l2,
            "mean": self.mean,
            "std": self.std,
            "min": min(self.of_seeds),
            "max": max(self.of_seeds),
            "of_seeds": list(self.of_seeds),
        }


@dataclass(frozen=True)
class FewShot:
    accuracies: tuple[Accuracy, ...]
    """One for each penalty, in the order in which they were given."""
    chance: float
    rows: int
    """Pictures that were classified."""
    shots: int
    seeds: int
    features: int
    """D."""
    classes: int
    """Classes that were learned and chosen between."""
    short_classes: int
    """Classes of the training rows that have fewer than `shots` pictures."""
    short: Literal["skip", "use"]
    """What was done with them."""
    training_rows: int
    """Training pictures of one draw: the mean over the seeds, rounded."""
    bad_training_rows: int
    """Drawn pictures that could not be decoded, over all seeds; nothing stands in for them."""
    bad_rows: int
    """Evaluated rows whose picture could not be decoded."""
    pictureless_rows: int
    unnamed_rows: int
    """Evaluated rows without a concept."""
    other_rows: int
    """Evaluated rows of a concept that was not learned."""
    capacity: str
    """moe.eval_capacity; with "paper", features depend on the batch that they are in."""

    @property
    def accuracy(self) -> Accuracy:
        """At the first penalty."""
        return self.accuracies[0]

    def to_json(self) -> dict[str, Any]:
        figures = {name: value for name, value in vars(self).items() if name != "accuracies"}
        first = {name: value for name, value in self.accuracy.to_json().items() if name != "l2"}
        return {
            "accuracy": first.pop("mean"),
            **first,
            "l2": self.accuracy.l2,
            **figures,
            "of_l2": [each.to_json() for each in self.accuracies],
        }


@torch.no_grad()
def fewshot(
    model: Limoe,
    run: Run,
    train_shards: ShardSet,
    shards: ShardSet,
    shots: Shots,
    *,
    mesh: Mesh,
    device: torch.device,
    progress: Progress = silent,
) -> FewShot:
    """Accuracy on every picture of `shards` whose class was learned; the same on every rank. A collective.

    Only the training pictures that some seed draws are embedded. Raises UserError where both are the same shards,
    fewer than two classes have enough pictures, or no evaluated picture is of one of them.
    """
    if manifest_file(train_shards.path) == manifest_file(shards.path):
        raise UserError(
            f"{shards.path}: would be learned from and evaluated on: give other shards with --train or --data",
            told_by=0,
        )
    learned = _learned(train_shards, shots)
    evaluated = _evaluated(shards, learned.number_of)
    draws = [drawn(learned.rows_K, shots=shots.shots, seed=seed) for seed in range(shots.seeds)]
    wanted = sorted({row for draw in draws for rows in draw for row in rows})
    training = picture_features(
        model, run, train_shards, wanted, mesh=mesh, device=device, what="training pictures", progress=progress
    )
    of_row = {row: place for place, row in enumerate(wanted)}
    asked = picture_features(model, run, shards, evaluated.rows, mesh=mesh, device=device, progress=progress)
    # float64 on the CPU: squared features times 10^4 for the constant leave float32 few digits, and all ranks agree.
    good_R, x_RD = asked.good_R.cpu(), asked.feature_RD.double().cpu()
    class_R = torch.tensor(evaluated.classes)[good_R]
    found: list[list[float]] = []
    used, bad = 0, 0
    for draw in draws:
        place = torch.tensor([of_row[row] for rows in draw for row in rows])
        class_T = torch.tensor([number for number, rows in enumerate(draw) for _ in rows])
        good_T = training.good_R.cpu()[place]
        used, bad = used + int(good_T.sum()), bad + int((~good_T).sum())
        x_TD = training.feature_RD.double().cpu()[place[good_T]]
        found.append(_accuracies(x_TD, class_T[good_T], x_RD[good_R], class_R, len(draw), shots.l2))
    return FewShot(
        accuracies=tuple(
            Accuracy(l2, tuple(of_seed[number] for of_seed in found)) for number, l2 in enumerate(shots.l2)
        ),
        chance=1 / len(learned.rows_K),
        rows=len(class_R),
        shots=shots.shots,
        seeds=shots.seeds,
        features=x_RD.shape[1],
        classes=len(learned.rows_K),
        short_classes=learned.short,
        short=shots.short_classes,
        training_rows=round(used / shots.seeds),
        bad_training_rows=bad,
        bad_rows=int((~good_R).sum()),
        pictureless_rows=evaluated.pictureless,
        unnamed_rows=evaluated.unnamed,
        other_rows=evaluated.other,
        capacity=run.moe.eval_capacity,
    )


def _accuracies(
    x_TD: Tensor, class_T: Tensor, x_RD: Tensor, class_R: Tensor, num_classes: int, l2: Sequence[float]
) -> list[float]:
    ridge = fit(x_TD, class_T, num_classes)
    return [(ridge.predict(x_RD, each) == class_R).double().mean().item() for each in l2]


@dataclass(frozen=True)
class _Learned:
    rows_K: list[list[int]]
    """The training rows of each class that hold a picture."""
    number_of: dict[str, int]
    """The class of each normalised concept."""
    short: int


def _learned(shards: ShardSet, shots: Shots) -> _Learned:
    rows_of: dict[str, list[int]] = {}
    for number in range(len(shards)):
        row = shards.row(number)
        if (name := normalised(row.concept)) and len(row.image):
            rows_of.setdefault(name, []).append(number)
    if not rows_of:
        raise UserError(
            f"{shards.path}: no row has both a concept and a picture, so there is nothing to learn: fill the column "
            '"concept" when packing, or give other shards with --train',
            told_by=0,
        )
    enough = {name: rows for name, rows in rows_of.items() if len(rows) >= shots.shots}
    kept = enough if shots.short_classes == "skip" else rows_of
    if len(kept) < 2:
        sizes = sorted((len(rows) for rows in rows_of.values()), reverse=True)
        fix = "give shards of two classes or more"
        if len(sizes) > 1:
            fix = f"use --shots {sizes[1]} or fewer, or --short-classes use"
        raise UserError(
            f"--shots={shots.shots}: {len(enough)} of the {len(rows_of)} classes of {shards.path} have so many "
            f"pictures (the most is {sizes[0]}), and two are needed: {fix}",
            told_by=0,
        )
    names = sorted(kept)
    return _Learned(
        rows_K=[kept[name] for name in names],
        number_of={name: number for number, name in enumerate(names)},
        short=len(rows_of) - len(enough),
    )


@dataclass(frozen=True)
class _Evaluated:
    rows: list[int]
    classes: list[int]
    """The class of each."""
    pictureless: int
    unnamed: int
    other: int


def _evaluated(shards: ShardSet, number_of: dict[str, int]) -> _Evaluated:
    rows, classes = [], []
    pictureless = unnamed = other = 0
    for number in range(len(shards)):
        row = shards.row(number)
        name = normalised(row.concept)
        if not len(row.image):
            pictureless += 1
        elif not name:
            unnamed += 1
        elif name not in number_of:
            other += 1
        else:
            rows.append(number)
            classes.append(number_of[name])
    if not rows:
        raise UserError(
            f"{shards.path}: none of its {len(shards)} rows is a picture of one of the {len(number_of)} classes that "
            f"are learned ({other} are of other concepts, {unnamed} without a concept, {pictureless} without a "
            "picture): use --short-classes use, or other shards with --data or --train",
            told_by=0,
        )
    return _Evaluated(rows, classes, pictureless, unnamed, other)


def drawn(rows_K: Sequence[Sequence[int]], *, shots: int, seed: int) -> list[list[int]]:
    """Up to `shots` of the rows of each class, rising: a function of (seed, row) alone, so that all ranks agree.

    A larger `shots` draws these and more.
    """
    draws = []
    for rows in rows_K:
        order = np.argsort(uniforms(np.array(rows, dtype=np.int64), seed=seed, draws=1)[0], kind="stable")
        draws.append(sorted(rows[place] for place in order[:shots].tolist()))
    return draws
