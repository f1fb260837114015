from __future__ import annotations

import math

import pytest

from limoe_dist.config.schema import Optim
from limoe_dist.optim.schedule import learning_rate

OPTIM = Optim(lr=1.0, warmup_steps=9, timescale=100, cooldown_steps=50)


def test_the_rate_rises_in_a_line_to_the_peak() -> None:
    rates = [learning_rate(step, optim=OPTIM, steps=1000) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_after_the_warm_up_it_falls_with_the_root_of_time() -> None:
    # 300 steps after the warm-up of timescale 100: 1 / sqrt(1 + 3).
    assert learning_rate(309, optim=OPTIM, steps=1000) == pytest.approx(0.5)


def test_the_cooldown_leads_to_zero_after_the_last_step() -> None:
    assert learning_rate(975, optim=OPTIM, steps=1000) == pytest.approx(0.5 / math.sqrt(1 + 966 / 100))
    assert learning_rate(999, optim=OPTIM, steps=1000) == pytest.approx(0.02 / math.sqrt(1 + 990 / 100))
    assert learning_rate(1000, optim=OPTIM, steps=1000) == 0


def test_without_a_cooldown_nothing_bends_at_the_end() -> None:
    plain = OPTIM.model_copy(update={"cooldown_steps": 0})
    assert learning_rate(999, optim=plain, steps=1000) == pytest.approx(1 / math.sqrt(1 + 990 / 100))
