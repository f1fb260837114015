"""One optimizer update on hand-made parameters and gradients: AdamW, clipping, buckets, accumulation, masters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limoe_dist.config.schema import Run
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.pieces import make_buckets
from limoe_dist.parallel.placement import ZEROS, Placement, make_parameter
from tests.support.cases import small_run

BETA1, BETA2, EPS, DECAY = 0.8, 0.9, 0.5, 0.25
"""eps is large, so that where it is added shows."""


class Two(nn.Module):
    """A kernel, which is decayed, and a bias, which is not."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel = make_parameter(Placement((2, 3), ZEROS, decay=True), Mesh.single())
        self.bias = make_parameter(Placement((2,), ZEROS), Mesh.single())
        placements = {name: parameter.placement for name, parameter in self.named_parameters()}
        self.to(dtype)
        for name, parameter in self.named_parameters():
            parameter.placement = placements[name]
        with torch.no_grad():
            self.kernel.copy_(torch.tensor(KERNEL))
            self.bias.copy_(torch.tensor(BIAS))


KERNEL = [[1.0, -2.0, 0.5], [3.0, 0.25, -1.5]]
BIAS = [0.75, -4.0]


def engine_of(dtype: str = "fp64", *, bucket_mb: float = 64.0, **optim: Any) -> tuple[Two, NativeEngine]:
    small = small_run(dtype)
    settings = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY, "clip_norm": 1e9} | optim
    run: Run = small.model_copy(
        update={
            "optim": small.optim.model_copy(update=settings),
            "parallel": small.parallel.model_copy(update={"bucket_mb": bucket_mb}),
        }
    )
    model = Two({"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    return model, NativeEngine(model, run, Mesh.single())


def give(engine: NativeEngine, *parts: tuple[nn.Parameter, list[Any]], last: bool = True) -> None:
    """A backward pass that brings these gradients, and none for parameters that are not named."""
    loss = sum((parameter * torch.tensor(grad, dtype=parameter.dtype)).sum() for parameter, grad in parts)
    assert isinstance(loss, Tensor)
    engine.backward(loss, last=last)


class PlainAdamW:
    """One number and its moments (Loshchilov and Hutter): decay first, by rate * decay, apart from the gradient."""

    def __init__(self, value: float, decay: float) -> None:
        self.value, self.decay, self.first, self.second, self.count = value, decay, 0.0, 0.0, 0

    def step(self, grad: float, rate: float) -> None:
        self.count += 1
        self.first = BETA1 * self.first + (1 - BETA1) * grad
        self.second = BETA2 * self.second + (1 - BETA2) * grad * grad
        unbiased = self.first / (1 - BETA1**self.count)
        size = math.sqrt(self.second / (1 - BETA2**self.count)) + EPS
        self.value = self.value * (1 - rate * self.decay) - rate * unbiased / size


def test_one_step_of_adamw_on_one_number_by_hand() -> None:
    # g = 2: m = 0.4, v = 0.4; unbiased 2 and 4; 2 / (2 + 0.5) = 0.8. w = 1 * (1 - 0.1 * 0.25) - 0.1 * 0.8 = 0.895,
    # and the bias 0.75 - 0.08 = 0.67.
    model, engine = engine_of()
    give(engine, (model.kernel, [[2.0] * 3] * 2), (model.bias, [2.0, 2.0]))
    engine.step(0.1)
    assert model.kernel[0, 0].item() == pytest.approx(0.895, rel=1e-14)
    assert model.bias[0].item() == pytest.approx(0.67, rel=1e-14)


def test_several_steps_are_the_plain_rule_on_every_number() -> None:
    model, engine = engine_of()
    numbers = [PlainAdamW(value, DECAY) for row in KERNEL for value in row] + [PlainAdamW(value, 0.0) for value in BIAS]
    for step in range(5):
        rate = 0.1 / (1 + step)
        grads = [math.sin(3.0 * number + step) for number in range(8)]
        # In two microbatches: a third of the gradient, then the rest.
        for share, last in ((1 / 3, False), (2 / 3, True)):
            part = [grad * share for grad in grads]
            give(engine, (model.kernel, [part[:3], part[3:6]]), (model.bias, part[6:]), last=last)
        norm = engine.step(rate)
        assert norm.item() == pytest.approx(math.sqrt(sum(grad * grad for grad in grads)), rel=1e-12)
        for number, grad in zip(numbers, grads, strict=True):
            number.step(grad, rate)
        found = [*model.kernel.flatten().tolist(), *model.bias.tolist()]
        assert found == pytest.approx([number.value for number in numbers], rel=1e-12)
    assert engine.steps == 5
    shards = engine.shards()
    for moment, name in (("first", "exp_avg"), ("second", "exp_avg_sq")):
        found = [
            *shards[f"adamw/{name}/kernel"].tensor.flatten().tolist(),
            *shards[f"adamw/{name}/bias"].tensor.tolist(),
        ]
        assert found == pytest.approx([getattr(number, moment) for number in numbers], rel=1e-12)


@pytest.mark.parametrize("bucket_mb", [1e-9, 64.0], ids=["a bucket each", "one bucket of a kind"])
@pytest.mark.parametrize(("limit", "factor"), [(26.0, 1.0), (13.0, 1.0), (6.5, 0.5), (1.3, 0.1)])
def test_a_gradient_is_scaled_to_the_limit_only_where_its_norm_is_above(
    bucket_mb: float, limit: float, factor: float
) -> None:
    # 3, 4 and 12: the norm over both parameters is 13.
    model, engine = engine_of(bucket_mb=bucket_mb, clip_norm=limit)
    assert len(engine.buckets) == 2
    give(engine, (model.kernel, [[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), (model.bias, [0.0, -12.0]))
    assert engine.norm()[0].item() == pytest.approx(13.0, rel=1e-14)
    assert engine.step(0.1).item() == pytest.approx(13.0, rel=1e-14)
    shards = engine.shards()
    kernel, bias = shards["adamw/exp_avg/kernel"].tensor, shards["adamw/exp_avg/bias"].tensor
    scaled = 0.2 * factor
    assert kernel.flatten().tolist() == pytest.approx([3 * scaled, 0, 0, 0, 4 * scaled, 0], rel=1e-12)
    assert bias.tolist() == pytest.approx([0, -12 * scaled], rel=1e-12)


def test_the_norm_of_float32_gradients_is_summed_in_float64() -> None:
    model, engine = engine_of("fp32")
    kernel, bias = [[1 / 3, 1e-4, 2e-3], [0.7, 1e-5, 0.1]], [1 / 7, 3e-4]
    give(engine, (model.kernel, kernel), (model.bias, bias))
    given = torch.cat([torch.tensor(kernel).flatten(), torch.tensor(bias)]).tolist()
    squares = math.fsum(number * number for number in given)
    assert engine.norm()[0].item() == pytest.approx(math.sqrt(squares), rel=1e-14)


def test_adafactor_hardly_moves_where_the_gradient_is_rounding() -> None:
    # The square of the gradient and 1e-30 are added: of 1e-15 the step is 1 / sqrt(2) of that of a large gradient.
    changes = []
    for grad in (1.0, 1e-15):
        model, engine = engine_of(name="adafactor", weight_decay=0.0)
        before = model.bias.detach().clone()
        give(engine, (model.bias, [grad, -grad]), (model.kernel, [[0.0] * 3] * 2))
        engine.step(0.1)
        changes.append(model.bias.detach() - before)
    assert changes[0].abs().min() > 1e-3
    torch.testing.assert_close(changes[1], changes[0] / math.sqrt(2), rtol=1e-9, atol=0)


def test_a_norm_that_is_handed_in_is_the_one_that_clips() -> None:
    model, engine = engine_of(clip_norm=1.0)
    give(engine, (model.bias, [3.0, 4.0]))
    engine.step(0.1, norm=torch.tensor(10.0, dtype=torch.float64))
    assert engine.shards()["adamw/exp_avg/bias"].tensor.tolist() == pytest.approx([0.06, 0.08], rel=1e-12)


@pytest.mark.parametrize("bucket_mb", [1e-9, 64.0])
def test_a_parameter_without_a_gradient_has_zeros_and_not_what_an_earlier_step_left(bucket_mb: float) -> None:
    model, engine = engine_of(bucket_mb=bucket_mb)
    give(engine, (model.kernel, [[1.0] * 3] * 2), (model.bias, [1.0, 2.0]))
    engine.step(0.0)
    give(engine, (model.kernel, [[1.0] * 3] * 2))
    assert engine.gradients()["bias"].tensor.tolist() == [0.0, 0.0]
    engine.step(0.0)
    # 0.2 g, then 0.8 of it.
    moments = engine.shards()
    assert moments["adamw/exp_avg/bias"].tensor.tolist() == pytest.approx([0.16, 0.32], rel=1e-12)
    assert moments["adamw/exp_avg/kernel"].tensor[0, 0].item() == pytest.approx(0.16 + 0.2, rel=1e-12)
    # And what comes later is not added to what an earlier step had.
    give(engine, (model.bias, [5.0, 5.0]))
    assert engine.gradients()["bias"].tensor.tolist() == [5.0, 5.0]
    assert engine.gradients()["kernel"].tensor.abs().sum().item() == 0.0


def test_a_parameter_that_only_an_early_microbatch_reaches_keeps_that_gradient() -> None:
    model, engine = engine_of()
    give(engine, (model.kernel, [[1.0] * 3] * 2), (model.bias, [1.0, 2.0]), last=False)
    give(engine, (model.kernel, [[10.0] * 3] * 2), last=True)
    gradients = engine.gradients()
    assert gradients["bias"].tensor.tolist() == [1.0, 2.0]
    assert gradients["kernel"].tensor.tolist() == [[11.0] * 3] * 2


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_a_step_with_keep_zero_changes_nothing_and_the_next_one_is_the_first(value: float) -> None:
    model, engine = engine_of(clip_norm=1.0)
    give(engine, (model.kernel, [[value] * 3] * 2), (model.bias, [value, value]))
    engine.step(0.1, keep=torch.zeros((), dtype=torch.float64))
    assert model.kernel.tolist() == KERNEL
    assert model.bias.tolist() == BIAS
    assert {float(s.tensor.abs().sum()) for n, s in engine.shards().items() if n.startswith("adamw")} == {0.0}
    engine.steps = 0
    # Bias correction of a first step: the update is g / (g + eps) = 0.6 / 1.1, as in one that came first.
    give(engine, (model.bias, [0.6, 0.0]))
    engine.step(0.1, keep=torch.ones((), dtype=torch.float64))
    assert model.bias[0].item() == pytest.approx(0.75 - 0.1 * 0.6 / 1.1, rel=1e-6)
    assert engine.steps == 1


def test_a_count_of_steps_that_is_set_is_that_of_the_bias_correction_of_every_bucket() -> None:
    model, engine = engine_of()
    engine.steps = 3
    give(engine, (model.kernel, [[2.0] * 3] * 2), (model.bias, [2.0, 2.0]))
    engine.step(0.1)
    assert engine.steps == 4
    # The fourth step: m = 0.4 of 1 - 0.8^4, v = 0.4 of 1 - 0.9^4.
    update = 0.1 * (0.4 / 0.5904) / (math.sqrt(0.4 / 0.3439) + 0.5)
    assert model.bias.tolist() == pytest.approx([0.75 - update, -4.0 - update], rel=1e-12)
    assert model.kernel[0, 0].item() == pytest.approx(0.975 - update, rel=1e-12)


def test_master_weights_are_not_rounded_with_the_weights() -> None:
    # bf16 has steps of 2^-9 = 0.00195 below 0.75: every update of 0.0002 alone would be lost.
    model, engine = engine_of("bf16", eps=1e-12, weight_decay=0.0)
    for step in range(1, 21):
        give(engine, (model.bias, [1.0, 1.0]))
        engine.step(2e-4)
        master = engine.shards()["model/bias"].tensor
        assert master.dtype == torch.float32
        assert master[0].item() == pytest.approx(0.75 - 2e-4 * step, abs=2e-6)
        assert model.bias.dtype == torch.bfloat16
        assert model.bias[0].item() == torch.tensor(0.75 - 2e-4 * step).bfloat16().item()
    assert model.bias[0].item() == 0.74609375
    assert engine.shards()["adamw/exp_avg/bias"].tensor.dtype == torch.float32


def test_weights_that_are_adopted_become_masters_and_weights() -> None:
    model, engine = engine_of("bf16")
    shards = engine.shards()
    shards["model/bias"].tensor.copy_(torch.tensor([0.123456, 7.0]))
    engine.adopt(shards)
    assert model.bias.tolist() == torch.tensor([0.123456, 7.0]).bfloat16().tolist()
    assert engine.shards()["model/bias"].tensor.tolist() == torch.tensor([0.123456, 7.0]).tolist()


def buckets_of(shapes: dict[str, tuple[int, bool]], numbers: float, *, replicas: int = 1) -> list[list[str]]:
    single = Mesh.single()
    world = Axis("world", replicas, 0, None, single.world.traffic)
    mesh = Mesh(world=world, dp=single.dp, tp=single.tp, edp=single.edp, ep=single.ep)
    named = [
        (name, make_parameter(Placement((size,), ZEROS, decay=decay), single)) for name, (size, decay) in shapes.items()
    ]
    return [[piece.name for piece in bucket.pieces] for bucket in make_buckets(named, mesh, numbers=numbers)]


def test_a_bucket_is_closed_as_soon_as_it_holds_its_numbers() -> None:
    shapes = {"a": (2, False), "b": (5, False), "c": (4, False), "d": (3, False)}
    # From the last: 3 + 4 = 7 are enough for 7 and not for 8.
    assert buckets_of(shapes, 7) == [["d", "c"], ["b", "a"]]
    assert buckets_of(shapes, 8) == [["d", "c", "b"], ["a"]]
    assert buckets_of(shapes, 1) == [["d"], ["c"], ["b"], ["a"]]
    assert buckets_of(shapes, 100) == [["d", "c", "b", "a"]]
    # On 2 replicas 3 and 4 numbers are 2 rows of 2 and of 2 numbers: 4 and 8 with padding.
    assert buckets_of(shapes, 8, replicas=2) == [["d", "c"], ["b", "a"]]
    # Decayed ones stand apart.
    mixed = {"a": (2, True), "b": (5, False), "c": (4, True), "d": (3, False)}
    assert buckets_of(mixed, 6) == [["d", "b"], ["c", "a"]]


def test_the_size_of_a_bucket_is_in_megabytes_of_the_sums() -> None:
    # 8 numbers of 8 bytes in two kinds: a kernel of 48 bytes and a bias of 16.
    small = small_run("fp64")
    for megabytes, count in ((47e-6, 3), (48e-6, 3), (49e-6, 2)):
        model = nn.Module()
        model.a = make_parameter(Placement((2,), ZEROS), Mesh.single())
        model.b = make_parameter(Placement((4,), ZEROS), Mesh.single())
        model.c = make_parameter(Placement((2,), ZEROS), Mesh.single())
        model.d = make_parameter(Placement((6,), ZEROS, decay=True), Mesh.single())
        parallel = small.parallel.model_copy(update={"bucket_mb": megabytes})
        for parameter in model.parameters():
            parameter.data = parameter.data.double().zero_()
        engine = NativeEngine(model, small.model_copy(update={"parallel": parallel}), Mesh.single())
        # d alone; c and b are 6 numbers, 48 bytes; then a.
        assert len(engine.buckets) == count
