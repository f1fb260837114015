"""One training step: forward, one contrastive loss over the global batch, backward, sum, clip, update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.data.loader import Batch
from limoe_dist.equations.contrastive import contrastive_loss
from limoe_dist.model.moe_layer import MoeRecord, RoutingMode
from limoe_dist.model.tower import Limoe, autocast, aux_loss
from limoe_dist.optim.adamw import AdamW
from limoe_dist.optim.schedule import learning_rate
from limoe_dist.parallel.collectives import all_gather_rows
from limoe_dist.parallel.gradients import clip_by_norm, global_grad_norm, reduce_gradients
from limoe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind; sums over ranks are made when metrics are logged."""

    contrastive: Tensor
    """This rank's share, in nats."""
    aux: Tensor
    """This rank's share of the weighted auxiliary loss."""
    correct_2: Tensor
    """(2,): local images that found their text first, local texts that found their image."""
    records: dict[int, MoeRecord]
    grad_norm: Tensor
    """Of the whole gradient, before clipping; the same on every rank."""
    rate: float


def share_of_loss(
    model: Limoe, images: Tensor, tokens: Tensor, valid: Tensor, *, run: Run, mesh: Mesh, step: int
) -> tuple[Tensor, Tensor, Tensor, dict[int, MoeRecord]]:
    """This rank's share of the contrastive and of the auxiliary loss, what was correct, and the MoE records.

    images: (b, 3, size, size), tokens and valid: (b, N); b = train.batch_pairs / world.
    The loss of the step is the sum of the shares of all ranks, whatever the layout.
    """
    pairs, device = len(images), images.device
    first_group = mesh.rank * pairs // run.moe.group_pairs if run.moe.blocks else 0
    mode = RoutingMode(training=True, seed=run.train.seed, step=step, first_group=first_group)
    with autocast(run, device):
        output = model(images.to(model.log_scale.dtype), tokens, valid, mode=mode)
    assert output.image_BP is not None
    assert output.text_BP is not None
    contrastive = contrastive_loss(
        output.image_BP,
        output.text_BP,
        all_gather_rows(output.image_BP, mesh.world),
        all_gather_rows(output.text_BP, mesh.world),
        first=mesh.rank * pairs,
        scale=model.scale,
    )
    groups = run.train.batch_pairs // run.moe.group_pairs
    aux = aux_loss(output.records, run, global_groups=groups) if output.records else None
    if aux is None:
        aux = torch.zeros_like(contrastive.loss)
    return contrastive.loss, aux, contrastive.correct, output.records


def training_step(
    model: Limoe, optimizer: AdamW, batch: Batch, *, run: Run, mesh: Mesh, device: torch.device
) -> StepResult:
    """One optimizer step on one global batch; every rank calls it with its own slice."""
    contrastive, aux, correct_2, records = share_of_loss(
        model, batch.images, batch.tokens, batch.valid, run=run, mesh=mesh, step=batch.step
    )
    (contrastive + aux).backward()
    parameters = list(model.parameters())
    wide = torch.float64 if "fp64" in (run.train.dtype, run.parallel.reduce_dtype) else torch.float32
    reduce_gradients(parameters, mesh, dtype=wide)
    norm = global_grad_norm(parameters, mesh)
    clip_by_norm(parameters, norm, max_norm=run.optim.clip_norm)
    rate = learning_rate(batch.step, optim=run.optim, steps=run.train.steps)
    optimizer.step(rate)
    model.zero_grad(set_to_none=True)
    return StepResult(contrastive.detach(), aux.detach(), correct_2, records, norm, rate)
