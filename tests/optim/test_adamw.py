"""AdamW decays kernels only, and its state has a name for every tensor."""

from __future__ import annotations

import math

import torch

from limoe_dist.config.schema import Optim
from limoe_dist.optim.adamw import AdamW
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import placement_of
from tests.support.cases import perturbed_model, small_run

# beta 0.9 and 0.98 in the first step: m / (1 - 0.9) = g, v / (1 - 0.98) = g^2, so the step is lr * g / (|g| + eps).
OPTIM = Optim(lr=1.0, weight_decay=0.1, eps=1e-8)


def test_the_first_step_is_the_rate_and_decay_is_for_kernels() -> None:
    model = perturbed_model(small_run("fp64"), Mesh.single())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamW(model, OPTIM)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step(0.01)
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
    model = perturbed_model(small_run("fp64"), Mesh.single())
    optimizer = AdamW(model, OPTIM)
    assert optimizer.steps == 0
    names = [name for name, _ in model.named_parameters()]
    assert set(optimizer.state()) == {f"adamw/{m}/{n}" for m in ("exp_avg", "exp_avg_sq") for n in names}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step(0.01)
    assert optimizer.steps == 1
    moment, parameter = optimizer.state()["adamw/exp_avg_sq/norm.weight"]
    assert moment.shape == parameter.shape
    assert math.isclose(moment[0].item(), 0.02 * 4)
    optimizer.steps = 7
    assert optimizer.steps == 7
