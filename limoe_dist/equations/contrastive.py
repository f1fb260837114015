"""The contrastive loss: this rank's rows against everybody's columns.

Shapes: b local pairs, B pairs of the global batch, P embedding width, C columns of the logits in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Contrastive:
    loss: Tensor
    """This rank's share of the loss: the sum of the shares of all ranks is the loss of the global batch, in nats."""
    correct: Tensor
    """(2,) float: how many of the local images find their text first, and how many local texts their image."""


def normalize(embedding_bP: Tensor) -> Tensor:
    """Rows divided by their length plus 1e-8, as in big_vision's two_towers."""
    length_b1: Tensor = torch.linalg.vector_norm(embedding_bP, dim=-1, keepdim=True)
    return embedding_bP / (length_b1 + 1e-8)


def contrastive_loss(
    image_bP: Tensor,
    text_bP: Tensor,
    all_image_BP: Tensor,
    all_text_BP: Tensor,
    *,
    first: int,
    scale: Tensor,
    chunk: int = 0,
) -> Contrastive:
    """Half the cross entropy of each direction, summed over the local rows and divided by the global batch B.

    All embeddings have length 1; rows `first` to `first + b` of the global ones are the local ones.
    scale: 1 / T, a scalar that is learned.
    chunk: columns of the logits in memory at once, in the backward too, and then of first order only; 0: all B columns.
    Raises ValueError where the local rows do not fit into the global ones, or chunk is negative.
    Source: LIMoE (arXiv 2206.02770), equation 1, averaged over the batch.
    """
    local, batch = image_bP.shape[0], all_image_BP.shape[0]
    if not 0 <= first <= batch - local:
        raise ValueError(f"local rows {first} to {first + local} lie outside the global batch of {batch}")
    if chunk < 0:
        raise ValueError(f"chunk={chunk} must be a number of columns, or 0 for all of them at once")
    if chunk:
        image_to_text = _CrossEntropyInChunks.apply(image_bP, all_text_BP, scale, first, chunk)
        text_to_image = _CrossEntropyInChunks.apply(text_bP, all_image_BP, scale, first, chunk)
        total, correct = (torch.stack(both) for both in zip(image_to_text, text_to_image, strict=True))
        return Contrastive(loss=total.sum() / (2 * batch), correct=correct.to(image_bP.dtype))
    target_b = torch.arange(first, first + local, device=image_bP.device)
    to_text_bB = scale * (image_bP @ all_text_BP.T)
    to_image_bB = scale * (text_bP @ all_image_BP.T)
    total = F.cross_entropy(to_text_bB, target_b, reduction="sum") + F.cross_entropy(
        to_image_bB, target_b, reduction="sum"
    )
    correct = torch.stack([(logits.argmax(-1) == target_b).sum() for logits in (to_text_bB, to_image_bB)])
    return Contrastive(loss=total / (2 * batch), correct=correct.to(image_bP.dtype))


class _CrossEntropyInChunks(torch.autograd.Function):
    """One direction: rows against columns, never more than (b, C) logits of them, which the backward computes again.

    The target of row i is column first + i: within a chunk that starts at column s, the diagonal first - s.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_bP: Tensor, columns_BP: Tensor, scale: Tensor, first: int, chunk: int
    ) -> tuple[Tensor, Tensor]:
        """The summed cross entropy, and how many rows have their first largest logit at their target."""
        max_b = rows_bP.new_full(rows_bP.shape[:1], -torch.inf)
        sum_b, target_b = torch.zeros_like(max_b), torch.zeros_like(max_b)
        found_b = torch.zeros_like(max_b, dtype=torch.int64)
        for start, logits_bC in _chunks_of_logits(rows_bP, columns_BP, scale, chunk):
            # Taken from these very logits: a row whose target is its maximum then loses no digit to max - target.
            diagonal = logits_bC.diagonal(first - start)
            above = max(start - first, 0)
            target_b[above : above + len(diagonal)] = diagonal
            chunk_max_b, column_b = logits_bC.max(-1)
            # Only a larger logit moves the place, so that ties stay with the first column, as in argmax.
            found_b = torch.where(chunk_max_b > max_b, start + column_b, found_b)
            old_max_b, max_b = max_b, torch.maximum(max_b, chunk_max_b)
            sum_b = sum_b * (old_max_b - max_b).exp() + logits_bC.sub_(max_b[:, None]).exp_().sum(-1)
        # In two parts: a log-sum-exp near 100 is rounded to 4e-6, and no row of the softmax would sum to 1.
        ctx.save_for_backward(rows_bP, columns_BP, scale, max_b, sum_b)
        ctx.first, ctx.chunk = first, chunk
        correct = (found_b == torch.arange(first, first + len(rows_bP), device=rows_bP.device)).sum()
        ctx.mark_non_differentiable(correct)
        return ((max_b - target_b) + sum_b.log()).sum(), correct

    # What was saved is a constant to autograd: a second derivative through it would be wrong without a word.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """By the logits it is softmax minus one at the target; its product with the columns serves rows and scale."""
        rows_bP, columns_BP, scale, max_b, sum_b = ctx.saved_tensors
        weighted_bP, grad_columns_BP = torch.zeros_like(rows_bP), torch.empty_like(columns_BP)
        for start, logits_bC in _chunks_of_logits(rows_bP, columns_BP, scale, ctx.chunk):
            grad_logits_bC = logits_bC.sub_(max_b[:, None]).exp_().div_(sum_b[:, None])
            grad_logits_bC.diagonal(ctx.first - start).sub_(1)
            part = slice(start, start + ctx.chunk)
            weighted_bP += grad_logits_bC @ columns_BP[part]
            grad_columns_BP[part] = grad_logits_bC.T @ rows_bP
        grad_scale = grads[0] * (rows_bP * weighted_bP).sum()
        factor = grads[0] * scale
        return weighted_bP.mul_(factor), grad_columns_BP.mul_(factor), grad_scale, None, None


def _chunks_of_logits(rows_bP: Tensor, columns_BP: Tensor, scale: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """The first column of each chunk with its logits (b, C), which are the caller's to overwrite."""
    for start in range(0, len(columns_BP), chunk):
        yield start, (rows_bP @ columns_BP[start : start + chunk].T).mul_(scale)
