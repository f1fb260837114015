"""The product on a case, in one process or as one of several ranks; results as NumPy arrays of the whole tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.model.moe_layer import EVALUATION, Route, Routes, RoutingMode
from limoe_dist.model.tower import Limoe, TowerOutput, build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel import counter_rng
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard, local_shard, placement_of
from limoe_dist.train.guard import Guard
from limoe_dist.train.metrics import Window
from limoe_dist.train.step import Examples, training_step
from tests.oracle.step import Batch, Weights

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Box:
    """A rank's part of a tensor."""

    value: np.ndarray
    shape: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    contrastive: float
    """This rank's share, as `aux`."""
    aux: float
    correct_2: np.ndarray
    guard_loss: float
    """The loss that the guard judges: of the global batch, on every rank."""
    guard_norm: float
    grad_norm: float
    rate: float
    gradients: dict[str, Box]
    masters: dict[str, Box]
    """The optimizer's copies of the weights after the step."""
    weights: dict[str, Box]
    """The model's own parameters after the step."""


@dataclass(frozen=True)
class Trained:
    steps: list[Step]
    line: dict[str, Any]
    """The line of metrics about all steps."""


def initial_weights(run: Run) -> Weights:
    model = build_model(run, mesh=Mesh.single(), device=CPU)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def model_with(run: Run, weights: Weights, mesh: Mesh) -> Limoe:
    model = build_model(run, mesh=mesh, device=CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            placement, whole = placement_of(parameter), torch.tensor(weights[name])
            mine = placement.local_slice(mesh)
            part = whole.narrow(placement.dim, mine.start, mine.stop - mine.start) if whole.dim() else whole
            parameter.copy_(part)
    return model


def trained(run_json: str, weights: Weights, batches: list[Batch]) -> Trained:
    """Training steps on the started ranks, or in this process alone: the function that every rank runs."""
    run = Run.model_validate_json(run_json)
    alone = not torch.distributed.is_initialized()
    mesh = Mesh.single() if alone else Mesh.build(tp=run.parallel.tp, ep=run.parallel.ep)
    model = model_with(run, weights, mesh)
    engine, guard, window = make_engine(model, run, mesh), Guard(run.guard, CPU), Window(run, mesh, CPU)
    gradients: dict[str, Box] = {}
    update = engine.step

    def recorded(rate: float, **options: Any) -> Tensor:
        gradients.update(_boxes(engine.gradients().items()))
        return update(rate, **options)

    engine.step = recorded  # type: ignore[method-assign]
    steps = []
    for number, batch in enumerate(batches):
        result = training_step(model, engine, _examples(batch, mesh), step=number, run=run, mesh=mesh, guard=guard)
        assert result.verdict is not None
        judged = guard.read(result.verdict)
        window.add(result)
        shards = engine.shards()
        parameters = {name: local_shard(p, p, mesh) for name, p in model.named_parameters()}
        steps.append(
            Step(
                contrastive=result.losses.contrastive.item(),
                aux=result.losses.aux.item(),
                correct_2=result.losses.correct_2.numpy(),
                guard_loss=judged.loss,
                guard_norm=judged.grad_norm,
                grad_norm=result.grad_norm.item(),
                rate=result.rate,
                gradients=dict(gradients),
                masters=_boxes((n.removeprefix("model/"), s) for n, s in shards.items() if n.startswith("model/")),
                weights=_boxes(parameters.items()),
            )
        )
    return Trained(steps, window.summary(step=len(batches), scale=model.scale))


def passed(run: Run, weights: Weights, batch: Batch, *, training: bool, step: int = 0) -> tuple[TowerOutput, Routes]:
    """One forward pass in one process."""
    model, given = model_with(run, weights, Mesh.single()), _examples(batch, Mesh.single())
    mode = RoutingMode(training=True, seed=run.train.seed, step=step) if training else EVALUATION
    routes: dict[int, Route] = {}
    with torch.no_grad():
        return model(given.images, given.tokens, given.valid, mode=mode, routes=routes), routes


def noise(run: Run, batch: Batch, step: int) -> dict[int, np.ndarray]:
    """(G, S, E) standard normal numbers of each MoE block in a step: a function of seed, step, block and group."""
    groups, experts = run.train.batch_pairs // run.moe.group_pairs, run.moe.num_experts
    found = {}
    for block in run.moe.blocks:
        keys = _keys("router-noise", run.train.seed, step, block, groups)
        numbers = counter_rng.normal(keys, _tokens(run, batch) // groups * experts, device=CPU, dtype=torch.float64)
        found[block] = numbers.view(groups, -1, experts).numpy()
    return found


def uniform(run: Run, batch: Batch, step: int, *, training: bool = True) -> dict[int, np.ndarray]:
    """(G, S) numbers by which `moe.order=random` orders the tokens of each group; in evaluation always the same."""
    seed, step = (run.train.seed, step) if training else (0, 0)
    groups = run.train.batch_pairs // run.moe.group_pairs if training or run.moe.eval_capacity == "paper" else 1
    found = {}
    for block in run.moe.blocks:
        keys = _keys("random-order", seed, step, block, groups)
        numbers = counter_rng.uniform(keys, _tokens(run, batch) // groups, device=CPU, dtype=torch.float64)
        found[block] = numbers.numpy()
    return found


def _keys(name: str, seed: int, step: int, block: int, groups: int) -> Tensor:
    return counter_rng.keys(counter_rng.key(name, seed, step, block), torch.arange(groups))


def _tokens(run: Run, batch: Batch) -> int:
    """Tokens of the whole batch."""
    images = 0 if batch.images is None else len(batch.images) * run.image_tokens
    return images + (0 if batch.tokens is None else batch.tokens.size)


def _examples(batch: Batch, mesh: Mesh) -> Examples:
    """This rank's pairs of a batch."""
    columns = (batch.images, batch.tokens, batch.valid)
    return Examples(*(None if c is None else torch.from_numpy(c).chunk(mesh.world.size)[mesh.rank] for c in columns))


def _boxes(shards: Iterable[tuple[str, Shard]]) -> dict[str, Box]:
    return {name: Box(s.tensor.detach().numpy().copy(), s.shape, s.start) for name, s in shards}


def whole(ranks: list[dict[str, Box]]) -> Weights:
    """Whole tensors from the boxes of all ranks. Ranks that hold the same element must agree to the last bit."""
    found: Weights = {}
    for boxes in ranks:
        for name, box in boxes.items():
            tensor = found.setdefault(name, np.full(box.shape, np.nan))
            if not box.value.size:  # a scalar lives on one rank; the others hold nothing of it
                continue
            place = tuple(slice(a, a + n) for a, n in zip(box.start, box.value.shape, strict=True))
            known = ~np.isnan(tensor[place])
            assert np.array_equal(tensor[place][known], box.value[known]), f"{name} differs between ranks"
            tensor[place] = box.value
    assert not any(np.isnan(tensor).any() for tensor in found.values())
    return found
