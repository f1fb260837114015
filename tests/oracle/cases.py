"""Random training cases: a configuration, weights and batches, for the product and for the oracle.

Every setting of model, image, text, moe, optim and train that decides a training step is drawn. Routing must not hang
on the last bit of a gate, so exact ties are avoided: captions differ in their first token, and `moe.priority=sum` never
adds all gates that a token may choose, a sum that is 1 for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from limoe_dist.config import rules
from limoe_dist.config.schema import Eval, Image, Model, Moe, Optim, Parallel, Run, Text, Train
from tests.oracle.step import Batch

FOCI = ("no experts", "two towers", "pruned experts", "two pools", "sums", "groups", "cooldown")
"""What chance alone would draw too rarely: models without experts and of two towers; experts that are pruned, or of one
modality; priorities that are sums of gates; microbatches of several routing groups; a rate that cools down."""
AUX_LOSSES = ("importance", "load", "z", "local_image", "local_text", "global_image", "global_text")
VOCABULARY = 48


@dataclass(frozen=True)
class Case:
    run: Run
    seed: int
    """Seed of the perturbation of the weights, and of the batches."""
    given: tuple[str, ...]
    """Content of each step's batch: pairs, images or texts."""

    def batches(self) -> list[Batch]:
        return [_batch(self.run, kind, self.seed + step) for step, kind in enumerate(self.given)]


def _batch(run: Run, kind: str, seed: int) -> Batch:
    random = np.random.default_rng(seed)
    pairs, length = run.train.batch_pairs, run.text.length
    images = random.normal(size=(pairs, 3, run.image.size, run.image.size))
    tokens = random.integers(0, run.text.vocab_size, (pairs, length))
    tokens[:, 0] = random.permutation(run.text.vocab_size)[:pairs]
    valid = np.arange(length) < random.integers(1, length + 1, (pairs, 1))
    return Batch(
        images=None if kind == "texts" else images,
        tokens=None if kind == "images" else tokens,
        valid=None if kind == "images" else valid,
    )


def perturbed(weights: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Weights moved away from their initial values: no bias is zero, no two experts are alike, gates are spread."""
    random = np.random.default_rng(seed)
    moved = {}
    for name in sorted(weights):
        scale = 1.0 if name.endswith("router") else 0.1
        moved[name] = np.asarray(weights[name] + scale * random.normal(size=weights[name].shape))
    return moved


@st.composite
def cases(draw: DrawFn, *, ranks: int = 1, steps: int = 3, focus: str = "") -> Case:
    """A case that `ranks` ranks can train: its layout is drawn too. focus: one of FOCI, which it is sure to be."""
    tp = draw(st.sampled_from([size for size in (1, 2, 4) if ranks % size == 0]))
    heads = tp * draw(st.integers(1, 2))
    width, depth = heads * draw(st.sampled_from([6, 4, 8])), draw(st.integers(1, 3))
    model = Model(
        width=width,
        depth=depth,
        heads=heads,
        mlp_dim=tp * draw(st.integers(3, 9)),
        embed_dim=draw(st.integers(3, 9)),
        towers="two" if focus == "two towers" else "one",
        init_temperature=draw(st.sampled_from([0.1, 0.07, 0.5])),
    )
    patch = draw(st.sampled_from([2, 3]))
    image = Image(size=patch * draw(st.integers(2, 3)), patch=patch)
    text = Text(
        length=draw(st.integers(2, 5)), vocab_size=VOCABULARY, pad=draw(st.sampled_from(["masked", "token", "masked"]))
    )
    group_pairs = draw(st.integers(1, 3))
    blocks = (
        ()
        if focus in ("no experts", "two towers")
        else tuple(sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1))))
    )
    ep = draw(st.sampled_from([size for size in (1, 2, 4) if ranks % size == 0]))
    if not blocks or focus == "pruned experts":
        ep = 1
    tokens = group_pairs * ((image.size // patch) ** 2 + text.length)
    moe = Moe(blocks=blocks, group_pairs=group_pairs, **draw(_routing(ep, len(blocks), tokens, focus)), **draw(_aux()))
    moe = draw(_thresholds(moe))
    pairs = ranks * group_pairs * (4 if focus == "groups" else draw(st.integers(1, 3)))
    if pairs < 2 * ranks:
        pairs *= 2
    optim = draw(_optim(steps, focus))
    own = pairs // ranks
    sizes = [size for size in range(1, own) if own % size == 0 and size % group_pairs == 0]
    train = Train(
        steps=steps + optim.timescale,
        batch_pairs=pairs,
        seed=draw(st.sampled_from([0, 5, 2**40])),
        dtype="fp64",
        microbatch_pairs=2 * group_pairs if focus == "groups" else draw(st.sampled_from([0, *sizes])),
        recompute=draw(st.booleans()),
        contrastive_chunk=draw(st.sampled_from([0, 1, 3])),
    )
    parallel = Parallel(
        tp=tp, ep=ep, bucket_mb=draw(st.sampled_from([64.0, 0.004])), overlap=draw(st.booleans()), reduce_dtype="fp64"
    )
    run = Run(
        model=model,
        image=image,
        text=text,
        moe=moe,
        optim=optim,
        train=train,
        parallel=parallel,
        eval=Eval(batch_pairs=group_pairs),
    )
    rules.check(run, world=ranks)
    kinds = st.sampled_from(["pairs", "pairs", "images", "texts"])
    return Case(run=run, seed=draw(st.integers(0, 2**20)), given=tuple(draw(kinds) for _ in range(steps)))


@st.composite
def _routing(draw: DrawFn, ep: int, num_blocks: int, tokens: int, focus: str) -> dict[str, Any]:
    """Experts, their pools, who chooses how many of them, and who gets a slot; an expert has one slot at least."""
    least = 4 if focus in ("pruned experts", "two pools", "sums") else 2
    experts = draw(st.sampled_from([n for n in (2, 3, 4, 5, 8) if n % ep == 0 and least <= n <= tokens]))
    pool = max(1, experts // 2) if focus == "two pools" or (not focus and draw(st.booleans())) else 0
    kept: tuple[str, ...] = ()
    choosable = min(pool, experts - pool) if pool else experts
    if focus == "pruned experts" or (not focus and ep == 1 and not pool and draw(st.booleans())):
        kept = tuple(
            " ".join(map(str, sorted(draw(st.sets(st.integers(0, experts - 1), min_size=2)))))
            for _ in range(num_blocks)
        )
        choosable = min([experts, *(len(numbers.split()) for numbers in kept)])
    if focus == "sums":
        top_k, order, priority = draw(st.integers(2, 3)), "priority", "sum"
    else:
        top_k = draw(st.integers(1, min(3, choosable)))
        order = draw(st.sampled_from(["priority", "priority", "images_first", "text_first", "random"]))
        priority = draw(st.sampled_from(["max", "sum"])) if top_k < choosable else "max"
    eval_capacity = draw(st.sampled_from(["full", "paper"]))
    factors = [factor for factor in (1.0, 0.7, 1.3) if tokens * top_k * factor >= experts]
    eval_factors = [0.0, *(factor for factor in (0.8, 1.5) if tokens * top_k * factor >= experts)]
    return {
        "num_experts": experts,
        "top_k": top_k,
        "capacity_factor": draw(st.sampled_from(factors)),
        "capacity_multiple": draw(st.sampled_from([1, 2, 4])),
        "eval_capacity": eval_capacity,
        "eval_capacity_factor": draw(st.sampled_from(eval_factors)) if eval_capacity == "paper" else 0.0,
        "order": order,
        "priority": priority,
        "routers": draw(st.sampled_from(["shared", "per_modality"])),
        "image_experts": pool,
        "noise_std": draw(st.sampled_from([1.0, 3.0, 0.0])),
        "kept_experts": kept,
    }


@st.composite
def _aux(draw: DrawFn) -> dict[str, Any]:
    """Weights of the auxiliary losses, some of them off, and their variants."""
    weights = {name: draw(st.sampled_from([0.0, 1.0, 0.5, 2.0])) for name in (*AUX_LOSSES, "mutual_information")}
    return weights | {
        "aux_weight": draw(st.sampled_from([0.04, 1.0, 0.0])),
        "modality_prior": draw(st.sampled_from(["tokens", "uniform"])),
        "local_form": draw(st.sampled_from(["plain", "above_log_k", "merged"])),
    }


@st.composite
def _thresholds(draw: DrawFn, moe: Moe) -> Moe:
    """Thresholds that can be met, and a load loss only where there is noise."""
    pool = moe.image_experts
    most = {"image": pool or moe.num_experts, "text": moe.num_experts - pool}
    share = st.sampled_from([0.95, 0.3, 0.8, 1.0])
    update: dict[str, Any] = {f"min_{name}_experts": max(1.0, draw(share) * most[name]) for name in most}
    if moe.noise_std == 0:
        update["load"] = 0.0
    return moe.model_copy(update=update)


@st.composite
def _optim(draw: DrawFn, steps: int, focus: str) -> Optim:
    name = draw(st.sampled_from(["adamw", "adafactor"]))
    warmup = draw(st.integers(0, steps - 2 if focus == "cooldown" else steps - 1))
    timescale = draw(st.integers(1, 9))
    return Optim(
        name=name,
        lr=draw(st.sampled_from([1e-2, 3e-3])),
        beta1=draw(st.sampled_from([0.9, 0.5, 0.0])),
        beta2=draw(st.sampled_from([0.98, 0.8])),
        eps=draw(st.sampled_from([1e-6, 1e-4])),
        decay_exponent=draw(st.sampled_from([0.8, 0.5])),
        max_decay=draw(st.sampled_from([0.999, 0.3])),
        min_factored_dim=draw(st.sampled_from([4, 7, 32])),
        weight_decay=draw(st.sampled_from([0.1, 0.0, 1.0])),
        clip_norm=draw(st.sampled_from([0.1, 1.0, 1e6])),
        warmup_steps=warmup,
        timescale=timescale,
        # All that warm-up leaves of `steps + timescale`: it lowers the rate of the step after the peak, and on.
        cooldown_steps=(timescale + steps - warmup) * (focus == "cooldown" or draw(st.integers(0, 1))),
    )
