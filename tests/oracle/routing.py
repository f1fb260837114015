"""Routing of one group of tokens: capacity, choices, order of service and slots, one token after the other.

Decisions are not differentiable; they are computed from plain numbers.
Shapes: S tokens of a group, E experts, K choices of a token.
Source: LIMoE (arXiv 2206.02770), section 2.2; V-MoE (arXiv 2106.05974), appendix C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def capacity(tokens: int, moe, factor: float) -> int:
    """Slots of an expert in a group: ceil(S K factor / E), rounded up to a multiple."""
    slots = math.ceil(round(tokens * moe.top_k * factor / moe.num_experts, 9))
    return math.ceil(slots / moe.capacity_multiple) * moe.capacity_multiple


@dataclass(frozen=True)
class Decision:
    expert_SK: np.ndarray
    kept_SK: np.ndarray
    order_S: np.ndarray
    """Token numbers in the order of service."""


def choose(gates_S: np.ndarray, allowed_E: np.ndarray, k: int) -> list[int]:
    """The k allowed experts with the largest gates of one token, best first; of equal gates the lowest expert."""
    return sorted(np.flatnonzero(allowed_E), key=lambda expert: (-gates_S[expert], expert))[:k]


def service_order(moe, chosen_gates_SK, is_text_S, uniform_S, valid_S) -> np.ndarray:
    """Token numbers in the order in which they ask for slots; masked tokens come last."""
    tokens = range(len(is_text_S))
    if moe.order == "priority":
        worth = chosen_gates_SK.max(1) if moe.priority == "max" else chosen_gates_SK.sum(1)
    elif moe.order == "random":
        worth = uniform_S
    elif moe.order == "text_first":
        worth = is_text_S.astype(float)
    else:  # images_first: they stand first already
        worth = np.zeros(len(tokens))
    worth = np.where(valid_S, worth, -np.inf)
    return np.array(sorted(tokens, key=lambda token: (-worth[token], token)))


def decide(moe, gates_SE, allowed_SE, is_text_S, uniform_S, valid_S, slots: int | None) -> Decision:
    """Who is served by which expert. slots: capacity of each expert; None where nothing is dropped."""
    tokens, k = len(gates_SE), moe.top_k
    expert_SK = np.array([choose(gates_SE[token], allowed_SE[token], k) for token in range(tokens)])
    chosen_gates_SK = np.take_along_axis(gates_SE, expert_SK, axis=1)
    order_S = service_order(moe, chosen_gates_SK, is_text_S, uniform_S, valid_S)
    kept_SK, taken_E = np.zeros((tokens, k), dtype=bool), np.zeros(moe.num_experts, dtype=int)
    for choice in range(k):  # all first choices come before any second choice
        for token in order_S:
            if valid_S[token]:
                expert = expert_SK[token, choice]
                kept_SK[token, choice] = slots is None or taken_E[expert] < slots
                taken_E[expert] += 1
    return Decision(expert_SK, kept_SK, order_S)
