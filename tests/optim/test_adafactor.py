"""Adafactor against vmoe's numbers and against arithmetic on paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from limoe_dist.config.schema import Optim
from limoe_dist.optim.adafactor import Adafactor
from limoe_dist.optim.schedule import learning_rate
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.pieces import make_buckets
from limoe_dist.parallel.placement import ZEROS, Placement, make_parameter
from tests.golden.load import arrays

GOLDEN = arrays("optimizer")
PEAK, STEPS = 1e-2, 6
# Exponent 1 makes the decays of the second moment 0, 1/2, 2/3: numbers for paper.
PLAIN = Optim(lr=1.0, beta1=0.9, decay_exponent=1.0, min_factored_dim=2, weight_decay=0.0)


class Held:
    """Parameters in one process, with gradients set by hand."""

    def __init__(self, values: Mapping[str, Tensor], placements: Mapping[str, Placement], optim: Optim) -> None:
        mesh = Mesh.single()
        parameters = [(name, make_parameter(placements[name], mesh)) for name in values]
        dtype = next(iter(values.values())).dtype
        self.buckets = make_buckets(parameters, mesh, numbers=100)
        self.weights = [torch.zeros(bucket.length, dtype=dtype) for bucket in self.buckets]
        self.grads = [torch.zeros_like(weight) for weight in self.weights]
        self.fill(self.weights, values)
        self.rule = Adafactor(self.buckets, self.weights, self.grads, optim)

    def views(self, flats: list[Tensor]) -> dict[str, Tensor]:
        return {
            piece.name: view
            for bucket, flat in zip(self.buckets, flats, strict=True)
            for piece, view in zip(bucket.pieces, bucket.views(flat), strict=True)
        }

    def fill(self, flats: list[Tensor], values: Mapping[str, Tensor]) -> None:
        for name, view in self.views(flats).items():
            view.copy_(values[name])

    def step(self, gradients: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
        """The weights after a step."""
        self.fill(self.grads, gradients)
        self.rule.step(rate)
        return self.views(self.weights)

    def state(self) -> dict[str, Tensor]:
        return {name: shard.tensor for name, shard in self.rule.shards().items()}


def alone(value: Tensor, *, optim: Optim, stacked: int = 0, decay: bool = False) -> Held:
    """One parameter, named w."""
    return Held({"w": value}, {"w": Placement(tuple(value.shape), ZEROS, stacked=stacked, decay=decay)}, optim)


def vmoe_rate(step: int, *, optim: Optim, warmup_steps: int, steps: int) -> float:
    """vmoe's rate, put together from ours.

    Its warm-up starts with a step of rate 0, ours is one step ahead of it. Its cooldown goes down in a line from the
    rate at its start, where ours multiplies the line with the falling rate.
    """
    if step == 0:
        return 0.0
    ahead = optim.model_copy(update={"warmup_steps": warmup_steps - 1, "cooldown_steps": 0})
    start = steps - optim.cooldown_steps
    line = min(1.0, (steps - step) / optim.cooldown_steps)
    return line * learning_rate(min(step, start) - 1, optim=ahead, steps=steps)


def golden_values(prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): torch.tensor(value, dtype=dtype)
        for key, value in GOLDEN.items()
        if key.startswith(prefix)
    }


def schedules() -> tuple[list[float], np.ndarray]:
    """(ours, vmoe's): the rates of steps 0 to 1000."""
    optim = Optim(lr=1e-3, timescale=100, cooldown_steps=200)
    return [vmoe_rate(step, optim=optim, warmup_steps=100, steps=1000) for step in range(1001)], GOLDEN["sched_a"]


def test_the_schedule_is_vmoes_one_step_ahead_until_the_cooldown() -> None:
    # The golden rates are sums and products in float32.
    np.testing.assert_allclose(*schedules(), rtol=1e-5, atol=1e-10)


def six_steps(dtype: torch.dtype) -> Iterator[tuple[Held, dict[str, Tensor], dict[str, Tensor]]]:
    """After each step: what holds our parameters, the parameters themselves, vmoe's."""
    optim = Optim(lr=PEAK, timescale=10, cooldown_steps=2, min_factored_dim=32, weight_decay=0.1)
    start = golden_values("p0/", dtype)
    placements = {
        name: Placement(tuple(value.shape), ZEROS, decay=name.endswith("kernel"), stacked=int("Moe" in name))
        for name, value in start.items()
    }
    held = Held(start, placements, optim)
    for step in range(STEPS):
        gradients = golden_values(f"g{step}/", dtype)
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        clipped = {name: gradient / max(1.0, norm) for name, gradient in gradients.items()}
        found = held.step(clipped, vmoe_rate(step, optim=optim, warmup_steps=2, steps=STEPS))
        found = {name: value.clone() for name, value in found.items()}
        yield held, found, golden_values(f"adafactor/p{step + 1}/", dtype)


# float32 rounds a weight of about 4 by 2e-7 at each step, and the numbers were computed in float32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_six_steps_are_vmoes(dtype: torch.dtype) -> None:
    steps = list(six_steps(dtype))
    assert len(steps) == STEPS
    for step, (_, found, want) in enumerate(steps):
        assert found.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=f"{name} after step {step}")
    held, _, _ = steps[-1]
    assert {name for name in held.state() if "/row/" in name} == {
        "adafactor/row/dense/kernel",
        "adafactor/row/Moe/Mlp/kernel",
    }
    # Four experts, 36 rows; the longest dim, 40, is averaged away.
    assert held.state()["adafactor/row/Moe/Mlp/kernel"].shape == (4, 36)
    assert held.state()["adafactor/column/Moe/Mlp/kernel"].shape == (4, 40)


def test_two_steps_of_a_matrix_by_hand() -> None:
    held = alone(torch.ones(2, 2, dtype=torch.float64), optim=PLAIN)
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    # Squares 1 4 / 9 16: rows 5/2 and 25/2, columns 5 and 10, all 15/2; so second moments 5/3 10/3 / 25/3 50/3.
    first = torch.tensor([[0.6**0.5, 2 * 0.3**0.5], [3 * 0.12**0.5, 4 * 0.06**0.5]], dtype=torch.float64)
    after = held.step({"w": gradient}, 0.5)["w"]
    torch.testing.assert_close(after, 1 - 0.5 * 0.1 * first, rtol=0, atol=1e-15)
    # Squares of 1 with half of what was: rows 7/4 and 27/4, columns 3 and 11/2, all 17/4.
    second = torch.tensor([[5.25, 9.625], [20.25, 37.125]], dtype=torch.float64).div(4.25).rsqrt()
    after = held.step({"w": torch.ones_like(gradient)}, 1.0)["w"]
    torch.testing.assert_close(after, 1 - 0.05 * first - 0.09 * first - 0.1 * second, rtol=0, atol=1e-15)
    assert held.state()["adafactor/row/w"].tolist() == [1.75, 6.75]
    assert held.state()["adafactor/column/w"].tolist() == [3.0, 5.5]


@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors_and_scalars_keep_every_second_moment(shape: tuple[int, ...]) -> None:
    held = alone(torch.zeros(shape, dtype=torch.float64), optim=PLAIN.model_copy(update={"max_decay": 0.6}))
    # Decays 0, 1/2 and 3/5, where 2/3 is more than max_decay: 16, then (16 + 0) / 2, then 3/5 of 8 + 2/5 of 1.
    for gradient, second in [(4.0, 16.0), (0.0, 8.0), (-1.0, 5.2)]:
        after = held.step({"w": torch.full(shape, gradient)}, 1.0)["w"]
        want = torch.full(shape, second, dtype=torch.float64)
        torch.testing.assert_close(held.state()["adafactor/second/w"], want, rtol=0, atol=1e-14)
    # Updates 1, 0 and -1 / sqrt(5.2); momenta 0.1, 0.09 and 0.081 less a tenth of the last.
    want = torch.full(shape, -0.1 - 0.09 - 0.081 + 0.1 / math.sqrt(5.2), dtype=torch.float64)
    torch.testing.assert_close(after, want, rtol=0, atol=1e-15)
    assert held.state().keys() == {"adafactor/momentum/w", "adafactor/second/w"}


def test_decay_is_times_the_rate_and_for_kernels_alone() -> None:
    optim = PLAIN.model_copy(update={"lr": 1e-3, "weight_decay": 0.2})
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    for decay, want in [(True, 3 * (1 - 0.5 * 0.2)), (False, 3.0)]:
        held = alone(nothing + 3, optim=optim, decay=decay)
        # Without a gradient there is no momentum, and no 0 / 0.
        assert held.step({"w": nothing}, 0.5)["w"].tolist() == [[want] * 2] * 2


@pytest.mark.parametrize(
    ("shape", "row", "column"),
    [
        ((6, 4), (4,), (6,)),
        ((4, 6), (4,), (6,)),
        ((5, 3, 6), (5, 3), (3, 6)),
        ((5, 6, 3), (5, 3), (6, 3)),
        ((4, 5, 6), (4, 5), (4, 6)),
        ((3, 6), None, None),
        ((24,), None, None),
    ],
)
def test_the_longest_two_dims_are_factored_where_both_are_long_enough(
    shape: tuple[int, ...], row: tuple[int, ...] | None, column: tuple[int, ...] | None
) -> None:
    state = alone(torch.zeros(shape), optim=PLAIN.model_copy(update={"min_factored_dim": 4})).state()
    shapes = {name.split("/")[1]: tuple(tensor.shape) for name, tensor in state.items()}
    factored = {"row": row, "column": column} if row else {"second": shape}
    assert shapes == {"momentum": shape, **factored}


@pytest.mark.parametrize("shape", [(8, 5, 6), (3, 2, 6, 5)])
def test_stacked_tensors_train_as_if_each_were_alone(shape: tuple[int, ...]) -> None:
    # 8 experts are more than either dim of one; q, k and v have 2 heads.
    optim = PLAIN.model_copy(update={"min_factored_dim": 4})
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    together = alone(values[0], optim=optim, stacked=1)
    apart = [alone(value, optim=optim) for value in values[0]]
    for gradient in values[1:]:
        after = together.step({"w": gradient}, 0.1)["w"]
        want = torch.stack([held.step({"w": part}, 0.1)["w"] for held, part in zip(apart, gradient, strict=True)])
        torch.testing.assert_close(after, want, rtol=0, atol=1e-14)
    for name, tensor in together.state().items():
        torch.testing.assert_close(tensor, torch.stack([held.state()[name] for held in apart]), rtol=0, atol=1e-14)


def test_a_run_goes_on_from_its_shards_as_if_never_interrupted() -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {"kernel": (5, 6), "bias": (6,), "scale": ()}
    placements = {name: Placement(shape, ZEROS, decay=name == "kernel") for name, shape in shapes.items()}
    rounds = [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(4)
    ]
    held = Held(rounds[0], placements, PLAIN)
    for gradients in rounds[1:3]:
        held.step(gradients, 0.1)
    resumed = Held(held.views(held.weights), placements, PLAIN)
    for name, tensor in resumed.state().items():
        tensor.copy_(held.state()[name])
    assert (held.rule.steps, resumed.rule.steps) == (2, 0)
    resumed.rule.steps = 2
    want = {name: value.clone() for name, value in held.step(rounds[3], 0.1).items()}
    for name, value in resumed.step(rounds[3], 0.1).items():
        assert value.equal(want[name]), name
    assert all(tensor.equal(held.state()[name]) for name, tensor in resumed.state().items())
