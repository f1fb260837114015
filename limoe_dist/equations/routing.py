"""Which expert serves which token: gates, capacity, order of service, slots.

Shapes: G routing groups, S tokens of a group, E experts, K choices of a token, C slots of an expert in a group.
Selection is not differentiable; gradients reach the router through the combine weights and the auxiliary losses.
Source: LIMoE (arXiv 2206.02770), section 2.2; V-MoE (arXiv 2106.05974) for batch priority routing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def capacity(num_tokens: int, *, num_experts: int, k: int, factor: float, multiple: int = 4) -> int:
    """Slots of each expert for one group of `num_tokens` tokens: ceil(S K factor / E), rounded up to `multiple`.

    S = 212, E = 8, factor 1 gives 27 and, rounded up, 28. Masked padding counts as tokens, so that C is static.
    """
    # The product may exceed a whole number by its last bit: 50 * 1.1 is 55.00000000000001, not a 56th slot.
    slots = math.ceil(round(num_tokens * k * factor / num_experts, 9))
    return max(1, math.ceil(slots / multiple)) * multiple


@dataclass(frozen=True)
class Choices:
    """The K experts of each token, the best one first."""

    expert_GSK: Tensor
    """(G, S, K) int64."""
    weight_GSK: Tensor
    """(G, S, K): the gates of those experts, not normalised again; differentiable."""


def top_k(gates_GSE: Tensor, k: int, allowed: Tensor | None = None) -> Choices:
    """The k largest gates of every token; a tie goes to the lowest expert id, on every device.

    allowed: (E,) or (S, E) bool, the experts that may be chosen, at least k of them; None for all.
    Source: LIMoE, section 2.2: MoE(x) sums g(x)_e MLP_e(x) over the chosen experts, with the gate itself as weight.
    """
    offered_GSE = gates_GSE.detach()
    if allowed is not None:
        # Below 0: a gate that underflowed to it is still allowed.
        offered_GSE = offered_GSE.masked_fill(~allowed, -1.0)
    # argmax returns the first of equal values; torch.topk promises nothing about ties, a stable sort does.
    if k == 1:
        expert_GSK = offered_GSE.argmax(-1, keepdim=True)
    else:
        expert_GSK = offered_GSE.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return Choices(expert_GSK, gates_GSE.gather(-1, expert_GSK))


def priorities(weight_GSK: Tensor, by: Literal["max", "sum"]) -> Tensor:
    """(G, S): how early a token is served in batch priority routing, the larger the earlier.

    max: its largest gate (V-MoE's code). sum: the sum of its K chosen gates (V-MoE's paper, section 4.1). For K = 1
    they are the same.
    """
    weight_GSK = weight_GSK.detach()
    return weight_GSK[..., 0] if by == "max" else weight_GSK.sum(-1)


def service_order(priority_GS: Tensor, valid_GS: Tensor | None = None) -> Tensor:
    """(G, S) int64: the tokens of each group in the order in which they ask for slots, the highest priority first.

    Equal priorities: as they stand in the group. Batch priority routing sorts by `priorities`, over both modalities
    together, in training and in evaluation (LIMoE, section 2.2.3); the baselines of Figure 6 by other numbers: equal
    ones (first come), a modality's, random ones. Tokens that are not valid come last.
    """
    priority_GS = priority_GS.detach()
    if valid_GS is not None:
        priority_GS = priority_GS.masked_fill(~valid_GS, -math.inf)
    return priority_GS.argsort(dim=-1, descending=True, stable=True)


def slots(expert_GSK: Tensor, order_GS: Tensor, valid_GS: Tensor | None = None, *, num_experts: int) -> Tensor:
    """(G, S, K) int64: the number of earlier requests for the same expert, so a request is kept where slot < C.

    All first choices are served before any second choice, each in the order of service; a full expert goes on
    counting. Tokens that are not valid ask for nothing; their slots count from 0 in a queue of their own.
    Source: V-MoE, appendix C (Algorithm 1 and batch priority routing).
    """
    groups, tokens, k = expert_GSK.shape
    if valid_GS is not None:
        expert_GSK = expert_GSK.masked_fill(~valid_GS[..., None], num_experts)
    place_GS = order_GS[..., None].expand(groups, tokens, k)
    # Requests in the order of service: choice rank first, then token.
    request_GR = expert_GSK.gather(1, place_GS).transpose(1, 2).reshape(groups, k * tokens)
    # A stable sort by expert keeps that order inside each expert: the slot is the distance to the expert's first one.
    sorted_GR, rank_GR = request_GR.sort(dim=-1, stable=True)
    load_GE = torch.zeros(groups, num_experts + 1, dtype=torch.int64, device=expert_GSK.device)
    load_GE.scatter_add_(1, request_GR, torch.ones_like(request_GR))
    first_GE = load_GE.cumsum(-1) - load_GE
    slot_sorted_GR = torch.arange(k * tokens, device=expert_GSK.device) - first_GE.gather(1, sorted_GR)
    slot_GR = torch.empty_like(slot_sorted_GR).scatter_(1, rank_GR, slot_sorted_GR)
    slot_GSK = slot_GR.view(groups, k, tokens).transpose(1, 2)
    return torch.empty_like(expert_GSK).scatter_(1, place_GS, slot_GSK)


def kept(slot_GSK: Tensor, valid_GS: Tensor | None, *, capacity: int) -> Tensor:
    """(G, S, K) bool: the requests that got a slot. The others are dropped: expert output 0, the residual remains."""
    kept_GSK = slot_GSK < capacity
    return kept_GSK if valid_GS is None else kept_GSK & valid_GS[..., None]
