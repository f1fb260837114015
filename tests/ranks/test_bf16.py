"""The path of a GPU's default, in bfloat16 on a CPU: weights and arithmetic of the blocks bf16, masters float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from limoe_dist.config.schema import Run
from limoe_dist.model.moe_layer import EVALUATION
from limoe_dist.model.tower import autocast
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.step import Examples, training_step
from tests.support.cases import batch, perturbed_model, slice_of, small_run
from tests.support.ranks import RanksPool

WIDE = ("norm.weight", "norm.bias", "blocks.1.norm2.weight", "blocks.1.moe.router", "log_scale")


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    types: dict[str, str]
    parameters: dict[str, torch.Tensor]
    masters: dict[str, torch.Tensor]
    """This rank's boxes."""
    types_of_state: set[str]


def two_steps(dtype: str, rate: float, tp: int, ep: int) -> Trained:
    mesh = Mesh.build(tp=tp, ep=ep) if tp else Mesh.single()
    small = small_run(dtype)
    run: Run = small.model_copy(update={"optim": small.optim.model_copy(update={"lr": rate, "warmup_steps": 0})})
    model = perturbed_model(run, mesh)
    engine = NativeEngine(model, run, mesh)
    losses = []
    for step in range(2):
        examples = Examples(*slice_of(batch(step, torch.float32), mesh))
        result = training_step(model, engine, examples, step=step, run=run, mesh=mesh)
        losses.append(sum_over(result.losses.contrastive + result.losses.aux, mesh.world).item())
    shards = engine.shards()
    return Trained(
        losses=losses,
        types={name: str(parameter.dtype) for name, parameter in model.named_parameters()},
        parameters={name: parameter.detach() for name, parameter in model.named_parameters()},
        masters={name.removeprefix("model/"): s.tensor for name, s in shards.items() if name.startswith("model/")},
        types_of_state={str(shard.tensor.dtype) for shard in shards.values()},
    )


def test_weights_are_bf16_and_what_must_stay_wide_is_float32() -> None:
    found, wide = two_steps("bf16", 3e-3, 0, 0), two_steps("fp32", 3e-3, 0, 0)
    assert found.types_of_state == {"torch.float32"}
    for name, kind in found.types.items():
        always_wide = name in WIDE or name.endswith(".router") or ".norm" in name
        assert kind == ("torch.float32" if always_wide else "torch.bfloat16"), name
        torch.testing.assert_close(
            found.parameters[name], found.masters[name].to(found.parameters[name].dtype), rtol=0, atol=0
        )
    # bf16 has 8 bits: some 0.4 % an operation, less on average.
    for ours, theirs in zip(found.losses, wide.losses, strict=True):
        assert abs(ours - theirs) < 0.02 * theirs


def test_updates_too_small_for_bf16_add_up_in_the_masters() -> None:
    # 1e-6 is less than half a last bit of bf16 near 0.1: the weights stay, the masters move by about twice that.
    found, before = two_steps("bf16", 1e-6, 0, 0), perturbed_model(small_run("bf16"), Mesh.single())
    start = dict(before.named_parameters())
    name = "blocks.0.mlp.up.weight"
    large = start[name].abs() > 0.05
    assert torch.equal(found.parameters[name][large], start[name][large])
    moved = (found.masters[name] - start[name].float())[large].abs()
    assert 1e-7 < moved.mean() < 3e-6


def test_two_ranks_with_tp_and_ep_train_in_bf16_as_one_process_does(ranks2: RanksPool) -> None:
    alone = two_steps("bf16", 3e-3, 0, 0)
    for found in ranks2.run(two_steps, "bf16", 3e-3, 2, 2):
        for ours, theirs in zip(found.losses, alone.losses, strict=True):
            assert abs(ours - theirs) < 0.02 * theirs


def test_the_router_computes_in_float32_inside_autocast() -> None:
    run = small_run("bf16", pad="token")
    model = perturbed_model(run, Mesh.single())
    layer, layout = model.blocks[1].moe, model._layout(*batch(0, torch.float32), EVALUATION)
    x_TD = torch.randn(layout.num_image_tokens + layout.num_text_tokens, 32, generator=torch.Generator().manual_seed(0))
    with autocast(run, torch.device("cpu")):
        clean_GSE, _ = layer.logits(x_TD, layout, EVALUATION)
    assert clean_GSE.dtype == torch.float32
    wanted = (x_TD.double() @ layer.router.detach().double())[layout.token_GS]
    # bfloat16 would be off by 1e-2.
    torch.testing.assert_close(clean_GSE.detach().double(), wanted, rtol=0, atol=1e-5)
