"""Parameters, arithmetic and shapes of a run, without training.

Parameters are counted from the real modules built on `meta`: no memory, no values, no ranks. Arithmetic is a formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from limoe_dist.config.presets import as_dense, as_two_tower
from limoe_dist.config.schema import Parallel, Run

if TYPE_CHECKING:
    from limoe_dist.model.tower import Limoe
    from limoe_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Parameters:
    total: int
    per_token: int
    """Total without what a token does not visit: other experts, the router and the tower of the other modality."""
    router: int
    experts: int


@dataclass(frozen=True)
class Flops:
    """Of a forward pass: 2 for each multiplication with its addition in a matrix product; all else is not counted."""

    image: int
    """Of a picture whose tokens all get the K experts that they choose."""
    text: int
    """Of a caption, likewise."""
    pair: int
    """image + text."""
    pair_with_buffers: int
    """Of a pair as it is computed in training: experts work on all their slots, those that stay empty too."""


@dataclass(frozen=True)
class Cost:
    """What a model is made of, and what a pair costs it."""

    parameters: Parameters
    flops: Flops


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


def cost_of_model(run: Run) -> Cost:
    return Cost(count_parameters(run), count_flops(run))


def with_twins(run: Run) -> dict[str, Cost]:
    """The run, and its dense twins of one tower and of two: equal in all settings but the mixtures and the towers."""
    return {
        "itself": cost_of_model(run),
        "dense one-tower": cost_of_model(as_dense(run)),
        "dense two-tower": cost_of_model(as_two_tower(run)),
    }


def count_parameters(run: Run) -> Parameters:
    # However the run is laid out: the modules of one rank are all of them.
    alone = run.model_copy(update={"parallel": Parallel()})
    parameters = dict(meta_model(alone, first_of_mesh(1, tp=1, ep=1)).named_parameters())
    counts = {name: parameter.numel() for name, parameter in parameters.items()}
    total = sum(counts.values())
    experts = {name: parameter for name, parameter in parameters.items() if ".experts." in name}
    router = sum(count for name, count in counts.items() if name.endswith(".router"))
    # The first dim of an expert parameter counts experts: those that were pruned are not there.
    unvisited = sum(
        counts[name] // parameter.shape[0] * max(0, parameter.shape[0] - run.moe.top_k)
        for name, parameter in experts.items()
    )
    if run.moe.routers == "per_modality":
        unvisited += router // 2
    unvisited += sum(count for name, count in counts.items() if name.startswith(("text_blocks.", "text_norm.")))
    return Parameters(
        total=total,
        per_token=total - unvisited,
        router=router,
        experts=sum(counts[name] for name in experts),
    )


def count_flops(run: Run) -> Flops:
    """By the formula that `limoe plan PRESET --help` gives; the towers of a two-tower model cost what one would."""
    from limoe_dist.model.moe_layer import kept_experts

    model, moe = run.model, run.moe
    patches = 2 * run.image_tokens * 3 * run.image.patch**2 * model.width
    image = patches + _sequence_flops(run, run.image_tokens)
    text = _sequence_flops(run, run.text.length)
    mlp = _mlp_flops(run)
    asked = len(moe.blocks) * moe.top_k * (run.image_tokens + run.text.length) * mlp
    # Whole numbers: a group has group_pairs pairs, and so many slots that it need not divide evenly.
    computed = sum(len(kept_experts(run, block)) for block in moe.blocks) * shape_of(run).capacity * mlp
    return Flops(
        image=image,
        text=text,
        pair=image + text,
        pair_with_buffers=image + text - asked + round(computed / moe.group_pairs),
    )


def _sequence_flops(run: Run, tokens: int) -> int:
    """One picture's or caption's tokens through all blocks, and its projection."""
    model, moe = run.model, run.moe
    attention = 8 * tokens * model.width**2 + 4 * tokens**2 * model.width
    mixture = moe.top_k * _mlp_flops(run) + 2 * model.width * moe.num_experts
    mlps = (model.depth - len(moe.blocks)) * _mlp_flops(run) + len(moe.blocks) * mixture
    return model.depth * attention + tokens * mlps + 2 * model.width * model.embed_dim


def _mlp_flops(run: Run) -> int:
    """Of one token in one MLP or expert."""
    return 4 * run.model.width * run.model.mlp_dim


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
