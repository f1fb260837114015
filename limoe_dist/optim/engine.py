"""What a training step asks of an engine: gradients in, one update out, and its state as boxes of logical tensors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from limoe_dist.config.schema import Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard


class Engine(Protocol):
    """Sums gradients over the replicas, clips by the global norm, updates the weights.

    Every rank calls the same methods in the same order: each may be a collective.
    """

    steps: int
    """Updates that were made; set when a run goes on."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of this rank's share of a loss; `last`: no other backward pass follows in this step."""

    def gradients(self) -> dict[str, Shard]:
        """The summed gradient before clipping, by parameter name; between the last backward pass and `step`."""

    def norm(self, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of the whole gradient before clipping, a float64 scalar, and the sums over all ranks of `beside`.

        beside: (n,) float64. One small collective, between the last backward pass and `step`.
        """

    def step(self, rate: float, *, norm: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """One update at this learning rate; returns the norm of the whole gradient before clipping, a scalar.

        norm: what `norm` gave; None: it is taken here. keep: a scalar on the device, 1; or 0, and weights, moments and
        what counts on the device stay as they are, whatever the gradient holds. Nobody waits to read it; whoever does,
        later, sets `steps` back, since a count that lives on the host went on.
        """

    def shards(self) -> dict[str, Shard]:
        """Weights (`model/NAME`) and the optimizer's tensors (`adamw/exp_avg/NAME`, ...), at least float32."""

    def adopt(self, shards: dict[str, Shard]) -> None:
        """Goes on from these tensors: those that `shards` returned, filled with other values."""


def make_engine(model: nn.Module, run: Run, mesh: Mesh) -> Engine:
    """The engine of optim.engine; it changes the parameters of `model` in place. A collective."""
    if run.optim.engine == "deepspeed":
        from limoe_dist.optim.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, run, mesh)
    from limoe_dist.optim.native import NativeEngine

    return NativeEngine(model, run, mesh)


def wide_dtype(run: Run) -> torch.dtype:
    """The type of sums of gradients, of master weights and of moments."""
    return torch.float64 if "fp64" in (run.train.dtype, run.parallel.reduce_dtype) else torch.float32
