"""AdamW decays kernels only, and its state has a name for every tensor."""

from __future__ import annotations

import math

import torch

from limoe_dist.config.schema import Run
from limoe_dist.model.tower import Limoe
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import placement_of
from tests.support.cases import perturbed_model, small_run

# beta 0.9 and 0.98 in the first step: m / (1 - 0.9) = g, v / (1 - 0.98) = g^2, so the step is lr * g / (|g| + eps).
SETTINGS = {"lr": 1.0, "weight_decay": 0.1, "eps": 1e-8, "clip_norm": 1e9}


def engine_with_gradient(value: float) -> tuple[Limoe, NativeEngine]:
    """An engine whose gradient is `value` everywhere."""
    small = small_run("fp64")
    run: Run = small.model_copy(update={"optim": small.optim.model_copy(update=SETTINGS)})
    model = perturbed_model(run, Mesh.single())
    engine = NativeEngine(model, run, Mesh.single())
    give_gradient(model, engine, value)
    return model, engine


def give_gradient(model: Limoe, engine: NativeEngine, value: float) -> None:
    engine.backward(value * torch.stack([parameter.sum() for parameter in model.parameters()]).sum(), last=True)


def test_the_first_step_is_the_rate_and_decay_is_for_kernels() -> None:
    model, engine = engine_with_gradient(3.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.step(0.01)
    for name, parameter in model.named_parameters():
        decay = 0.01 * 0.1 if placement_of(parameter).decay else 0.0
        want = before[name] * (1 - decay) - 0.01
        torch.testing.assert_close(parameter, want, rtol=0, atol=1e-9)
    kernels = {name for name, p in model.named_parameters() if placement_of(p).decay}
    assert "blocks.1.moe.experts.up_weight" in kernels
    assert "blocks.0.attention.qkv_weight" in kernels
    assert kernels.isdisjoint({"text_embed.table", "image_embed.position", "log_scale", "norm.weight"})
    assert not [name for name in kernels if name.endswith("bias")]


def test_the_state_is_named_and_laid_out_like_the_parameters() -> None:
    model, engine = engine_with_gradient(2.0)
    assert engine.steps == 0
    names = [name for name, _ in model.named_parameters()]
    moments = {f"adamw/{m}/{n}" for m in ("exp_avg", "exp_avg_sq") for n in names}
    assert set(engine.shards()) == moments | {f"model/{name}" for name in names}
    engine.step(0.01)
    assert engine.steps == 1
    moment = engine.shards()["adamw/exp_avg_sq/norm.weight"].tensor
    assert moment.shape == (32,)
    assert math.isclose(moment[0].item(), 0.02 * 4)
    engine.steps = 7
    assert engine.steps == 7


def test_a_norm_above_the_limit_is_scaled_to_it() -> None:
    small = small_run("fp64")
    run = small.model_copy(update={"optim": small.optim.model_copy(update={"clip_norm": 0.5})})
    model = perturbed_model(run, Mesh.single())
    engine = NativeEngine(model, run, Mesh.single())
    give_gradient(model, engine, 2.0)
    norm = engine.step(0.01)
    # Every gradient is 2: the norm is 2 * sqrt(numbers), and each is scaled by 0.5 / norm.
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert math.isclose(norm.item(), 2 * math.sqrt(numbers), rel_tol=1e-12)
    moment = engine.shards()["adamw/exp_avg/norm.weight"].tensor
    assert math.isclose(moment[0].item(), 0.1 * 2 * 0.5 / norm.item(), rel_tol=1e-12)
