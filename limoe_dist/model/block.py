"""A pre-norm transformer block, shared by both modalities: x + Attention(LN(x)), then x + MLP or MoE(LN(x))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from limoe_dist.config.schema import Run
from limoe_dist.model.attention import Attention
from limoe_dist.model.embed import LayerNorm
from limoe_dist.model.moe_layer import MoeLayer, MoeRecord, Routes, RoutingMode
from limoe_dist.model.tokens import TokenLayout
from limoe_dist.parallel.linear import ColumnParallelLinear, RowParallelLinear, gather_tokens
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Init

MLP_BIAS = Init("normal", 1e-6)


class Mlp(nn.Module):
    """Dense - gelu (tanh approximation) - Dense."""

    def __init__(self, *, width: int, hidden: int, mesh: Mesh) -> None:
        super().__init__()
        self.tp = mesh.tp
        init = Init.xavier(width, hidden)
        self.up = ColumnParallelLinear(width, hidden, mesh=mesh, weight_init=init, bias_init=MLP_BIAS)
        self.down = RowParallelLinear(hidden, width, mesh=mesh, weight_init=init, bias_init=MLP_BIAS)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(gather_tokens(x_TD, self.tp)), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, run: Run, index: int, *, mesh: Mesh) -> None:
        super().__init__()
        width = run.model.width
        self.norm1 = LayerNorm(width, mesh=mesh, kernels=run.parallel.kernels)
        self.attention = Attention(width=width, heads=run.model.heads, mesh=mesh)
        self.norm2 = LayerNorm(width, mesh=mesh, kernels=run.parallel.kernels)
        if index in run.moe.blocks:
            self.moe = MoeLayer(run, index, mesh=mesh)
        else:
            self.mlp = Mlp(width=width, hidden=run.model.mlp_dim, mesh=mesh)

    def forward(
        self, x_TD: Tensor, layout: TokenLayout, mode: RoutingMode, routes: Routes
    ) -> tuple[Tensor, MoeRecord | None]:
        x_TD = x_TD + self.attention(self.norm1(x_TD), layout)
        if not hasattr(self, "moe"):
            return x_TD + self.mlp(self.norm2(x_TD)), None
        expert_TD, record = self.moe(self.norm2(x_TD), layout, mode, routes)
        return x_TD + expert_TD, record
