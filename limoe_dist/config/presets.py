"""The presets, as one table. Sizes: ViT's S, B, L, H; the MoE columns are decided in the table's own comments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from limoe_dist.config.schema import Checkpoint, Eval, Image, Log, Model, Moe, Optim, Run, Text, Train


@dataclass(frozen=True)
class Size:
    width: int
    depth: int
    heads: int
    mlp_dim: int
    patch: int
    group_pairs: int
    moe_blocks: tuple[int, ...]
    about: str


def _odd(depth: int) -> tuple[int, ...]:
    """Every second block, from block 1: V-MoE's "Every 2", and the odd layers of LIMoE's Figures 3 and 6."""
    return tuple(range(1, depth, 2))


# LIMoE section 3.2: H/14 has 12 MoE blocks, "non-uniformly" spaced; which ones is not published. This list is sparse
# early and dense late, and gives the published 5.6 B parameters, as any 12 blocks do.
_H14_BLOCKS = (3, 7, 11, 15, 18, 21, 24, 26, 28, 29, 30, 31)

SIZES = {
    "s32": Size(384, 12, 6, 1536, 32, 32, _odd(12), "ViT-S/32 backbone"),
    "s16": Size(384, 12, 6, 1536, 16, 16, _odd(12), "ViT-S/16 backbone"),
    "b32": Size(768, 12, 12, 3072, 32, 32, _odd(12), "ViT-B/32 backbone"),
    "b16": Size(768, 12, 12, 3072, 16, 16, _odd(12), "ViT-B/16 backbone, the paper's ablations"),
    "l16": Size(1024, 24, 16, 4096, 16, 16, _odd(24), "ViT-L/16 backbone"),
    "h14": Size(1280, 32, 16, 5120, 14, 16, _H14_BLOCKS, "ViT-H/14 backbone, 5.6 B parameters"),
}


def _paper(name: str) -> Run:
    size = SIZES[name]
    h14 = name == "h14"
    return Run(
        preset=name,
        model=Model(
            width=size.width,
            depth=size.depth,
            heads=size.heads,
            mlp_dim=size.mlp_dim,
            embed_dim=size.width,
        ),
        image=Image(size=224, patch=size.patch),
        text=Text(length=16, vocab_size=32_000, pad="token"),
        moe=Moe(blocks=size.moe_blocks, num_experts=32, group_pairs=size.group_pairs),
        # LIMoE section 3.1: batch 16k for 781k steps; section 3.2: H/14 at 21k, 23.3 B examples.
        train=Train(batch_pairs=21_504 if h14 else 16_384, steps=1_083_500 if h14 else 781_250),
        # limoe.md section 4: big_vision's Adafactor; its absolute decay of 1e-4 is 0.1 times the learning rate.
        optim=Optim(name="adafactor", weight_decay=0.1, cooldown_steps=50_000),
        # LiT's protocol (section 3.1): CLIP's 80 prompts, and every caption of a picture.
        eval=Eval(templates=("clip",), captions="all"),
    )


def _emoji(name: str, *, steps: int, width: int, depth: int, patch: int, augment: Image) -> Run:
    """Presets for the demo data on two CPU cores; docs/measured/presets.json tells what was tried."""
    blocks = _odd(depth)
    return Run(
        preset=name,
        model=Model(width=width, depth=depth, heads=4, mlp_dim=4 * width, embed_dim=width, init_temperature=0.07),
        # The art stands on white, which becomes 0.
        image=augment.model_copy(update={"size": 48, "patch": patch, "mean": 255.0}),
        text=Text(length=16, vocab_size=2000, pad="masked"),
        moe=Moe(
            blocks=blocks,
            num_experts=8,
            group_pairs=32,
            capacity_factor=1.0,
            # 0.04 on four losses and 0.001 on the z-loss, averaged over the MoE blocks; the mean is over all five.
            aux_weight=0.04 * 5 / len(blocks),
            z=0.025,
            min_image_experts=5.0,
            min_text_experts=3.0,
        ),
        optim=Optim(lr=1e-3, weight_decay=0.05, warmup_steps=100, timescale=steps, cooldown_steps=steps // 2),
        train=Train(steps=steps, batch_pairs=128),
        eval=Eval(every_steps=300, batch_pairs=64, classes="trained"),
        checkpoint=Checkpoint(every_steps=200),
        log=Log(every_steps=10),
    )


_MILD = Image(
    rotate_degrees=10.0,
    scale=0.15,
    translate=0.06,
    brightness=0.15,
    contrast=0.15,
    saturation=0.3,
    hue_degrees=10.0,
)
# For many epochs of few pictures.
_STRONG = _MILD.model_copy(update={"flip": 0.5, "scale": 0.2, "translate": 0.08, "hue_degrees": 15.0})


def _tiny() -> Run:
    return _emoji("tiny", steps=1200, width=96, depth=4, patch=12, augment=_MILD)


def _small() -> Run:
    return _emoji("small", steps=2800, width=128, depth=6, patch=8, augment=_STRONG)


_BASE: dict[str, tuple[str, Callable[[], Run]]] = {
    "tiny": ("the quick start: minutes on two CPU cores", _tiny),
    "small": ("half an hour on two CPU cores", _small),
    **{name: (size.about, lambda name=name: _paper(name)) for name, size in SIZES.items()},  # type: ignore[misc]
}


LOSS_SETS: dict[str, tuple[str, ...]] = {
    # LIMoE section 2.2.1 and the first row of Figure 3: what V-MoE trains with.
    "classic": ("importance", "load"),
    # The best 0-shot and 10-shot row of Table 3, with global_image, which section 4.1 says the main experiments had.
    "limoe": ("importance", "z", "local_text", "global_text", "global_image"),
}
"""The named sets of auxiliary losses: what is active in each. All other losses have the weight 0."""

AUX_WEIGHTS = (
    *("importance", "load", "z", "local_image", "local_text", "global_image", "global_text"),
    "mutual_information",
)
"""The settings in moe.* that weigh one auxiliary loss each."""


def with_losses(run: Run, losses: str) -> Run:
    """The run with a named set of auxiliary losses, as `with_losses(run, "classic")`. Raises KeyError.

    A loss of the set has the weight that it has in the run; where that is 0, its weight in the run's preset; or else 1.
    moe.aux_weight stays: it weighs the mean over the active losses.
    """
    base = base_of(run.preset)
    usual = _BASE[base][1]().moe if base in _BASE else Moe()
    active = LOSS_SETS[losses]
    weights = {
        name: (getattr(run.moe, name) or getattr(usual, name) or 1.0) if name in active else 0.0 for name in AUX_WEIGHTS
    }
    return run.model_copy(update={"moe": run.moe.model_copy(update=weights)})


def as_dense(run: Run) -> Run:
    """The dense one-tower twin: an MLP in place of every mixture, all else as in the run."""
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"towers": "one"}),
            "moe": run.moe.model_copy(update={"blocks": (), "kept_experts": ()}),
        }
    )


def as_two_tower(run: Run) -> Run:
    """The dense two-tower twin: captions pass through blocks of their own, as many and as wide."""
    run = as_dense(run)
    return run.model_copy(update={"model": run.model.model_copy(update={"towers": "two"})})


TWINS: dict[str, tuple[str, Callable[[Run], Run]]] = {
    "-dense": ("dense one-tower twin", as_dense),
    "-two-tower": ("dense two-tower twin", as_two_tower),
    "-classic": ("classic losses alone, importance and load", lambda run: with_losses(run, "classic")),
}
"""Every preset has these, by suffix."""


def base_of(name: str) -> str:
    """The preset that a twin is one of: b16 for b16-two-tower; a name without such a suffix as it is."""
    return next((name.removesuffix(suffix) for suffix in TWINS if name.endswith(suffix)), name)


def base_names() -> dict[str, str]:
    """The presets without their twins, with one line about each."""
    return {name: text for name, (text, _) in _BASE.items()}


def names() -> dict[str, str]:
    """All preset names, twins too, with one line about each."""
    about = base_names()
    return about | {f"{base}{suffix}": f"{base}, {text}" for base in about for suffix, (text, _) in TWINS.items()}


def preset(name: str) -> Run:
    """The run of a preset. Raises KeyError for an unknown name."""
    base = base_of(name)
    run = _BASE[base][1]()
    if base == name:
        return run
    _, twin = TWINS[name.removeprefix(base)]
    return twin(run).model_copy(update={"preset": name})


def threshold(min_experts: float) -> float:
    """Nats of entropy that ask for at least `min_experts` experts (LIMoE section 2.2.2: tau = log S)."""
    return math.log(min_experts)
