"""Self-attention within a modality: a picture attends to itself, a caption to itself (LIMoE, sections 2.1 and 6).

Shapes: T tokens of this rank, D width, H heads on this rank, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limoe_dist.model.tokens import TokenLayout
from limoe_dist.parallel.collectives import all_gather_rows
from limoe_dist.parallel.linear import RowParallelLinear, gather_tokens
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import ZEROS, Init, Placement, make_parameter


class Attention(nn.Module):
    def __init__(self, *, width: int, heads: int, mesh: Mesh) -> None:
        super().__init__()
        self.tp = mesh.tp
        head_dim = width // heads
        # q, k and v in one matrix product; cut over tp by heads, so that each rank attends with whole heads.
        init = Init.xavier(width, width)
        weight = Placement((3, heads, head_dim, width), init, "tp", 1, decay=True, stacked=1)
        self.qkv_weight = make_parameter(weight, mesh)
        self.qkv_bias = make_parameter(Placement((3, heads, head_dim), ZEROS, "tp", 1, stacked=1), mesh)
        self.out = RowParallelLinear((heads, head_dim), width, mesh=mesh, weight_init=init, bias_init=ZEROS)

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """(T, D) -> (T, D); masked padding is seen by no token."""
        x_TD = gather_tokens(x_TD, self.tp)
        qkv = F.linear(x_TD, self.qkv_weight.flatten(0, 2), self.qkv_bias.flatten())
        _, heads, head_dim, _ = self.qkv_weight.shape
        # (tp, T, 3, H, d): the tokens of the tp group stand one rank after the other.
        qkv = qkv.view(self.tp.size, -1, 3, heads, head_dim)
        image, text = qkv.split([layout.num_image_tokens, layout.num_text_tokens], dim=1)
        mixed = [
            self._within(image, layout.images, layout.image_tokens, None),
            self._within(text, layout.texts, layout.text_tokens, self._text_mask(layout)),
        ]
        return self.out(torch.cat(mixed, dim=1).reshape(-1, heads * head_dim))

    def _within(self, qkv: Tensor, sequences: int, tokens: int, mask: Tensor | None) -> Tensor:
        """(tp, sequences * tokens, 3, H, d) -> (tp, sequences * tokens, H * d)."""
        tp, _, _, heads, head_dim = qkv.shape
        if sequences == 0:
            return qkv.new_empty(tp, 0, heads * head_dim)
        qkv = qkv.unflatten(1, (sequences, tokens)).flatten(0, 1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(tp, sequences * tokens, heads * head_dim)

    def _text_mask(self, layout: TokenLayout) -> Tensor | None:
        """(tp * texts, 1, 1, N) bool, True where a key may be attended."""
        if layout.text_valid is None or layout.texts == 0:
            return None
        valid = layout.text_valid
        if self.tp.size > 1:
            # Not every backend gathers bool.
            valid = all_gather_rows(valid.to(torch.uint8), self.tp).bool()
        return valid[:, None, None, :]
