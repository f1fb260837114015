"""The tensors of a run by logical name: what a checkpoint holds, whatever the layout that wrote it.

model/blocks.1.moe.experts.up_weight      (E, D, F), all experts by global id
adamw/exp_avg/blocks.1.moe.experts.up_weight
"""

from __future__ import annotations

from torch import nn

from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard, local_shard


def model_shards(model: nn.Module, mesh: Mesh) -> dict[str, Shard]:
    """The weights as the model holds them on this rank; one of each weight's replicas writes."""
    return {f"model/{name}": local_shard(parameter, parameter, mesh) for name, parameter in model.named_parameters()}
