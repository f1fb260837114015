"""Tokens into the experts' buffers and back, by index.

Shapes: T tokens, K choices, R = E * G * C rows of all buffers, D width.
Each row belongs to at most one (token, choice) and each kept (token, choice) to one row, so both directions, and both
their gradients, are plain gathers: no atomic additions, the same bits on every run, and no (T, E, C) one-hot tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotIndex:
    """Where each kept choice sits in the buffers, and who sits in each row."""

    row_TK: Tensor
    """(T, K) int64: the row of a choice; 0 where it was dropped."""
    kept_TK: Tensor
    """(T, K) bool."""
    choice_R: Tensor
    """(R,) int64: token * K + choice in each row; 0 where the row is empty."""
    used_R: Tensor
    """(R,) bool."""

    @property
    def token_R(self) -> Tensor:
        return self.choice_R // self.row_TK.shape[1]


def index_slots(
    expert_GSK: Tensor, slot_GSK: Tensor, kept_GSK: Tensor, token_GS: Tensor, *, num_experts: int, capacity: int
) -> SlotIndex:
    """The index of a routing decision. Rows are ordered (expert, group, slot), as the experts take them.

    token_GS: (G, S) int64, the number of each token in the flat (T, D) layout of the model; a permutation of 0..T-1.
    """
    groups, _, k = expert_GSK.shape
    num_tokens, num_rows = token_GS.numel(), num_experts * groups * capacity
    group_G = torch.arange(groups, device=expert_GSK.device)[:, None, None]
    row_GSK = (expert_GSK * groups + group_G) * capacity + slot_GSK
    # One row beyond the buffers takes what was dropped, and is cut off again.
    row_GSK = row_GSK.masked_fill(~kept_GSK, num_rows)
    choice_GSK = token_GS[..., None] * k + torch.arange(k, device=expert_GSK.device)
    row_of_choice = torch.empty(num_tokens * k, dtype=torch.int64, device=expert_GSK.device)
    row_of_choice[choice_GSK.flatten()] = row_GSK.flatten()
    choice_of_row = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=expert_GSK.device)
    choice_of_row[row_GSK.flatten()] = choice_GSK.flatten()
    row_TK, choice_R = row_of_choice.view(num_tokens, k), choice_of_row[:-1]
    kept_TK, used_R = row_TK < num_rows, choice_R >= 0
    return SlotIndex(row_TK.masked_fill(~kept_TK, 0), kept_TK, choice_R.clamp_(min=0), used_R)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, index: SlotIndex) -> Tensor:
        ctx.index = index
        # Filled, not multiplied: a NaN in the token that stands in for "nobody" must not reach every empty row.
        return x_TD.index_select(0, index.token_R).masked_fill_(~index.used_R[:, None], 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        index: SlotIndex = ctx.index
        return _sum_choices(grads[0], index, None), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer_RD: Tensor, weight_TK: Tensor, index: SlotIndex) -> Tensor:
        ctx.index = index
        ctx.save_for_backward(buffer_RD, weight_TK)
        return _sum_choices(buffer_RD, index, weight_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        index: SlotIndex = ctx.index
        buffer_RD, weight_TK = ctx.saved_tensors
        (grad_TD,) = grads
        weight_R1 = weight_TK.flatten()[index.choice_R][:, None]
        grad_buffer_RD = (grad_TD.index_select(0, index.token_R) * weight_R1).to(buffer_RD.dtype)
        grad_buffer_RD.masked_fill_(~index.used_R[:, None], 0)
        grad_weight = [
            (buffer_RD.index_select(0, index.row_TK[:, choice]).to(weight_TK.dtype) * grad_TD).sum(-1)
            for choice in range(weight_TK.shape[1])
        ]
        return grad_buffer_RD, torch.stack(grad_weight, dim=-1).masked_fill_(~index.kept_TK, 0), None


def _sum_choices(buffer_RD: Tensor, index: SlotIndex, weight_TK: Tensor | None) -> Tensor:
    """(T, D): the (weighted) sum over the kept choices of each token, added in the order of the choices."""
    total_TD: Tensor | None = None
    for choice in range(index.row_TK.shape[1]):
        part_TD = buffer_RD.index_select(0, index.row_TK[:, choice])
        if weight_TK is not None:
            part_TD = part_TD * weight_TK[:, choice, None]
        part_TD.masked_fill_(~index.kept_TK[:, choice, None], 0)
        total_TD = part_TD if total_TD is None else total_TD + part_TD
    assert total_TD is not None
    return total_TD.to(buffer_RD.dtype)


def dispatch(x_TD: Tensor, index: SlotIndex) -> Tensor:
    """(R, D): every kept choice's token in its row; empty rows are zero."""
    return _Dispatch.apply(x_TD, index)  # type: ignore[no-any-return]


def combine(buffer_RD: Tensor, weight_TK: Tensor, index: SlotIndex) -> Tensor:
    """(T, D): for each token the sum over its kept choices of weight times row; zero where all were dropped.

    weight_TK: (T, K), the gates of the choices, float32 where the buffers are bfloat16.
    """
    return _Combine.apply(buffer_RD, weight_TK, index)  # type: ignore[no-any-return]
