"""The update of all weights: schedule, global norm, clipping, AdamW and big_vision's Adafactor.

Source: AdamW (arXiv 1711.05101), algorithm 2; Adafactor (arXiv 1804.04235) in the variant of arXiv 2106.04560.
"""

from __future__ import annotations

import math

import numpy as np

KERNELS = ("projection", "image_embed.weight", "qkv_weight", "out.weight", "up.weight", "down.weight", "router")
EXPERT_KERNELS = ("up_weight", "down_weight")


def decays(name: str) -> bool:
    """Whether weight decay applies: to kernels only."""
    return name.endswith(KERNELS + EXPERT_KERNELS)


def learning_rate(step: int, optim, steps: int) -> float:
    """Rate of a step, from 0: linear warm-up, reciprocal square root, linear cooldown to 0."""
    if step < optim.warmup_steps:
        rate = optim.lr * (step + 1) / (optim.warmup_steps + 1)
    else:
        rate = optim.lr / math.sqrt(1 + (step - optim.warmup_steps) / optim.timescale)
    if optim.cooldown_steps:
        rate *= min(1, (steps - step) / optim.cooldown_steps)
    return rate


def global_norm(gradients) -> float:
    return math.sqrt(sum(float(np.sum(gradient**2)) for gradient in gradients.values()))


def clipped(gradients, norm: float, limit: float):
    """All gradients scaled down so that their global norm is at most `limit`."""
    factor = min(1, limit / max(norm, 1e-12))
    return {name: gradient * factor for name, gradient in gradients.items()}


class AdamW:
    def __init__(self, optim, weights):
        self.optim = optim
        self.first = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: np.zeros_like(weight) for name, weight in weights.items()}

    def update(self, name, weight, gradient, rate: float, step: int):
        """The new weight; `step` counts from 0."""
        beta1, beta2 = self.optim.beta1, self.optim.beta2
        self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradient
        self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradient**2
        first = self.first[name] / (1 - beta1 ** (step + 1))
        second = self.second[name] / (1 - beta2 ** (step + 1))
        decay = self.optim.weight_decay if decays(name) else 0
        return weight - rate * decay * weight - rate * first / (np.sqrt(second) + self.optim.eps)


def stacked_dims(name: str, weight) -> int:
    """Leading dims that only put tensors together: q, k and v; the experts of a block; the two routers."""
    if "qkv" in name or ".experts." in name:
        return 1
    return 1 if name.endswith("router") and weight.ndim == 3 else 0


class Adafactor:
    def __init__(self, optim, weights):
        self.optim = optim
        self.momentum = {name: np.zeros_like(weight) for name, weight in weights.items()}
        self.averages = {name: [0.0, 0.0] for name in weights}

    def update(self, name, weight, gradient, rate: float, step: int):
        optim, squares = self.optim, gradient**2 + 1e-30
        decay = min(optim.max_decay, 1 - (step + 1) ** -optim.decay_exponent)
        stacked = stacked_dims(name, weight)
        # The two longest dims of each matrix; of equal ones the later counts as longer.
        dims = sorted(range(stacked, weight.ndim), key=lambda dim: weight.shape[dim])[-2:]
        if len(dims) == 2 and weight.shape[dims[0]] >= optim.min_factored_dim:
            shorter, longer = dims
            row, column = np.mean(squares, axis=longer, keepdims=True), np.mean(squares, axis=shorter, keepdims=True)
            row, column = self._averaged(name, decay, row, column)
            second = row * column / np.mean(row, axis=shorter, keepdims=True)
        else:
            (second, _) = self._averaged(name, decay, squares, 0.0)
        self.momentum[name] = optim.beta1 * self.momentum[name] + (1 - optim.beta1) * gradient / np.sqrt(second)
        weight_decay = optim.weight_decay if decays(name) else 0
        return weight - rate * (self.momentum[name] + weight_decay * weight)

    def _averaged(self, name, decay, *new):
        """The exponential averages with this step's values taken in."""
        before = self.averages[name]
        self.averages[name] = [decay * old + (1 - decay) * one for old, one in zip(before, new, strict=True)]
        return self.averages[name]
