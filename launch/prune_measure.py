"""What taking experts out costs and saves: accuracy, embeddings, parameters and speed, before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from limoe_dist.analysis.prune import Parameters, captions_of, interleaved, parameters
from limoe_dist.analysis.pruned import Modality
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import evaluation_batches
from limoe_dist.data.mixture import entries_of
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.eval.classes import ClassNames, classes_of_run, concepts_of
from limoe_dist.eval.embed import Progress, embed_pictures, embed_texts
from limoe_dist.eval.retrieval import retrieval
from limoe_dist.eval.zeroshot import zeroshot
from limoe_dist.model.tower import Limoe, TowerOutput, autocast
from limoe_dist.parallel.mesh import Mesh

WARM_UP, TIMES = 2, 15
"""Forward passes of each model that are not counted, and that are."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """The model before and after; both on one rank, without a capacity limit."""

    whole: Limoe
    run: Run
    pruned: Limoe
    pruned_run: Run


@dataclass(frozen=True)
class Distance:
    """Between the embeddings of the same inputs, which have length 1: 0 to 2."""

    inputs: int
    largest: float
    mean: float
    equal_frac: float
    """Share of the inputs of which the embedding is equal but for rounding."""


@dataclass(frozen=True)
class Speed:
    batch: int
    """Pictures or texts of a forward pass."""
    before_s: float
    after_s: float
    """Medians."""


@dataclass(frozen=True)
class Measured:
    data: str
    accuracy: dict[str, tuple[Figures, Figures]]
    """By task, before and after; empty where the data has nothing to measure it with."""
    distance: Distance
    parameters: tuple[Parameters, Parameters]
    speed: Speed
    notes: tuple[str, ...]
    """What was left out, and why."""

    def to_json(self) -> Figures:
        before, after = self.parameters
        speed = self.speed
        return {
            "accuracy": {
                "data": self.data,
                "capacity": "full",
                **{task: {"before": first, "after": then} for task, (first, then) in self.accuracy.items()},
            },
            "embeddings": {"data": self.data, **vars(self.distance)},
            "parameters": {"before": before.to_json(), "after": after.to_json()},
            "speed": {
                "batch": speed.batch,
                "passes": TIMES,
                "order": "interleaved, medians",
                "threads": torch.get_num_threads(),
                "before": {"seconds": speed.before_s, "inputs_per_s": speed.batch / speed.before_s},
                "after": {"seconds": speed.after_s, "inputs_per_s": speed.batch / speed.after_s},
            },
            "notes": list(self.notes),
        }


class _Mixed(nn.Module):
    """Pictures by one model and texts by another: what `zeroshot` and `retrieval` take for a model."""

    def __init__(self, *, pictures: Limoe, texts: Limoe) -> None:
        super().__init__()
        self.pictures, self.texts = pictures, texts

    def forward(self, images: Tensor | None, tokens: Tensor | None, text_valid: Tensor | None = None) -> TowerOutput:
        assert (images is None) != (tokens is None)
        output: TowerOutput = (self.texts if images is None else self.pictures)(images, tokens, text_valid)
        return output


def measure(
    pair: Pair,
    modality: Modality,
    shards: ShardSet,
    tokenizer: Tokenizer,
    *,
    accuracy: bool,
    device: torch.device,
    progress: Progress,
) -> Measured:
    """accuracy: False for shards on which the experts were chosen: an accuracy there would flatter.

    Raises UserError where no picture can be decoded, or no row has a text.
    """
    tasks, notes = (
        _accuracy(pair, modality, shards, tokenizer, device, progress)
        if accuracy
        else ({}, ["accuracy was not measured: the run has no data.validation; give --validation MANIFEST"])
    )
    embed = _embedder(modality, pair.run, shards, tokenizer, device, progress)
    before, after = parameters(pair.whole), parameters(pair.pruned)
    if before == after:
        notes.append(f"nothing was taken out: {modality}s use every expert; a smaller --coverage takes out more")
    return Measured(
        data=shards.path,
        accuracy=tasks,
        distance=_distance(embed(pair.whole), embed(pair.pruned)),
        parameters=(before, after),
        speed=_speed(pair, modality, shards, tokenizer, device),
        notes=tuple(notes),
    )


def _accuracy(
    pair: Pair, modality: Modality, shards: ShardSet, tokenizer: Tokenizer, device: torch.device, progress: Progress
) -> tuple[dict[str, tuple[Figures, Figures]], list[str]]:
    pictures, texts = (pair.pruned, pair.whole) if modality == "image" else (pair.whole, pair.pruned)
    models = (pair.whole, cast(Limoe, _Mixed(pictures=pictures, texts=texts)))
    tasks: dict[str, tuple[Figures, Figures]] = {}
    notes = []

    def both(task: Callable[[Limoe], Any]) -> tuple[Figures, Figures]:
        before, after = ({n: v for n, v in task(model).to_json().items() if n != "examples"} for model in models)
        return before, after

    options: dict[str, Any] = {"mesh": Mesh.single(), "device": device, "progress": progress}
    classes = _classes(pair.run, shards)
    for name, task in (
        ("zeroshot", lambda m: zeroshot(m, pair.run, shards, tokenizer, classes=classes, **options)),
        ("retrieval", lambda m: retrieval(m, pair.run, shards, tokenizer, **options)),
    ):
        try:
            tasks[name] = both(task)
        except UserError as error:
            # Data without concepts, or without captions: the other task, the embeddings and the speed are still told.
            notes.append(f"{name} was left out: {error}")
    return tasks, notes


def _classes(run: Run, shards: ShardSet) -> list[ClassNames] | None:
    """Those of eval.classes, as `limoe eval` takes them; of the shards alone where the training data is gone."""
    if run.eval.classes != "trained" or not any(concepts_of(shards)):
        return None
    try:
        return classes_of_run(run, ShardSet(*(entry.path for entry in entries_of(run.data)), data=run.data), shards)
    except UserError:
        return None


def _texts(run: Run, shards: ShardSet) -> list[str]:
    """Raises UserError where there are none."""
    if texts := captions_of(shards, run.eval.templates):
        return texts
    raise UserError(f"{shards.path}: no row has a caption or a concept: give --validation MANIFEST of data with texts")


def _embedder(
    modality: Modality, run: Run, shards: ShardSet, tokenizer: Tokenizer, device: torch.device, progress: Progress
) -> Callable[[Limoe], Tensor]:
    """(n, P) of a model: every good picture, or every distinct text."""
    if modality == "text":
        texts = sorted(set(_texts(run, shards)))
        return lambda model: embed_texts(
            model, run, tokenizer, texts, mesh=Mesh.single(), device=device, progress=progress
        )

    def pictures(model: Limoe) -> Tensor:
        found = embed_pictures(model, run, shards, mesh=Mesh.single(), device=device, progress=progress)
        return found.image_RP[found.good_R]

    return pictures


def _distance(before_XP: Tensor, after_XP: Tensor) -> Distance:
    distance_X = (before_XP.double() - after_XP.double()).norm(dim=1)
    # Other experts in the batch change the shape of a matrix product, and with it its last bits.
    equal = (distance_X < 1e-5).double().mean()
    return Distance(len(distance_X), float(distance_X.max()), float(distance_X.mean()), float(equal))


@torch.no_grad()
def _speed(pair: Pair, modality: Modality, shards: ShardSet, tokenizer: Tokenizer, device: torch.device) -> Speed:
    batch = pair.run.eval.batch_pairs
    inputs = _inputs(pair.run, modality, shards, tokenizer, batch, device)

    def embed(model: Limoe, run: Run) -> None:
        with autocast(run, device):
            model(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls = (lambda: embed(pair.whole, pair.run)), (lambda: embed(pair.pruned, pair.pruned_run))
    interleaved(*calls, times=WARM_UP, clock=time.perf_counter)
    before, after = interleaved(*calls, times=TIMES, clock=time.perf_counter)
    return Speed(batch, statistics.median(before), statistics.median(after))


def _inputs(
    run: Run, modality: Modality, shards: ShardSet, tokenizer: Tokenizer, batch: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A batch of eval.batch_pairs of the data: its first rows, again and again where it has fewer."""
    if modality == "image":
        batches = evaluation_batches(run, shards, None, batch_pairs=batch, rank=0, world=1, device=device)
        images = next(iter(batches)).images
        return images.double() if run.train.dtype == "fp64" else images, None, None
    texts = _texts(run, shards)
    encoded = tokenizer([texts[number % len(texts)] for number in range(batch)])
    tokens, valid = (torch.from_numpy(x).to(device) for x in (encoded.tokens, encoded.valid))
    return None, tokens, valid
