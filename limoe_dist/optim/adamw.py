"""torch's AdamW behind the protocol that every engine of this room keeps: step, state by name, number of steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limoe_dist.config.schema import Optim
from limoe_dist.parallel.placement import placement_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Adam with decoupled weight decay on kernels only (Loshchilov and Hutter, arXiv 1711.05101)."""

    def __init__(self, model: nn.Module, optim: Optim) -> None:
        self.parameters = dict(model.named_parameters())
        groups = [
            {
                "params": [p for p in self.parameters.values() if placement_of(p).decay == decay],
                "weight_decay": optim.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
        ]
        self._torch = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        # The state exists from the start, so that a checkpoint can be read into it before the first step.
        for parameter in self.parameters.values():
            state = {name: torch.zeros_like(parameter) for name in MOMENTS}
            self._torch.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | state

    def step(self, rate: float) -> None:
        """One update with the gradients as they are; `rate` is the learning rate of this step."""
        for group in self._torch.param_groups:
            group["lr"] = rate
        self._torch.step()

    def state(self) -> dict[str, tuple[Tensor, nn.Parameter]]:
        """The moments by logical name, each with the parameter whose placement it shares."""
        return {
            f"adamw/{moment}/{name}": (self._torch.state[parameter][moment], parameter)
            for moment in MOMENTS
            for name, parameter in self.parameters.items()
        }

    @property
    def steps(self) -> int:
        return int(self._torch.state[next(iter(self.parameters.values()))]["step"].item())

    @steps.setter
    def steps(self, value: int) -> None:
        for parameter in self.parameters.values():
            self._torch.state[parameter]["step"].fill_(value)
