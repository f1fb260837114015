"""DeepSpeed's ZeRO 1 and 2 and its offload train as one process of the native engine does, clipping in every step."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.optim.engine import Engine, make_engine
from limoe_dist.optim.schedule import learning_rate
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.step import Examples, backward
from tests.support.cases import batch, perturbed_model, slice_of, small_run
from tests.support.ranks import RanksPool

# Gradients of absent modalities follow true ones: a gradient left over from the step before would show.
GIVEN = ("pairs", "pairs", "images", "pairs", "texts")
# Below the norm of every step: with pictures alone, which have auxiliary losses only, it is 0.15.
CLIP_NORM = 0.1
# Kilobytes, so that some weights fill a bucket, others share one, and the largest fit in none.
SMALL_BUCKET_MB = 0.02


@dataclass(frozen=True)
class Variant:
    stage: int
    ep: int
    offload: bool = False
    microbatch: int = 0
    overlap: bool = True
    bucket_mb: float = 64.0
    recompute: bool = False

    def run(self, dtype: str = "fp32") -> Run:
        small = small_run(dtype)
        # eps: the gradient of a key bias is zero but for rounding, and Adam divides it by its own size.
        optim = {"clip_norm": CLIP_NORM, "eps": 1e-4, "engine": "deepspeed", "zero_stage": self.stage}
        parallel = {"overlap": self.overlap, "bucket_mb": self.bucket_mb, "ep": self.ep}
        train = {"microbatch_pairs": self.microbatch, "recompute": self.recompute}
        return small.model_copy(
            update={
                "optim": small.optim.model_copy(update=optim | {"offload": self.offload}),
                "parallel": small.parallel.model_copy(update=parallel),
                "train": small.train.model_copy(update=train),
            }
        )


def native(run: Run) -> Run:
    """The same run with the native engine, a whole batch at once."""
    optim = {"engine": "native", "zero_stage": 1, "offload": False}
    train = {"microbatch_pairs": 0, "recompute": False}
    return run.model_copy(
        update={
            "optim": run.optim.model_copy(update=optim),
            "parallel": Run().parallel,
            "train": run.train.model_copy(update=train),
        }
    )


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Shard]]
    """Of each step, before clipping."""
    shards: dict[str, Shard]
    weights: dict[str, Tensor]
    """The parameters of the model on this rank."""
    steps: int


def one_step(engine: Engine, model: Any, run: Run, mesh: Mesh, step: int, given: str) -> tuple[float, dict[str, Shard]]:
    """The loss of all ranks and the gradient; the engine is left before its update."""
    images, tokens, valid = slice_of(batch(step, torch.float32), mesh)
    examples = {
        "pairs": Examples(images, tokens, valid),
        "images": Examples(images, None, None),
        "texts": Examples(None, tokens, valid),
    }[given]
    losses = backward(model, engine, examples, step=step, run=run, mesh=mesh)
    boxes = {
        name: Shard(box.tensor.clone(), box.shape, box.start, box.writes) for name, box in engine.gradients().items()
    }
    return sum_over(losses.contrastive + losses.aux, mesh.world).item(), boxes


def train(run: Run, mesh: Mesh) -> Trained:
    model = perturbed_model(run, mesh)
    engine = make_engine(model, run, mesh)
    losses, norms, gradients = [], [], []
    for step, given in enumerate(GIVEN):
        loss, boxes = one_step(engine, model, run, mesh, step, given)
        losses.append(loss)
        gradients.append(boxes)
        norms.append(engine.step(learning_rate(step, optim=run.optim, steps=run.train.steps)).item())
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Trained(losses, norms, gradients, engine.shards(), weights, engine.steps)


@functools.cache
def trained_alone(run: Run) -> Trained:
    return train(run, Mesh.single())


def error_of(part: Shard, whole: Shard) -> float:
    """Of a box against the same part of the whole logical tensor, relative to its largest number."""
    if not part.tensor.numel():
        return 0.0
    place = tuple(slice(start, start + size) for start, size in zip(part.start, part.tensor.shape, strict=True))
    difference = (part.tensor - whole.tensor[place]).abs().max().item()
    # Relative to next to nothing, rounding is everything: a key bias, or a modality that is absent.
    return difference / max(whole.tensor.abs().max().item(), 1e-3 if part.shape else 1.0)


def errors(variant: Variant) -> dict[str, float]:
    """On a rank: losses, norms, gradients, weights and moments of five steps against one process, native."""
    run, mesh = variant.run(), Mesh.build(tp=1, ep=variant.ep) if dist.is_initialized() else Mesh.single()
    alone, found = trained_alone(native(run)), train(run, mesh)
    assert min(found.norms) > CLIP_NORM
    assert found.steps == len(GIVEN)
    away = {f"loss {step}": abs(a - b) for step, (a, b) in enumerate(zip(found.losses, alone.losses, strict=True))}
    for step, (a, b) in enumerate(zip(found.norms, alone.norms, strict=True)):
        away[f"norm {step}"] = abs(a - b) / b
    for step, boxes in enumerate(found.gradients):
        away |= {f"gradient {step} {name}": error_of(box, alone.gradients[step][name]) for name, box in boxes.items()}
    away |= {name: error_of(box, alone.shards[name]) for name, box in found.shards.items()}
    # Every logical number is on exactly one rank, and the model has the weights that the masters hold.
    held = sum(box.tensor.numel() for box in found.shards.values() if box.writes)
    assert sum_over(torch.tensor(held), mesh.world).item() == sum(s.tensor.numel() for s in alone.shards.values())
    for name, weight in found.weights.items():
        whole = alone.weights[name]
        mine = whole.chunk(variant.ep)[mesh.ep.index] if ".experts." in name else whole
        away[f"weight {name}"] = (weight - mine).abs().max().item()
    return away


def too_far(answers: list[dict[str, float]]) -> list[tuple[str, float]]:
    # Gradients of single modalities are small differences of large numbers; what they lead to is held closer.
    return [
        (name, error)
        for answer in answers
        for name, error in answer.items()
        if not error < (3e-5 if name.startswith("gradient") else 1e-5)
    ]


@pytest.mark.parametrize(
    "variant",
    [
        Variant(stage=1, ep=1, overlap=False),
        Variant(stage=1, ep=2, microbatch=2, bucket_mb=SMALL_BUCKET_MB),
        Variant(stage=2, ep=1, microbatch=4, overlap=False, bucket_mb=SMALL_BUCKET_MB, recompute=True),
        Variant(stage=2, ep=2, bucket_mb=SMALL_BUCKET_MB),
        Variant(stage=1, ep=1, offload=True, microbatch=2, overlap=False),
        Variant(stage=2, ep=2, offload=True, microbatch=4, bucket_mb=SMALL_BUCKET_MB),
    ],
    ids=str,
)
def test_2_ranks_train_as_one_process_of_the_native_engine(ranks2: RanksPool, variant: Variant) -> None:
    assert too_far(ranks2.run(errors, variant)) == []


@pytest.mark.parametrize(
    "variant", [Variant(stage=2, ep=2, microbatch=2), Variant(stage=1, ep=2, offload=True)], ids=str
)
def test_4_ranks_with_replicated_experts_train_as_one_process_of_the_native_engine(
    ranks4: RanksPool, variant: Variant
) -> None:
    assert too_far(ranks4.run(errors, variant)) == []


def errors_without_process_group(variant: Variant) -> dict[str, float]:
    dist.destroy_process_group()
    away = errors(variant)
    # DeepSpeed has one now, of this rank alone; a second engine finds it.
    assert dist.get_world_size() == 1
    return away | {f"again {name}": error for name, error in errors(variant).items()}


def test_one_process_alone_needs_no_process_group(ranks_pool: Callable[[int], RanksPool]) -> None:
    assert too_far(ranks_pool(1).run(errors_without_process_group, Variant(stage=2, ep=1, offload=True))) == []


def bf16_beside_native(variant: Variant) -> list[tuple[str, float]]:
    """On a rank: what differs from the native engine in the same layout, after five steps with bf16 weights."""
    run, mesh = variant.run("bf16"), Mesh.build(tp=1, ep=variant.ep)
    found, wanted = train(run, mesh), train(native(run), mesh)
    assert {weight.dtype for weight in found.weights.values()} == {torch.bfloat16, torch.float32}
    assert {box.tensor.dtype for box in found.shards.values()} == {torch.float32}
    away = [(f"loss {step}", abs(a - b)) for step, (a, b) in enumerate(zip(found.losses, wanted.losses, strict=True))]
    for name, weight in wanted.weights.items():
        assert found.weights[name].dtype == weight.dtype
        away.append((name, (found.weights[name] - weight).abs().max().item()))
        master = found.shards[f"model/{name}"].tensor - wanted.shards[f"model/{name}"].tensor
        away.append((f"master {name}", master.abs().sum().item()))
    return away


@pytest.mark.parametrize("variant", [Variant(stage=1, ep=2), Variant(stage=2, ep=1, offload=True)], ids=str)
def test_bf16_weights_beside_float32_ones_train_as_with_the_native_engine(ranks2: RanksPool, variant: Variant) -> None:
    # The sum of two ranks has one order only, so that even bf16 gives both engines the same gradients.
    for away in ranks2.run(bf16_beside_native, variant):
        assert [(name, error) for name, error in away if not error < 1e-6] == []


def go_on(first: Run, then: Run) -> dict[str, float]:
    """On a rank: two steps with one engine, then the third with that one and with another that takes its state."""
    mesh = Mesh.build(tp=1, ep=first.parallel.ep)
    model, heir = perturbed_model(first, mesh), perturbed_model(other_seed(then), mesh)
    engine, other = make_engine(model, first, mesh), make_engine(heir, then, mesh)
    for step, given in enumerate(GIVEN[1:3]):
        one_step(engine, model, first, mesh, step, given)
        engine.step(1e-3)
    saved, taken = engine.shards(), other.shards()
    assert list(map(outline, sorted(saved.items()))) == list(map(outline, sorted(taken.items())))
    for name, box in saved.items():
        taken[name].tensor.copy_(box.tensor)
    other.adopt(taken)
    other.steps = engine.steps
    pairs = zip(model.parameters(), heir.parameters(), strict=True)
    away = {"weights": max((a - b).abs().max().item() for a, b in pairs)}
    found, wanted = (one_step(e, m, r, mesh, 2, "pairs") for e, m, r in ((other, heir, then), (engine, model, first)))
    away["loss"] = abs(found[0] - wanted[0])
    away["norm"] = abs(other.step(1e-3) - engine.step(1e-3)).item()
    after = engine.shards()
    away |= {
        name: (box.tensor - after[name].tensor).abs().max().item() if box.tensor.numel() else 0.0
        for name, box in other.shards().items()
    }
    return away


def outline(item: tuple[str, Shard]) -> tuple[object, ...]:
    name, box = item
    return name, box.shape, box.start, box.tensor.shape, box.writes


def other_seed(run: Run) -> Run:
    return run.model_copy(update={"train": run.train.model_copy(update={"seed": 11})})


@pytest.mark.parametrize("variant", [Variant(stage=1, ep=2), Variant(stage=2, ep=2, offload=True)], ids=str)
def test_a_state_goes_from_either_engine_to_the_other(ranks2: RanksPool, variant: Variant) -> None:
    ours = variant.run()
    theirs = native(ours).model_copy(update={"parallel": ours.parallel})
    for first, then in ((ours, theirs), (theirs, ours)):
        for away in ranks2.run(go_on, first, then):
            assert [(name, error) for name, error in away.items() if not error < 1e-6] == []


def told_without_deepspeed_on_rank_1(variant: Variant) -> tuple[int | None, str]:
    run, mesh = variant.run(), Mesh.build(tp=1, ep=1)
    model = perturbed_model(run, mesh)
    hidden = mock.patch.dict(sys.modules, {"deepspeed": None}) if mesh.rank == 1 else nullcontext()
    with hidden, pytest.raises(UserError) as raised:
        make_engine(model, run, mesh)
    return raised.value.told_by, str(raised.value)


def test_where_one_rank_has_no_deepspeed_all_stop_and_that_rank_says_so(ranks2: RanksPool) -> None:
    (_, told_0), (teller, told_1) = ranks2.run(told_without_deepspeed_on_rank_1, Variant(stage=1, ep=1))
    assert (teller, told_0) == (1, "rank 1 found a fault")
    assert "pip install deepspeed==" in told_1
