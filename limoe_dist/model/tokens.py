"""How the tokens of a rank lie in one flat (T, D) tensor, and how routing groups are cut from it.

    [ image tokens of pair 0 | of pair 1 | ... | text tokens of pair 0 | of pair 1 | ... ]

One tensor for both modalities: a layer is one matrix product, attention takes two views, a routing group is an index.
Shapes: T tokens, G routing groups, S tokens of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    images: int
    """Pictures on this rank; 0 where only texts are embedded."""
    image_tokens: int
    texts: int
    """Captions on this rank; 0 where only pictures are embedded."""
    text_tokens: int
    groups: int
    """Routing groups G; divides both counts."""
    device: torch.device
    text_valid: Tensor | None = None
    """(texts, text_tokens) bool; None where padding is an ordinary token."""

    @property
    def num_image_tokens(self) -> int:
        return self.images * self.image_tokens

    @property
    def num_text_tokens(self) -> int:
        return self.texts * self.text_tokens

    @property
    def group_image_tokens(self) -> int:
        """Image tokens of one group; the first so many of its S tokens."""
        return self.num_image_tokens // self.groups

    @property
    def group_tokens(self) -> int:
        return (self.num_image_tokens + self.num_text_tokens) // self.groups

    @cached_property
    def token_GS(self) -> Tensor:
        """(G, S) int64: the flat number of each token of a group, image tokens first."""
        number = torch.arange(self.num_image_tokens + self.num_text_tokens, device=self.device)
        image, text = number.split([self.num_image_tokens, self.num_text_tokens])
        return torch.cat([image.view(self.groups, -1), text.view(self.groups, -1)], dim=1)

    @cached_property
    def valid_GS(self) -> Tensor | None:
        """(G, S) bool, False at masked padding; None where all tokens count."""
        if self.text_valid is None:
            return None
        image = torch.ones(self.groups, self.group_image_tokens, dtype=torch.bool, device=self.device)
        return torch.cat([image, self.text_valid.view(self.groups, -1)], dim=1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, ...) -> image tokens (images, N, ...) and text tokens (texts, N, ...), as views."""
        image, text = x.split([self.num_image_tokens, self.num_text_tokens])
        return (
            image.view(self.images, self.image_tokens, *x.shape[1:]),
            text.view(self.texts, self.text_tokens, *x.shape[1:]),
        )
