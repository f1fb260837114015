"""Who stands among the first k, by dot products in blocks of rows, and how often a right answer is among them.

Shapes: Q queries, K keys, P embedding width, k places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24
"""Scores that are held at a time: 64 MB in float32."""


def first_places(score_QK: Tensor, k: int) -> Tensor:
    """(Q, min(k, K)) int64: the keys with the largest scores, best first; of equal ones the one with the lower number.

    torch.topk leaves open which of equal scores it takes, so that results could differ between machines.
    """
    score_QK = score_QK.clone()
    places = []
    for _ in range(min(k, score_QK.shape[1])):
        # argmax: documented to be the first of equal ones.
        place_Q1 = score_QK.argmax(1, keepdim=True)
        places.append(place_Q1)
        score_QK.scatter_(1, place_Q1, -math.inf)
    return torch.cat(places, dim=1)


def nearest_keys(query_QP: Tensor, key_KP: Tensor, k: int) -> Tensor:
    """(Q, min(k, K)) int64: the keys with the largest dot products with each query, best first."""
    block = max(1, BLOCK_ELEMENTS // len(key_KP))
    return torch.cat([first_places(query_bP @ key_KP.T, k) for query_bP in query_QP.split(block)])


def hit_fracs(place_Qk: Tensor, query_label_Q: Tensor, key_label_K: Tensor, counts: Sequence[int]) -> list[float]:
    """For each count: the share of queries that have a key of their own label among their first so many places."""
    right_Qk = key_label_K[place_Qk] == query_label_Q[:, None]
    return [right_Qk[:, :count].any(1).double().mean().item() for count in counts]


def linked_fracs(place_Qk: Tensor, link_L2: Tensor, counts: Sequence[int]) -> list[float]:
    """For each count: the share of queries that have a key linked to them among their first so many places.

    link_L2: (L, 2) int64, a query and a key that is right for it.
    """
    # A pair of numbers as one number, so that it can be looked up.
    factor = int(torch.cat([place_Qk.flatten(), link_L2[:, 1]]).max()) + 1
    query_Q1 = torch.arange(len(place_Qk), device=place_Qk.device)[:, None]
    right_Qk = torch.isin(query_Q1 * factor + place_Qk, link_L2[:, 0] * factor + link_L2[:, 1])
    return [right_Qk[:, :count].any(1).double().mean().item() for count in counts]


def chance_frac(keys: int, right: int, count: int) -> float:
    """How often at least one of `right` keys is among the first `count` of `keys` keys in random order."""
    count = min(count, keys)
    return 1 - math.comb(keys - right, count) / math.comb(keys, count)


def evenly_spread(count: int, *, most: int = 24) -> list[int]:
    """Up to `most` of the numbers 0 to count - 1, evenly spread: the examples that a result shows."""
    most = min(count, most)
    return [i * count // most for i in range(most)]
