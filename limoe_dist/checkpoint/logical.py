"""The tensors of a run by logical name: what a checkpoint holds, whatever the layout that wrote it.

model/blocks.1.moe.experts.up_weight      (E, D, F), all experts by global id
adamw/exp_avg/blocks.1.moe.experts.up_weight
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import placement_of


@dataclass(frozen=True)
class Shard:
    """This rank's part of a logical tensor."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Logical shape."""
    start: tuple[int, ...]
    """Where the part begins in each dim."""
    writes: bool
    """True on exactly one of the ranks that hold this part."""


def shard_of(tensor: Tensor, parameter: nn.Parameter, mesh: Mesh) -> Shard:
    """The shard of a parameter, or of an optimizer's tensor that is laid out as its parameter is."""
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


def model_shards(model: nn.Module, mesh: Mesh) -> dict[str, Shard]:
    return {f"model/{name}": shard_of(parameter, parameter, mesh) for name, parameter in model.named_parameters()}


def optimizer_shards(state: dict[str, tuple[Tensor, nn.Parameter]], mesh: Mesh) -> dict[str, Shard]:
    """state: name -> (tensor, the parameter whose placement it shares), as the optimizers give it."""
    return {name: shard_of(tensor, parameter, mesh) for name, (tensor, parameter) in state.items()}
