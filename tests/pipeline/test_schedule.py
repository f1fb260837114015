"""The learning rate at every kind of step, by hand, alone and as the rate of a training step."""

from __future__ import annotations

import math

import pytest
import torch

from limoe_dist.config.schema import Optim
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.optim.schedule import learning_rate
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.step import Examples, training_step
from tests.support.cases import batch, small_run

SHAPE = {"lr": 2.0, "warmup_steps": 4, "timescale": 5, "cooldown_steps": 3}
STEPS = 12
BY_HAND = {
    # 2 * (t + 1) / 5
    0: 0.4,
    1: 0.8,
    3: 1.6,
    # 2 / sqrt(1 + (t - 4) / 5)
    4: 2.0,
    5: 2 / math.sqrt(1.2),
    8: 2 / math.sqrt(1.8),
    # times 3 / 3, 2 / 3, 1 / 3
    9: 2 / math.sqrt(2.0),
    10: 2 / math.sqrt(2.2) * 2 / 3,
    11: 2 / math.sqrt(2.4) / 3,
    12: 0.0,
}


@pytest.mark.parametrize("step", BY_HAND)
def test_each_step_has_the_rate_that_was_worked_out_by_hand(step: int) -> None:
    assert learning_rate(step, optim=Optim(**SHAPE), steps=STEPS) == pytest.approx(BY_HAND[step], rel=1e-14)


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    optim = Optim(**SHAPE | {"warmup_steps": 0})
    found = [learning_rate(step, optim=optim, steps=STEPS) for step in (0, 1, 5, 9, 11)]
    wanted = [2.0, 2 / math.sqrt(1.2), math.sqrt(2), 2 / math.sqrt(2.8), 2 / math.sqrt(3.2) / 3]
    assert found == pytest.approx(wanted, rel=1e-14)


def test_without_a_cooldown_the_last_step_has_the_rate_of_its_age() -> None:
    optim = Optim(**SHAPE | {"cooldown_steps": 0})
    assert learning_rate(11, optim=optim, steps=STEPS) == pytest.approx(2 / math.sqrt(2.4), rel=1e-14)
    assert learning_rate(12, optim=optim, steps=STEPS) == pytest.approx(2 / math.sqrt(2.6), rel=1e-14)


def test_a_cooldown_as_long_as_the_run_scales_the_warm_up_too() -> None:
    optim = Optim(**SHAPE | {"cooldown_steps": 12})
    found = [learning_rate(step, optim=optim, steps=STEPS) for step in (0, 2, 4)]
    assert found == pytest.approx([0.4, 1.2 * 10 / 12, 2 * 8 / 12], rel=1e-14)


@pytest.mark.parametrize("step", [0, 3, 4, 11])
def test_a_training_step_uses_the_rate_of_its_own_number(step: int) -> None:
    small = small_run("fp64", steps=STEPS)
    optim = small.optim.model_copy(update=SHAPE | {"lr": 2e-3, "weight_decay": 0.0, "eps": 1e-30, "clip_norm": 1e9})
    run = small.model_copy(
        update={
            "model": small.model.model_copy(update={"depth": 1}),
            "moe": small.moe.model_copy(update={"blocks": ()}),
            "optim": optim,
        }
    )
    model = build_model(run, mesh=Mesh.single(), device=torch.device("cpu"))
    engine = make_engine(model, run, Mesh.single())
    before = model.log_scale.item()
    result = training_step(model, engine, Examples(*batch(step, torch.float64)), step=step, run=run, mesh=Mesh.single())
    assert result.rate == pytest.approx(BY_HAND[step] / 1000, rel=1e-14)
    # The first update of AdamW is the rate, whatever the gradient's size.
    assert abs(model.log_scale.item() - before) == pytest.approx(BY_HAND[step] / 1000, rel=1e-9)
