"""One training step: embed, one contrastive loss over the global batch, backward, and the engine's update.

A batch that does not fit at once is cut into microbatches of whole routing groups, with the same gradient (cached
gradients, Gao et al., arXiv 2101.06983):

    1. embed every microbatch without a graph, and store who was routed where
    2. one contrastive loss over all embeddings of all ranks; its gradient stops at the embeddings
    3. replay every microbatch along its stored routes; its embeddings' gradient and its auxiliary losses go back
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.equations.contrastive import contrastive_loss
from limoe_dist.model.moe_layer import MoeRecord, Routes, RoutingMode
from limoe_dist.model.tower import Limoe, TowerOutput, autocast, aux_loss
from limoe_dist.optim.engine import Engine
from limoe_dist.optim.schedule import learning_rate
from limoe_dist.parallel.collectives import all_gather_rows
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.guard import Guard, Verdict
from limoe_dist.train.votes import NOBODY, Ballot


@dataclass(frozen=True)
class Examples:
    """What a rank trains on in one step, or a microbatch of it; pictures or captions alone have no contrastive loss."""

    images: Tensor | None
    """(b, 3, size, size) float."""
    tokens: Tensor | None
    """(b, N) int64."""
    valid: Tensor | None
    """(b, N) bool, False at padding."""

    @property
    def pairs(self) -> int:
        given = self.images if self.images is not None else self.tokens
        assert given is not None
        return len(given)

    def split(self, pairs: int) -> list[Examples]:
        """Microbatches of that many pairs, in order."""
        columns = [
            [None] * (self.pairs // pairs) if column is None else column.split(pairs)
            for column in (self.images, self.tokens, self.valid)
        ]
        return [Examples(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Losses:
    """This rank's share of a step's losses: the sum over all ranks is the loss of the global batch, in every layout."""

    contrastive: Tensor
    """In nats."""
    aux: Tensor
    """The weighted auxiliary losses."""
    correct_2: Tensor
    """(2,): local images that found their text first, local texts that found their image."""
    records: dict[int, MoeRecord]


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind; sums over ranks are made when metrics are logged."""

    losses: Losses
    """Without a graph."""
    grad_norm: Tensor
    """Of the whole gradient, before clipping; the same on every rank."""
    rate: float
    verdict: Verdict | None
    """None without a guard."""


def training_step(
    model: Limoe,
    engine: Engine,
    examples: Examples,
    *,
    step: int,
    run: Run,
    mesh: Mesh,
    guard: Guard | None = None,
    ballot: Ballot = NOBODY,
) -> StepResult:
    """One optimizer step on one global batch; every rank calls it with its own slice, b = batch_pairs / world.

    guard: judges the step before its update; ballot: what else this rank has to say, in the same small collective.
    """
    losses = backward(model, engine, examples, step=step, run=run, mesh=mesh)
    rate = learning_rate(step, optim=run.optim, steps=run.train.steps)
    if guard is None:
        return StepResult(losses, engine.step(rate), rate, None)
    norm, votes = engine.norm(_votes(losses, ballot))
    verdict = guard.judge(votes, norm)
    engine.step(rate, norm=norm, keep=verdict.keep)
    return StepResult(losses, norm, rate, verdict)


def _votes(losses: Losses, ballot: Ballot) -> Tensor:
    """(LENGTH + 1,) float64: the ballot, whether this rank's loss is finite, and its share of the loss."""
    share = (losses.contrastive + losses.aux).double()
    numbers = torch.tensor([*ballot.numbers(), 0.0], dtype=torch.float64).to(share.device, non_blocking=True)
    numbers[0] += ~torch.isfinite(share)
    numbers[-1] = share
    return numbers


def backward(
    model: Limoe,
    engine: Engine,
    examples: Examples,
    *,
    step: int,
    run: Run,
    mesh: Mesh,
    routes: Sequence[Routes] | None = None,
) -> Losses:
    """Gives the engine this rank's whole gradient of the step; returns the losses without a graph.

    routes: decisions to follow, one for each microbatch; those that are missing are made and added.
    """
    parts = examples.split(run.train.microbatch_pairs or examples.pairs)
    routes = [{} for _ in parts] if routes is None else routes
    forward = _Forward(model, run, mesh, step, examples.pairs)
    if len(parts) == 1:
        return _backward_at_once(forward, engine, examples, routes[0])
    return _backward_in_parts(forward, engine, parts, routes)


def _backward_at_once(forward: _Forward, engine: Engine, examples: Examples, routes: Routes) -> Losses:
    output = forward(examples, 0, routes)
    contrastive, correct_2 = forward.contrastive_share(output, forward.model.scale)
    aux = forward.aux_share(output)
    engine.backward(contrastive + aux, last=True)
    return Losses(contrastive.detach(), aux.detach(), correct_2, _detached(output.records))


def _backward_in_parts(forward: _Forward, engine: Engine, parts: list[Examples], routes: Sequence[Routes]) -> Losses:
    # 1. embed; the embeddings and the scale become leaves that wait for their gradient
    embeddings = _embed(forward, parts, routes)
    scale = forward.model.scale.detach().requires_grad_()
    # 2. one loss
    contrastive, correct_2 = forward.contrastive_share(embeddings, scale)
    if contrastive.requires_grad:
        contrastive.backward()
    # 3. replay; the scale's gradient goes back with the last part, so that only there a parameter gets its last one
    aux, records = torch.zeros_like(contrastive), []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        output = forward(part, number, routes[number])
        part_aux = forward.aux_share(output)
        loss = _replay_loss(output, part_aux, embeddings, first=number * part.pairs)
        if last and scale.grad is not None:
            loss = loss + forward.model.scale * scale.grad
        engine.backward(loss, last=last)
        aux += part_aux.detach()
        records.append(_detached(output.records))
    return Losses(contrastive.detach(), aux, correct_2, _added(records))


@dataclass(frozen=True)
class _Forward:
    """The model on one microbatch of this rank's pairs, in training mode."""

    model: Limoe
    run: Run
    mesh: Mesh
    step: int
    pairs: int
    """Of this rank's whole batch."""

    def __call__(self, part: Examples, number: int, routes: Routes, *, aux: bool = True) -> TowerOutput:
        first_pair = self.mesh.rank * self.pairs + number * part.pairs
        mode = RoutingMode(
            training=True,
            seed=self.run.train.seed,
            step=self.step,
            first_group=first_pair // self.run.moe.group_pairs,
            aux=aux,
        )
        images = None if part.images is None else part.images.to(self.model.log_scale.dtype)
        with autocast(self.run, self.model.log_scale.device):
            output: TowerOutput = self.model(images, part.tokens, part.valid, mode=mode, routes=routes)
        return output

    def aux_share(self, output: TowerOutput) -> Tensor:
        groups = self.pairs * self.mesh.world.size // self.run.moe.group_pairs
        aux = aux_loss(output.records, self.run, global_groups=groups) if output.records else None
        # A loss of nothing still has a graph: every rank makes a backward pass.
        return 0 * self.model.log_scale if aux is None else aux

    def contrastive_share(self, output: TowerOutput, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The share of the contrastive loss, and how many pairs were found; zeros where a modality is absent."""
        image_bP, text_bP = output.image_BP, output.text_BP
        if image_bP is None or text_bP is None:
            return torch.zeros_like(scale), torch.zeros(2, device=scale.device, dtype=scale.dtype)
        found = contrastive_loss(
            image_bP,
            text_bP,
            all_gather_rows(image_bP, self.mesh.world),
            all_gather_rows(text_bP, self.mesh.world),
            first=self.mesh.rank * len(image_bP),
            scale=scale,
            chunk=self.run.train.contrastive_chunk,
        )
        return found.loss, found.correct


@torch.no_grad()
def _embed(forward: _Forward, parts: list[Examples], routes: Sequence[Routes]) -> TowerOutput:
    """The embeddings of all microbatches, as leaves that wait for their gradient."""
    outputs = [forward(part, number, routes[number], aux=False) for number, part in enumerate(parts)]
    images = [output.image_BP for output in outputs if output.image_BP is not None]
    texts = [output.text_BP for output in outputs if output.text_BP is not None]
    return TowerOutput(
        image_BP=torch.cat(images).requires_grad_() if images else None,
        text_BP=torch.cat(texts).requires_grad_() if texts else None,
        records={},
    )


def _replay_loss(output: TowerOutput, aux: Tensor, embeddings: TowerOutput, *, first: int) -> Tensor:
    """A scalar with the gradient of the whole loss: auxiliary losses, and embeddings times their cached gradient."""
    total = aux
    for replayed, cached in ((output.image_BP, embeddings.image_BP), (output.text_BP, embeddings.text_BP)):
        if replayed is not None and cached is not None and cached.grad is not None:
            total = total + (replayed * cached.grad[first : first + len(replayed)]).sum()
    return total


def _detached(records: dict[int, MoeRecord]) -> dict[int, MoeRecord]:
    return {
        block: replace(record, losses={name: loss.detach() for name, loss in record.losses.items()})
        for block, record in records.items()
    }


def _added(parts: list[dict[int, MoeRecord]]) -> dict[int, MoeRecord]:
    """The records of all microbatches, block by block, as one pass over the whole batch reports them."""
    return {block: reduce(_sum_of, [part[block] for part in parts]) for block in parts[0]}


def _sum_of(one: MoeRecord, other: MoeRecord) -> MoeRecord:
    return MoeRecord(
        losses={name: loss + other.losses[name] for name, loss in one.losses.items()},
        routed_E2=one.routed_E2 + other.routed_E2,
        kept_E2=one.kept_E2 + other.kept_E2,
        entropy_2=one.entropy_2 + other.entropy_2,
        tokens_2=one.tokens_2 + other.tokens_2,
    )
