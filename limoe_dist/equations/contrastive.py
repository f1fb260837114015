"""The contrastive loss: this rank's rows against everybody's columns.

Shapes: b local pairs, B pairs of the global batch, P embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
    image_bP: Tensor, text_bP: Tensor, all_image_BP: Tensor, all_text_BP: Tensor, *, first: int, scale: Tensor
) -> Contrastive:
    """Half the cross entropy of each direction, summed over the local rows and divided by the global batch B.

    All embeddings have length 1; rows `first` to `first + b` of the global ones are the local ones.
    scale: 1 / T, a scalar that is learned. Raises ValueError where the local rows do not fit into the global ones.
    Source: LIMoE (arXiv 2206.02770), equation 1, averaged over the batch.
    """
    local, batch = image_bP.shape[0], all_image_BP.shape[0]
    if not 0 <= first <= batch - local:
        raise ValueError(f"local rows {first} to {first + local} lie outside the global batch of {batch}")
    target_b = torch.arange(first, first + local, device=image_bP.device)
    to_text_bB = scale * (image_bP @ all_text_BP.T)
    to_image_bB = scale * (text_bP @ all_image_BP.T)
    total = F.cross_entropy(to_text_bB, target_b, reduction="sum") + F.cross_entropy(
        to_image_bB, target_b, reduction="sum"
    )
    correct = torch.stack([(logits.argmax(-1) == target_b).sum() for logits in (to_text_bB, to_image_bB)])
    return Contrastive(loss=total / (2 * batch), correct=correct.to(image_bP.dtype))
