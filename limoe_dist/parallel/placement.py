"""Where a parameter lives: its logical shape, the axis that shards it, the axis over which its gradient is summed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from limoe_dist.parallel import counter_rng
from limoe_dist.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Init:
    """First values: normal with standard deviation `scale`, uniform in plus or minus `scale`, or constant `scale`."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float

    @staticmethod
    def xavier(fan_in: int, fan_out: int) -> Init:
        """Glorot and Bengio's uniform init, flax's xavier_uniform."""
        return Init("uniform", math.sqrt(6 / (fan_in + fan_out)))

    @staticmethod
    def lecun(fan_in: int) -> Init:
        """Normal with variance 1 / fan_in; flax's default for Dense has this variance too, but cuts the tails."""
        return Init("normal", 1 / math.sqrt(fan_in))


ZEROS, ONES = Init("constant", 0.0), Init("constant", 1.0)


@dataclass(frozen=True)
class Placement:
    shape: tuple[int, ...]
    """Logical shape, as one process would hold it."""
    init: Init
    axis: Literal["tp", "ep"] | None = None
    """Mesh axis that shards it; None where every rank holds all of it."""
    dim: int = 0
    """Tensor dim that is sharded."""
    decay: bool = False
    """Whether weight decay applies: kernels only (limoe.md, section 4)."""
    stacked: int = 0
    """Leading dims that only put tensors together (q, k and v; experts): an optimizer sees each of them apart."""
    wide: bool = False
    """Kept in at least float32 where the other weights are bfloat16: LayerNorm, router, temperature."""

    def replicas(self, mesh: Mesh) -> Axis:
        """The axis whose ranks hold the same values and saw different tokens: its gradient is SUMMED over it."""
        return {None: mesh.world, "tp": mesh.dp, "ep": mesh.edp}[self.axis]

    def shard(self, mesh: Mesh) -> Axis | None:
        """The axis along which the logical tensor is cut; None where it is whole."""
        return None if self.axis is None else {"tp": mesh.tp, "ep": mesh.ep}[self.axis]

    def local_slice(self, mesh: Mesh) -> slice:
        """The part of `dim` that this rank holds."""
        axis = self.shard(mesh)
        if axis is None:
            return slice(0, self.shape[self.dim] if self.shape else 1)
        size = self.shape[self.dim] // axis.size
        return slice(axis.index * size, (axis.index + 1) * size)


@dataclass(frozen=True)
class Shard:
    """A box of a logical tensor that this rank holds: what checkpoints and comparisons are made of."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Logical shape."""
    start: tuple[int, ...]
    """Where the box begins in each dim."""
    writes: bool
    """True on exactly one of the ranks that hold this box; never for an empty box."""


def make_parameter(placement: Placement, mesh: Mesh) -> nn.Parameter:
    """An empty parameter of this rank's shape, tagged with its placement. Raises ValueError where it cannot be cut."""
    shape = list(placement.shape)
    axis = placement.shard(mesh)
    if axis is not None:
        if shape[placement.dim] % axis.size:
            raise ValueError(f"{axis.name}={axis.size} must divide dim {placement.dim} of shape {tuple(shape)}")
        shape[placement.dim] //= axis.size
    parameter = nn.Parameter(torch.empty(shape))
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter


def placement_of(parameter: Tensor) -> Placement:
    """The tag that `make_parameter` set. Raises AttributeError for a parameter made without it."""
    placement: Placement = parameter.placement  # type: ignore[attr-defined]
    return placement


def local_shard(tensor: Tensor, parameter: nn.Parameter, mesh: Mesh) -> Shard:
    """A tensor that is laid out as `parameter` is on this rank, as a box of its logical tensor."""
    placement = placement_of(parameter)
    start = [0] * len(placement.shape)
    if start:
        start[placement.dim] = placement.local_slice(mesh).start
    return Shard(
        tensor=tensor.detach(),
        shape=placement.shape,
        start=tuple(start),
        writes=placement.replicas(mesh).index == 0,
    )


@torch.no_grad()
def initialise(module: nn.Module, *, seed: int, mesh: Mesh) -> None:
    """Fills every parameter from (seed, logical name), experts from (seed, logical name, global expert id).

    The logical tensor is the same in every layout; each rank keeps its own slice.
    """
    for name, parameter in module.named_parameters():
        placement = placement_of(parameter)
        if placement.init.kind == "constant":
            parameter.fill_(placement.init.scale)
            continue
        stream = counter_rng.key("init", seed, name)
        mine = placement.local_slice(mesh)
        kind = torch.promote_types(parameter.dtype, torch.float32)
        draw = counter_rng.normal if placement.init.kind == "normal" else counter_rng.uniform
        if placement.axis == "ep":
            experts = torch.arange(mine.start, mine.stop, device=parameter.device)
            count = math.prod(placement.shape[1:])
            values = draw(counter_rng.keys(stream, experts), count, device=parameter.device, dtype=kind)
        else:
            values = draw(stream, math.prod(placement.shape), device=parameter.device, dtype=kind)
            values = values.view(placement.shape).narrow(placement.dim, mine.start, mine.stop - mine.start)
        if placement.init.kind == "uniform":
            values = 2 * values - 1
        parameter.copy_(values.reshape(parameter.shape) * placement.init.scale)
