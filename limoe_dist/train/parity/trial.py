"""One side of a comparison: a fresh model takes a few training steps, and everything that it shows is kept.

Shapes: G routing groups, S tokens of a group, E experts, T tokens, D width.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.model.attention import Attention
from limoe_dist.model.block import Mlp
from limoe_dist.model.embed import LayerNorm, PatchEmbed, TextEmbed
from limoe_dist.model.moe_layer import MoeLayer, MoeRecord, Routes
from limoe_dist.model.tower import Limoe
from limoe_dist.optim.engine import Engine, make_engine
from limoe_dist.optim.schedule import learning_rate
from limoe_dist.parallel import counter_rng
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.parity.case import Case, Given
from limoe_dist.train.parity.routes import Decision, follow
from limoe_dist.train.step import Losses, backward

WATCHED = (PatchEmbed, TextEmbed, LayerNorm, Attention, Mlp, MoeLayer)
"""Modules whose outputs are looked at: one row for each token of this rank."""


@dataclass
class Heard:
    """What the modules of a model gave in the forward passes of one step, in the order in which they were called."""

    image_tokens: int
    """Of a picture."""
    two_towers: bool = False
    """Whether texts have blocks of their own."""
    images: dict[str, list[Tensor]] = field(default_factory=dict)
    """By module: one number for each image token, its output's projection on a fixed direction."""
    texts: dict[str, list[Tensor]] = field(default_factory=dict)
    gates: dict[int, list[Tensor]] = field(default_factory=dict)
    """By MoE block: (G, S, E) noisy gates."""
    _image_rows: int | None = None
    """Image tokens of the pass that goes on; None outside."""

    def outputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The projections of this rank's image tokens and text tokens."""
        return {name: (torch.cat(images), torch.cat(self.texts[name])) for name, images in self.images.items()}

    def begin(self, model: nn.Module, given: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            self._image_rows = 0 if given[0] is None else len(given[0]) * self.image_tokens

    def end(self, model: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self._image_rows = None

    @torch.no_grad()
    def hear(self, name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if self._image_rows is None:
            return
        numbers_T = project((output[0] if isinstance(module, MoeLayer) else output).flatten(0, -2))
        images = self._image_rows
        if isinstance(module, PatchEmbed | TextEmbed):
            images = len(numbers_T) if isinstance(module, PatchEmbed) else 0
        elif self.two_towers:
            images = 0 if name.startswith("text_") else len(numbers_T)
        self.images.setdefault(name, []).append(numbers_T[:images])
        self.texts.setdefault(name, []).append(numbers_T[images:])
        if isinstance(module, MoeLayer):
            x_TD, layout, mode, _ = given
            gates_GSE = module.logits(x_TD, layout, mode)[1].softmax(-1)
            self.gates.setdefault(module.index, []).append(gates_GSE)


@dataclass(frozen=True)
class Pass:
    """One step; sums over all ranks, so far as they are numbers."""

    losses: dict[str, float]
    norm: float
    """Of the whole gradient before clipping."""
    decisions: dict[int, Decision]
    gates: dict[int, Tensor]
    """(G, S, E) by MoE block, of this rank's groups."""
    outputs: dict[str, tuple[Tensor, Tensor]]
    records: dict[int, MoeRecord]
    """Of this rank."""
    gradients: dict[str, Shard]
    """Summed, before clipping."""
    weights: dict[str, Shard]
    """What the model has on this rank after the step, `model/NAME`."""
    state: dict[str, Shard]
    """The engine's shards after the step: masters and the optimizer's tensors."""


@dataclass(frozen=True)
class Trial:
    start: dict[str, Shard]
    """The weights that the model has on this rank before the first step, `model/NAME`."""
    passes: list[Pass]


Resume = Callable[[int, dict[str, Shard]], None]
"""Fills an engine's shards with the state after the step of that number."""


def run_trial(
    case: Case,
    batches: Sequence[Given],
    *,
    mesh: Mesh,
    device: torch.device,
    forced: Sequence[dict[int, Decision]] = (),
    resume: Resume | None = None,
) -> Trial:
    """Takes one optimizer step with each batch. A collective over the mesh.

    forced: for each batch, decisions of MoE blocks that are followed instead of made.
    resume: gives the state from which the next step begins, where that is not to be this trial's own.
    """
    model = case.model(mesh, device)
    start = _copies(model_shards(model, mesh))
    engine = make_engine(model, case.run, mesh)
    passes = []
    for number, given in enumerate(batches):
        passes.append(_step(case, model, engine, given, number, mesh, device, forced[number] if forced else {}))
        if resume is not None and number + 1 < len(batches):
            shards = engine.shards()
            resume(number, shards)
            engine.adopt(shards)
    # The hooks of an engine hold its model in a cycle: without this, several of both would be in memory.
    del model, engine
    gc.collect()
    return Trial(start, passes)


def _step(
    case: Case,
    model: Limoe,
    engine: Engine,
    given: Given,
    number: int,
    mesh: Mesh,
    device: torch.device,
    forced: dict[int, Decision],
) -> Pass:
    run, step = case.run, case.first_step + number
    examples = case.examples(given, step=step, mesh=mesh, device=device)
    routes: list[Routes] = [{} for _ in range(examples.pairs // (run.train.microbatch_pairs or examples.pairs))]
    if forced:
        routes = follow(forced, examples, run)
    with listening(model) as heard:
        losses = backward(model, engine, examples, step=step, run=run, mesh=mesh, routes=routes)
    gradients = _copies(engine.gradients())
    norm = engine.step(learning_rate(step, optim=run.optim, steps=run.train.steps))
    return Pass(
        losses=_summed(losses, case, mesh),
        norm=norm.item(),
        decisions={block: Decision.of(routes, block) for block in routes[0]},
        gates={block: torch.cat(parts) for block, parts in heard.gates.items()},
        outputs=heard.outputs(),
        records=losses.records,
        gradients=gradients,
        weights=_copies(model_shards(model, mesh)),
        state=_copies(engine.shards()),
    )


def _copies(shards: dict[str, Shard]) -> dict[str, Shard]:
    """In the CPU's memory: a GPU that can train has no room for several copies of its state."""
    return {name: replace(shard, tensor=shard.tensor.detach().cpu().clone()) for name, shard in shards.items()}


def _summed(losses: Losses, case: Case, mesh: Mesh) -> dict[str, float]:
    """Of the global batch: the contrastive loss, the weighted sum of the auxiliary ones, and each as a mean."""
    groups = case.run.train.batch_pairs // case.run.moe.group_pairs
    figures = {"contrastive": losses.contrastive, "weighted sum": losses.aux}
    figures |= {
        f"blocks.{block}.moe {name}": loss / groups
        for block, record in losses.records.items()
        for name, loss in record.losses.items()
    }
    total = sum_over(torch.stack([loss.double() for loss in figures.values()]), mesh.world)
    return dict(zip(figures, total.tolist(), strict=True))


@contextmanager
def listening(model: Limoe) -> Iterator[Heard]:
    """Collects from the passes with a graph inside the `with`: not from embedding alone, nor from recomputation."""
    heard = Heard(model.run.image_tokens, two_towers=model.run.model.towers == "two")
    hooks = [model.register_forward_pre_hook(heard.begin), model.register_forward_hook(heard.end)]
    for name, module in model.named_modules():
        if isinstance(module, WATCHED):
            hooks.append(module.register_forward_hook(partial(heard.hear, name)))
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def project(x_TD: Tensor) -> Tensor:
    """(T,): the product of each token with one fixed normal direction, at least float32.

    Any difference shows in it, but for those that are orthogonal to the direction, and it is D times smaller to keep.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    direction_D = counter_rng.normal(
        counter_rng.key("verify-direction"), x_TD.shape[-1], device=x_TD.device, dtype=wide
    )
    return x_TD.to(wide) @ direction_D
