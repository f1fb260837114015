"""ZeRO-1: each rank keeps master weights and state of its pieces, updates those, and all weights are gathered again.

    backward   parameter gradients -> buckets -> reduce-scatter -> sums of this rank's pieces     parallel/gradients.py
    step       norm over all pieces, clip, the optimizer's rule on the pieces                     adamw.py, adafactor.py
               masters -> type of the weights -> all-gather -> parameters                         here
Source: ZeRO (arXiv 1910.02054), stage 1.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from limoe_dist.config.schema import Run
from limoe_dist.optim.adafactor import Adafactor
from limoe_dist.optim.adamw import AdamW
from limoe_dist.optim.engine import wide_dtype
from limoe_dist.parallel.collectives import gather_into
from limoe_dist.parallel.gradients import Gradients
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.pieces import Bucket
from limoe_dist.parallel.placement import Shard


class Rule(Protocol):
    """How an optimizer changes the master weights of this rank's pieces."""

    steps: int

    def step(self, rate: float, keep: Tensor | None = None) -> None:
        """One update with the gradients as they are; none where `keep`, a scalar on the device, is 0."""

    def shards(self) -> dict[str, Shard]:
        """The state by logical name."""


class NativeEngine:
    """The project's own engine; see limoe_dist.optim.engine.Engine for what each method promises."""

    def __init__(self, model: nn.Module, run: Run, mesh: Mesh) -> None:
        dtype = wide_dtype(run)
        self.clip_norm = run.optim.clip_norm
        self.sums = Gradients(
            model, mesh, dtype=dtype, bucket_bytes=run.parallel.bucket_mb * 1e6, overlap=run.parallel.overlap
        )
        self.buckets = self.sums.buckets
        self.masters = [_masters(bucket, dtype) for bucket in self.buckets]
        state = self.buckets, self.masters, self.sums.sums, run.optim
        self.rule: Rule = (
            Adafactor(*state) if run.optim.name == "adafactor" else AdamW(*state, kernels=run.parallel.kernels)
        )

    @property
    def steps(self) -> int:
        return self.rule.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.rule.steps = value

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.sums.backward(loss, last=last)

    def gradients(self) -> dict[str, Shard]:
        self.sums.finish()
        return _boxes(self.buckets, self.sums.sums)

    def norm(self, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.sums.finish()
        return self.sums.norm(beside)

    def step(self, rate: float, *, norm: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        norm = self.norm()[0] if norm is None else norm
        self.sums.clip(norm, max_norm=self.clip_norm)
        self.rule.step(rate, keep)
        self._gather_weights()
        self.sums.clear()
        return norm

    def shards(self) -> dict[str, Shard]:
        masters = _boxes(self.buckets, self.masters)
        return {f"model/{name}": shard for name, shard in masters.items()} | self.rule.shards()

    def adopt(self, shards: dict[str, Shard]) -> None:
        # The tensors of `shards` are views of the masters and of the rule's state: they are filled already.
        self._gather_weights()

    @torch.no_grad()
    def _gather_weights(self) -> None:
        for bucket, master_L in zip(self.buckets, self.masters, strict=True):
            rows_nL = master_L.new_empty(bucket.replicas.size, bucket.length, dtype=bucket.dtype)
            gather_into(rows_nL, master_L.to(bucket.dtype), bucket.replicas)
            for piece, rows in zip(bucket.pieces, bucket.rows(rows_nL), strict=True):
                for part, row in piece.match(piece.parameter.detach(), rows):
                    part.copy_(row)


@torch.no_grad()
def _masters(bucket: Bucket, dtype: torch.dtype) -> Tensor:
    """(L,): this rank's pieces of the weights, as they are now."""
    rows_nL = torch.zeros(bucket.replicas.size, bucket.length, dtype=dtype, device=bucket.pieces[0].parameter.device)
    for piece, rows in zip(bucket.pieces, bucket.rows(rows_nL), strict=True):
        for part, row in piece.match(piece.parameter.detach(), rows):
            row.copy_(part)
    return rows_nL[bucket.replicas.index].clone()


def _boxes(buckets: list[Bucket], flats: list[Tensor]) -> dict[str, Shard]:
    """Flat tensors (L,), one for each bucket, by parameter name."""
    return {
        piece.name: piece.shard(view)
        for bucket, flat_L in zip(buckets, flats, strict=True)
        for piece, view in zip(bucket.pieces, bucket.views(flat_L), strict=True)
    }
