"""AdamW on the flat master weights of ZeRO-1's pieces: torch's, or apex's fused one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from limoe_dist.config.schema import Optim
from limoe_dist.parallel.apex import Kernels, fused_adamw
from limoe_dist.parallel.pieces import Bucket
from limoe_dist.parallel.placement import Shard

MOMENTS = ("exp_avg", "exp_avg_sq")


def stay_out(rule: torch.optim.Optimizer, keep: Tensor | None) -> None:
    """Tells torch's fused AdamW to leave weights, moments and count alone at its next step, where `keep` is 0.

    It is the switch that gradient scalers use: the kernel reads it where it runs.
    """
    rule.grad_scale = None  # type: ignore[attr-defined]
    rule.found_inf = None if keep is None else (1 - keep).float()  # type: ignore[attr-defined]


class AdamW:
    """Adam with decoupled weight decay on kernels only (Loshchilov and Hutter, arXiv 1711.05101).

    Element by element, so it works on whole buckets (L,) at once. Padding stays zero: its gradient is.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        weights: list[Tensor],
        grads: list[Tensor],
        optim: Optim,
        *,
        kernels: Kernels,
    ) -> None:
        self.buckets, self.weights, self.grads = buckets, weights, grads
        groups = [
            {"params": [weight], "weight_decay": optim.weight_decay if bucket.decay else 0.0}
            for bucket, weight in zip(buckets, weights, strict=True)
        ]
        apex = fused_adamw(kernels, weights[0].device, weights[0].dtype)
        make = apex or partial(torch.optim.AdamW, fused=True)
        self._rule = make(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        # The state exists from the start, so that a checkpoint can be read into it before the first step.
        for weight in weights:
            self._rule.state[weight] = {name: torch.zeros_like(weight) for name in MOMENTS}
        # torch counts steps in a tensor beside each weight's moments, apex in an int of each group.
        self._counts: list[dict[str, Any]] = (
            [self._rule.state[weight] for weight in weights] if apex is None else self._rule.param_groups
        )
        for weight, count in zip(weights, self._counts, strict=True):
            count["step"] = torch.zeros((), device=weight.device) if apex is None else 0
        self._apex = apex is not None

    def step(self, rate: float, keep: Tensor | None = None) -> None:
        """One update with the gradients as they are; `rate` is the learning rate of this step.

        keep: where this scalar is 0, nothing changes. torch's kernel asks it on the device; with apex, whose kernel has
        no such switch, the host waits for it.
        """
        for group in self._rule.param_groups:
            group["lr"] = rate
        for weight, grad in zip(self.weights, self.grads, strict=True):
            weight.grad = grad
        if keep is None or not self._apex:
            stay_out(self._rule, keep)
            self._rule.step()
        elif keep.item():
            self._rule.step()

    def shards(self) -> dict[str, Shard]:
        """`adamw/MOMENT/NAME` for every parameter."""
        return {
            f"adamw/{moment}/{piece.name}": piece.shard(view)
            for moment in MOMENTS
            for bucket, weight in zip(self.buckets, self.weights, strict=True)
            for piece, view in zip(bucket.pieces, bucket.views(self._rule.state[weight][moment]), strict=True)
        }

    @property
    def steps(self) -> int:
        return int(self._counts[0]["step"])

    @steps.setter
    def steps(self, value: int) -> None:
        ahead = value - self.steps
        for count in self._counts:
            count["step"] += ahead
