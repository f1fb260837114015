"""Parameters and shapes of a run, from its real modules built on `meta`: no memory, no values, no ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from limoe_dist.config.schema import Run

if TYPE_CHECKING:
    from limoe_dist.model.tower import Limoe
    from limoe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Parameters:
    total: int
    per_token: int
    """Total without the experts that a token does not visit."""
    router: int
    experts: int


@dataclass(frozen=True)
class Shape:
    """What does not depend on the number of ranks."""

    tokens_per_pair: int
    image_tokens: int
    text_tokens: int
    moe_blocks: tuple[int, ...]
    num_experts: int
    group_tokens: int
    """Tokens of a routing group; 0 for a dense model, like the next two."""
    capacity: int
    """Slots of each expert in a routing group."""
    groups: int
    """Routing groups of the global batch."""


def count_parameters(run: Run) -> Parameters:
    model = meta_model(run, first_of_mesh(1, tp=1, ep=1))
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(counts.values())
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    router = sum(count for name, count in counts.items() if name.endswith(".router"))
    unvisited = experts // run.moe.num_experts * (run.moe.num_experts - run.moe.top_k)
    return Parameters(total=total, per_token=total - unvisited, router=router, experts=experts)


def meta_model(run: Run, mesh: Mesh) -> Limoe:
    """The parameters that a rank of this mesh holds, with their types and without values."""
    import torch

    from limoe_dist.model.tower import build_model

    return build_model(run, mesh=mesh, device=torch.device("meta"))


def first_of_mesh(world: int, *, tp: int, ep: int) -> Mesh:
    """Rank 0's place in a mesh of that many ranks, without the ranks: for counting, not for communication."""
    from limoe_dist.parallel.mesh import Axis, Mesh

    sizes = {"world": world, "dp": world // tp, "tp": tp, "edp": world // ep, "ep": ep}
    return Mesh(**{name: Axis(name, size, 0, None) for name, size in sizes.items()})


def shape_of(run: Run) -> Shape:
    from limoe_dist.equations.routing import capacity

    moe = run.moe
    tokens = run.image_tokens + run.text.length
    group_tokens = moe.group_pairs * tokens if moe.blocks else 0
    slots = capacity(
        group_tokens,
        num_experts=moe.num_experts,
        k=moe.top_k,
        factor=moe.capacity_factor,
        multiple=moe.capacity_multiple,
    )
    return Shape(
        tokens_per_pair=tokens,
        image_tokens=run.image_tokens,
        text_tokens=run.text.length,
        moe_blocks=moe.blocks,
        num_experts=moe.num_experts if moe.blocks else 0,
        group_tokens=group_tokens,
        capacity=slots if moe.blocks else 0,
        groups=run.train.batch_pairs // moe.group_pairs if moe.blocks else 0,
    )
