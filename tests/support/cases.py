"""A small model and batch in which tokens are dropped and an expert idles, for every test across ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from limoe_dist.config.schema import Image, Model, Moe, Optim, Run, Text, Train
from limoe_dist.model.tower import Limoe, build_model
from limoe_dist.parallel.mesh import Mesh

BATCH, LENGTH, VOCABULARY = 16, 5, 50


def small_run(dtype: str = "fp64", *, pad: str = "masked", steps: int = 20) -> Run:
    """8 experts in blocks 1 and 3, groups of 2 pairs, capacity 1.0, noise on, every auxiliary loss on."""
    return Run(
        model=Model(width=32, depth=4, heads=4, mlp_dim=64, embed_dim=24),
        image=Image(size=16, patch=4),
        text=Text(length=LENGTH, vocab_size=VOCABULARY, pad=pad),
        moe=Moe(
            blocks=(1, 3),
            num_experts=8,
            group_pairs=2,
            capacity_factor=1.0,
            load=1.0,
            local_image=1.0,
            min_image_experts=7.0,
            min_text_experts=6.0,
        ),
        optim=Optim(warmup_steps=2, cooldown_steps=5, lr=3e-3, weight_decay=0.05),
        train=Train(dtype=dtype, batch_pairs=BATCH, steps=steps, seed=7),
    )


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """images (16, 3, 16, 16), tokens (16, 5), valid (16, 5): the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (BATCH, 1), generator=generator)
    return images, tokens, torch.arange(LENGTH) < lengths


def slice_of(whole: tuple[Tensor, ...], mesh: Mesh) -> tuple[Tensor, ...]:
    """This rank's pairs of a batch."""
    return tuple(column.chunk(mesh.world.size)[mesh.rank] for column in whole)


@torch.no_grad()
def perturbed_model(run: Run, mesh: Mesh) -> Limoe:
    """The model with every bias away from zero, and, with experts, one of block 1 that no token chooses."""
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter += 0.02
    # The inputs of the router are layer-normalised: with this bias and column no token ever wants expert 5.
    if run.moe.blocks:
        model.blocks[1].norm2.bias.fill_(0.5)
        model.blocks[1].moe.router[..., 5] = -1.0
    return model
