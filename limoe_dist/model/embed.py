"""From pictures and token ids to tokens of the tower's width, one linear map per modality (LIMoE, section 2.2).

Shapes: B pairs, N tokens of a sequence, D width.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from limoe_dist.parallel.apex import Kernels, layer_norm
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import ONES, ZEROS, Init, Placement, make_parameter


class LayerNorm(nn.Module):
    """Layer normalisation with flax's epsilon, 1e-6."""

    def __init__(self, width: int, *, mesh: Mesh, kernels: Kernels) -> None:
        super().__init__()
        self.weight = make_parameter(Placement((width,), ONES, wide=True), mesh)
        self.bias = make_parameter(Placement((width,), ZEROS, wide=True), mesh)
        self._layer_norm = layer_norm(kernels, self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the type of its own weights: at least float32."""
        return self._layer_norm(x.to(self.weight.dtype), x.shape[-1:], self.weight, self.bias, 1e-6)


class PatchEmbed(nn.Module):
    """ViT's patches, a linear map and learned positions."""

    def __init__(self, *, patch: int, num_tokens: int, width: int, mesh: Mesh) -> None:
        super().__init__()
        self.patch = patch
        fan_in = 3 * patch * patch
        self.weight = make_parameter(Placement((width, 3, patch, patch), Init.lecun(fan_in), decay=True), mesh)
        self.bias = make_parameter(Placement((width,), ZEROS), mesh)
        self.position = make_parameter(Placement((num_tokens, width), Init("normal", 0.02)), mesh)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, N, D), patches row by row."""
        batch, channels, height, width = images.shape
        p = self.patch
        patches = images.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, -1, channels * p * p)
        return F.linear(patches, self.weight.flatten(1), self.bias) + self.position


class TextEmbed(nn.Module):
    """A learned vector for each piece of the vocabulary, and learned positions."""

    def __init__(self, *, vocab_size: int, num_tokens: int, width: int, mesh: Mesh) -> None:
        super().__init__()
        init = Init("normal", 1 / math.sqrt(width))
        self.table = make_parameter(Placement((vocab_size, width), init), mesh)
        self.position = make_parameter(Placement((num_tokens, width), init), mesh)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) int64 -> (B, N, D)."""
        return F.embedding(tokens, self.table) + self.position
