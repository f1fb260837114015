"""A small model whose routers send pictures to one expert and texts to another, whatever they show or say."""

from __future__ import annotations

from typing import Any

import torch

from limoe_dist.config.schema import Eval, Image, Model, Moe, Run, Text
from limoe_dist.model.tower import Limoe, build_model
from limoe_dist.parallel.mesh import Mesh

CPU = torch.device("cpu")
IMAGE_EXPERT, TEXT_EXPERT = 2, 1
RUN = Run(
    model=Model(width=16, depth=2, heads=2, mlp_dim=32, embed_dim=8),
    image=Image(size=16, patch=8),
    text=Text(length=8, vocab_size=64, pad="token"),
    # A group is 4 pairs: 16 image and 32 text tokens; 4 experts with 12 slots each.
    moe=Moe(
        blocks=(1,), num_experts=4, group_pairs=4, capacity_factor=1.0, routers="per_modality",
        min_image_experts=2, min_text_experts=2,
    ),
    eval=Eval(batch_pairs=8),
)  # fmt: skip


def planted_model(run: Run = RUN) -> Limoe:
    """All gates are equal, so that tokens are served as they stand in their group: images first."""
    model = build_model(run, mesh=Mesh.single(), device=CPU)
    with torch.no_grad():
        for block in run.moe.blocks:
            layer: Any = model.blocks[block]
            # The router sees the same row of ones for every token.
            layer.norm2.weight.zero_()
            layer.norm2.bias.fill_(1.0)
            layer.moe.router.zero_()
            layer.moe.router[0, :, IMAGE_EXPERT] = 1.0
            layer.moe.router[1, :, TEXT_EXPERT] = 1.0
    return model
