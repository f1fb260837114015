"""The learning rate of a step: linear warm-up, reciprocal square root, linear cooldown to 0 (big_vision's rsqrt)."""

from __future__ import annotations

import math

from limoe_dist.config.schema import Optim


def learning_rate(step: int, *, optim: Optim, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `steps`; the step after the last one would have rate 0.

    lr / sqrt(1 + (step - warmup) / timescale) after the warm-up, times min(1, (steps - step) / cooldown).
    Source: limoe.md, section 4; big_vision multiplies the running rsqrt by the cooldown.
    """
    if step < optim.warmup_steps:
        rate = optim.lr * (step + 1) / (optim.warmup_steps + 1)
    else:
        rate = optim.lr / math.sqrt(1 + (step - optim.warmup_steps) / optim.timescale)
    if optim.cooldown_steps:
        rate *= min(1.0, (steps - step) / optim.cooldown_steps)
    return rate
