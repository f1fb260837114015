"""The whole model's parameters by name: shape, the axis and dim that cut it, weight decay, stacked dims, wide or not.

Cut over tp by heads and hidden units, over ep by experts. Decay is for kernels, positions and the vocabulary excluded.
Stacked are dims that only put matrices together: q, k and v; experts; routers. LayerNorms, routers and the temperature
stay wide. Sizes differ, so that none stands for another: width 24 in 3 heads of 8, hidden 40, embedding 20, patches of
3 x 4 x 4, 9 image tokens, 7 text tokens, 50 pieces, 6 experts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from limoe_dist.config.schema import Image, Model, Moe, Run, Text
from limoe_dist.model.tower import build_model
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.placement import placement_of

RUN = Run(
    model=Model(width=24, depth=2, heads=3, mlp_dim=40, embed_dim=20),
    image=Image(size=12, patch=4),
    text=Text(length=7, vocab_size=50),
    moe=Moe(blocks=(1,), num_experts=6, min_image_experts=4.0, min_text_experts=3.0),
)
Row = tuple[tuple[int, ...], str | None, int, bool, int, bool]
"""Shape, axis, dim, decay, stacked, wide."""


def layer_norm(name: str) -> dict[str, Row]:
    return {f"{name}.{part}": ((24,), None, 0, False, 0, True) for part in ("weight", "bias")}


def block(name: str, *, moe: bool, routers: int = 1) -> dict[str, Row]:
    rows: dict[str, Row] = {
        **layer_norm(f"{name}.norm1"),
        f"{name}.attention.qkv_weight": ((3, 3, 8, 24), "tp", 1, True, 1, False),
        f"{name}.attention.qkv_bias": ((3, 3, 8), "tp", 1, False, 1, False),
        f"{name}.attention.out.weight": ((24, 3, 8), "tp", 1, True, 0, False),
        f"{name}.attention.out.bias": ((24,), None, 0, False, 0, False),
        **layer_norm(f"{name}.norm2"),
    }
    if moe:
        shape = (24, 6) if routers == 1 else (2, 24, 6)
        return rows | {
            f"{name}.moe.router": (shape, None, 0, True, routers - 1, True),
            f"{name}.moe.experts.up_weight": ((6, 24, 40), "ep", 0, True, 1, False),
            f"{name}.moe.experts.up_bias": ((6, 40), "ep", 0, False, 1, False),
            f"{name}.moe.experts.down_weight": ((6, 40, 24), "ep", 0, True, 1, False),
            f"{name}.moe.experts.down_bias": ((6, 24), "ep", 0, False, 1, False),
        }
    return rows | {
        f"{name}.mlp.up.weight": ((40, 24), "tp", 0, True, 0, False),
        f"{name}.mlp.up.bias": ((40,), "tp", 0, False, 0, False),
        f"{name}.mlp.down.weight": ((24, 40), "tp", 1, True, 0, False),
        f"{name}.mlp.down.bias": ((24,), None, 0, False, 0, False),
    }


COMMON: dict[str, Row] = {
    "image_projection": ((24, 20), None, 0, True, 0, False),
    "text_projection": ((24, 20), None, 0, True, 0, False),
    "log_scale": ((), None, 0, False, 0, True),
    "image_embed.weight": ((24, 3, 4, 4), None, 0, True, 0, False),
    "image_embed.bias": ((24,), None, 0, False, 0, False),
    "image_embed.position": ((9, 24), None, 0, False, 0, False),
    "text_embed.table": ((50, 24), None, 0, False, 0, False),
    "text_embed.position": ((7, 24), None, 0, False, 0, False),
    **layer_norm("norm"),
}


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({}, block("blocks.0", moe=False) | block("blocks.1", moe=True)),
        ({"moe": {"routers": "per_modality"}}, block("blocks.0", moe=False) | block("blocks.1", moe=True, routers=2)),
        (
            {"model": {"towers": "two"}, "moe": {"blocks": ()}},
            {
                name: row
                for blocks in ("blocks", "text_blocks")
                for number in range(2)
                for name, row in block(f"{blocks}.{number}", moe=False).items()
            }
            | layer_norm("text_norm"),
        ),
    ],
    ids=["one tower", "a router for each modality", "two towers"],
)
def test_every_parameter_has_its_placement(change: dict[str, dict[str, object]], rows: dict[str, Row]) -> None:
    run = RUN.model_copy(update={name: getattr(RUN, name).model_copy(update=update) for name, update in change.items()})
    model = build_model(run, mesh=Mesh.single(), device=torch.device("meta"))
    found = {}
    for name, parameter in model.named_parameters():
        tag = placement_of(parameter)
        found[name] = (tag.shape, tag.axis, tag.dim, tag.decay, tag.stacked, tag.wide)
        assert tuple(parameter.shape) == tag.shape
    assert found == COMMON | rows


def test_a_rank_holds_its_heads_hidden_units_and_experts() -> None:
    # Rank 4 of 6, place 1 of 3 in its tp group and 4 of 6 in its ep group; nothing is sent on the meta device.
    single = Mesh.single()
    tp, ep, world = Axis("tp", 3, 1, None), Axis("ep", 6, 4, None), Axis("world", 6, 4, None)
    mesh = replace(single, tp=tp, ep=ep, world=world, dp=Axis("dp", 2, 1, None), edp=Axis("edp", 1, 0, None))
    run = RUN.model_copy(update={"model": RUN.model.model_copy(update={"mlp_dim": 42})})
    model = build_model(run, mesh=mesh, device=torch.device("meta"))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["blocks.0.attention.qkv_weight"] == (3, 1, 8, 24)
    assert shapes["blocks.0.attention.out.weight"] == (24, 1, 8)
    assert shapes["blocks.0.mlp.up.weight"] == (14, 24)
    assert shapes["blocks.0.mlp.down.weight"] == (24, 14)
    assert shapes["blocks.1.moe.experts.up_weight"] == (1, 24, 42)
    assert shapes["blocks.1.moe.router"] == (24, 6)
    parts = {
        name: (placement_of(p).local_slice(mesh).start, placement_of(p).local_slice(mesh).stop)
        for name, p in model.named_parameters()
    }
    assert parts["blocks.0.attention.qkv_bias"] == (1, 2)
    assert parts["blocks.0.mlp.down.weight"] == (14, 28)
    assert parts["blocks.1.moe.experts.down_bias"] == (4, 5)
    assert parts["blocks.1.moe.router"] == (0, 24)
    assert parts["log_scale"] == (0, 1)
    replicas = {name: placement_of(p).replicas(mesh).name for name, p in model.named_parameters()}
    assert replicas["blocks.0.mlp.up.bias"] == "dp"
    assert replicas["blocks.1.moe.experts.up_bias"] == "edp"
    assert replicas["blocks.1.moe.router"] == "world"
