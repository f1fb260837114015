"""LIMoE: one tower for pictures and texts (arXiv 2206.02770, section 2.2 and Figure 1).

Shapes: B pairs of this rank, N tokens of a sequence, T = all tokens of this rank, D width, P embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from limoe_dist.config.schema import Run
from limoe_dist.equations.contrastive import normalize
from limoe_dist.model.block import Block
from limoe_dist.model.embed import LayerNorm, PatchEmbed, TextEmbed
from limoe_dist.model.moe_layer import AUX_LOSSES, EVALUATION, MoeRecord, Routes, RoutingMode
from limoe_dist.model.tokens import TokenLayout
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Init, Placement, initialise, make_parameter, placement_of


@dataclass(frozen=True)
class TowerOutput:
    image_BP: Tensor | None
    """(B, P) at least float32, rows of length 1; None where no pictures were given."""
    text_BP: Tensor | None
    """(B, P), likewise for captions."""
    records: dict[int, MoeRecord]
    """One for each MoE block, by block number."""
    image_BD: Tensor | None = None
    """(B, D): the mean over a picture's tokens, before the projection: what linear probes see."""
    text_BD: Tensor | None = None
    """(B, D), likewise for captions."""


class Limoe(nn.Module):
    def __init__(self, run: Run, *, mesh: Mesh) -> None:
        super().__init__()
        self.run = run
        width, embed_dim = run.model.width, run.model.embed_dim
        self.image_embed = PatchEmbed(patch=run.image.patch, num_tokens=run.image_tokens, width=width, mesh=mesh)
        self.text_embed = TextEmbed(vocab_size=run.text.vocab_size, num_tokens=run.text.length, width=width, mesh=mesh)
        self.blocks = nn.ModuleList(Block(run, index, mesh=mesh) for index in range(run.model.depth))
        self.norm = LayerNorm(width, mesh=mesh, kernels=run.parallel.kernels)
        if run.model.towers == "two":
            self.text_blocks = nn.ModuleList(Block(run, index, mesh=mesh) for index in range(run.model.depth))
            self.text_norm = LayerNorm(width, mesh=mesh, kernels=run.parallel.kernels)
        projection = Placement((width, embed_dim), Init.lecun(width), decay=True)
        self.image_projection = make_parameter(projection, mesh)
        self.text_projection = make_parameter(projection, mesh)
        first_scale = Init("constant", -math.log(run.model.init_temperature))
        self.log_scale = make_parameter(Placement((), first_scale, wide=True), mesh)

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor | None,
        text_valid: Tensor | None = None,
        *,
        mode: RoutingMode = EVALUATION,
        routes: Routes | None = None,
    ) -> TowerOutput:
        """images: (B, 3, size, size) float; tokens: (B, N) int64; text_valid: (B, N) bool, False at padding.
        routes: decisions of an earlier pass over the same input to follow; those of blocks that have none are added.

        Either input may be None. In training both counts are multiples of moe.group_pairs.
        Raises ValueError where nothing is given or the groups do not divide.
        """
        if images is None and tokens is None:
            raise ValueError("images and tokens are both None: give at least one")
        records: dict[int, MoeRecord] = {}
        routes = {} if routes is None else routes
        image_BND, text_BND = None, None
        if self.run.model.towers == "one":
            layout = self._layout(images, tokens, text_valid, mode)
            x_TD = self.norm(self._through(self.blocks, self._embedded(images, tokens), layout, mode, routes, records))
            image_BND, text_BND = layout.split(x_TD)
        else:
            if images is not None:
                layout = self._layout(images, None, None, mode)
                x_TD = self._through(self.blocks, self._embedded(images, None), layout, mode, routes, records)
                image_BND, _ = layout.split(self.norm(x_TD))
            if tokens is not None:
                layout = self._layout(None, tokens, text_valid, mode)
                x_TD = self._through(self.text_blocks, self._embedded(None, tokens), layout, mode, routes, records)
                _, text_BND = layout.split(self.text_norm(x_TD))
        image_BD = None if images is None or image_BND is None else image_BND.mean(1)
        masked_BN = text_valid if self.run.text.pad == "masked" else None
        text_BD = None if tokens is None or text_BND is None else _pool(text_BND, masked_BN)
        return TowerOutput(
            image_BP=None if image_BD is None else _embed(image_BD, self.image_projection),
            text_BP=None if text_BD is None else _embed(text_BD, self.text_projection),
            records=records,
            image_BD=image_BD,
            text_BD=text_BD,
        )

    def _embedded(self, images: Tensor | None, tokens: Tensor | None) -> Tensor:
        """(T, D): the image tokens, then the text tokens."""
        parts = []
        if images is not None:
            parts.append(self.image_embed(images).flatten(0, 1))
        if tokens is not None:
            parts.append(self.text_embed(tokens).flatten(0, 1))
        return torch.cat(parts) if len(parts) == 2 else parts[0]

    def _through(
        self,
        blocks: nn.ModuleList,
        x_TD: Tensor,
        layout: TokenLayout,
        mode: RoutingMode,
        routes: Routes,
        records: dict[int, MoeRecord],
    ) -> Tensor:
        """(T, D) -> (T, D): one tower, before its last norm. Adds to routes and records."""
        for index, block in enumerate(blocks):
            if self.run.train.recompute and torch.is_grad_enabled():
                x_TD, record = checkpoint(
                    block, x_TD, layout, mode, routes, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_TD, record = block(x_TD, layout, mode, routes)
            if record is not None:
                records[index] = record
        return x_TD

    @property
    def scale(self) -> Tensor:
        """1 / T: what cosines are multiplied with; learned as its logarithm."""
        return self.log_scale.exp()

    def _layout(
        self, images: Tensor | None, tokens: Tensor | None, text_valid: Tensor | None, mode: RoutingMode
    ) -> TokenLayout:
        counts = [len(x) for x in (images, tokens) if x is not None]
        groups = 1
        paper_capacity = mode.training or self.run.moe.eval_capacity == "paper"
        if self.run.moe.blocks and paper_capacity:
            pairs = self.run.moe.group_pairs
            if mode.training and any(count % pairs for count in counts):
                raise ValueError(f"{counts} pictures and texts on this rank must be multiples of group_pairs={pairs}")
            if all(count % pairs == 0 for count in counts) and len(set(counts)) == 1:
                groups = counts[0] // pairs
        given = images if images is not None else tokens
        assert given is not None
        masked = self.run.text.pad == "masked" and tokens is not None
        return TokenLayout(
            images=0 if images is None else len(images),
            image_tokens=self.run.image_tokens,
            texts=0 if tokens is None else len(tokens),
            text_tokens=self.run.text.length,
            groups=groups,
            device=given.device,
            text_valid=text_valid if masked else None,
        )


def _pool(x_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """(B, D): the average over the tokens that are not masked padding."""
    if valid_BN is None:
        return x_BND.mean(1)
    weight_BN = valid_BN.to(x_BND.dtype)
    return (x_BND * weight_BN[..., None]).sum(1) / weight_BN.sum(1, keepdim=True).clamp(min=1)


def _embed(pooled_BD: Tensor, projection_DP: Tensor) -> Tensor:
    embedding_BP = F.linear(pooled_BD, projection_DP.T)
    return normalize(embedding_BP.to(torch.promote_types(embedding_BP.dtype, torch.float32)))


def aux_loss(records: dict[int, MoeRecord], run: Run, *, global_groups: int) -> Tensor | None:
    """This rank's share of the weighted auxiliary loss: aux_weight * mean over active losses, summed over MoE blocks.

    global_groups: routing groups of the global batch, over all ranks. None for a dense model.
    """
    active = {name: getattr(run.moe, name) for name in AUX_LOSSES if getattr(run.moe, name) > 0}
    terms = [
        weight * record.losses[name]
        for record in records.values()
        for name, weight in active.items()
        if name in record.losses
    ]
    if not terms or run.moe.aux_weight == 0:
        return None
    return torch.stack(terms).sum() * (run.moe.aux_weight / (len(active) * global_groups))


def uses_bf16(run: Run, device: torch.device) -> bool:
    """Where train.dtype asks for it: bf16, and auto on a GPU."""
    return run.train.dtype == "bf16" or (run.train.dtype == "auto" and device.type == "cuda")


def autocast(run: Run, device: torch.device) -> torch.autocast:
    """bf16 arithmetic for the blocks where `uses_bf16`; router, norms and losses stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(run, device))


def build_model(run: Run, *, mesh: Mesh, device: torch.device) -> Limoe:
    """The model with its first values on the device; on meta without values.

    Its weights are bfloat16, but for the `wide` ones, where `uses_bf16`; float64 where train.dtype is fp64; or float32.
    First values are those of float32, rounded: an optimizer's masters begin from what the model computes with.
    """
    with torch.device(device):
        model = Limoe(run, mesh=mesh)
    for parameter in model.parameters():
        # The data changes its type and the Parameter object stays, and with it the placement that it is tagged with.
        if run.train.dtype == "fp64":
            parameter.data = parameter.data.double()
        elif uses_bf16(run, device) and not placement_of(parameter).wide:
            parameter.data = parameter.data.bfloat16()
    if device.type != "meta":
        initialise(model, seed=run.train.seed, mesh=mesh)
    return model
