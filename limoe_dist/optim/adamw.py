"""torch's AdamW on the flat master weights of ZeRO-1's pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from limoe_dist.config.schema import Optim
from limoe_dist.parallel.pieces import Bucket
from limoe_dist.parallel.placement import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Adam with decoupled weight decay on kernels only (Loshchilov and Hutter, arXiv 1711.05101).

    Element by element, so it works on whole buckets (L,) at once. Padding stays zero: its gradient is.
    """

    def __init__(self, buckets: list[Bucket], weights: list[Tensor], grads: list[Tensor], optim: Optim) -> None:
        self.buckets, self.weights, self.grads = buckets, weights, grads
        groups = [
            {"params": [weight], "weight_decay": optim.weight_decay if bucket.decay else 0.0}
            for bucket, weight in zip(buckets, weights, strict=True)
        ]
        self._torch = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        # The state exists from the start, so that a checkpoint can be read into it before the first step.
        for weight in weights:
            moments = {name: torch.zeros_like(weight) for name in MOMENTS}
            self._torch.state[weight] = {"step": torch.zeros((), device=weight.device)} | moments

    def step(self, rate: float) -> None:
        """One update with the gradients as they are; `rate` is the learning rate of this step."""
        for group in self._torch.param_groups:
            group["lr"] = rate
        for weight, grad in zip(self.weights, self.grads, strict=True):
            weight.grad = grad
        self._torch.step()

    def shards(self) -> dict[str, Shard]:
        """`adamw/MOMENT/NAME` for every parameter."""
        return {
            f"adamw/{moment}/{piece.name}": piece.shard(view)
            for moment in MOMENTS
            for bucket, weight in zip(self.buckets, self.weights, strict=True)
            for piece, view in zip(bucket.pieces, bucket.views(self._torch.state[weight][moment]), strict=True)
        }

    @property
    def steps(self) -> int:
        return int(self._torch.state[self.weights[0]]["step"].item())

    @steps.setter
    def steps(self, value: int) -> None:
        for weight in self.weights:
            self._torch.state[weight]["step"].fill_(value)
