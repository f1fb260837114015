"""Linear layers whose weight is cut over the tp axis. On an axis of size 1 both are ordinary linear layers.

        column-parallel                 row-parallel
        weight (out, in)                weight (out, in)
        rank 0 [=====]                  rank 0 | rank 1
        rank 1 [=====]                  [==]   | [==]
        output features are split       input features are split, outputs are partial sums

Tokens are split along pairs outside: gather_tokens before a column-parallel layer gives every rank the tokens of the
whole tp group, scatter_tokens after a row-parallel one adds the partial sums and gives each rank its own tokens back.
Source: Megatron-LM (arXiv 1909.08053), section 3, with the sequence parallelism of arXiv 2205.05198 along pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limoe_dist.parallel.collectives import all_gather_rows, reduce_scatter_rows
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.placement import Init, Placement, make_parameter


def autocast_type(x: Tensor) -> Tensor:
    """x in the type that autocast computes in, or as it is: what crosses ranks need not be wider."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def gather_tokens(x_TD: Tensor, tp: Axis) -> Tensor:
    """(T, D) -> (tp * T, D) in autocast's type. Forward: all-gather of tokens; backward: reduce-scatter, SUM."""
    return all_gather_rows(autocast_type(x_TD), tp)


def scatter_tokens(x_TD: Tensor, tp: Axis) -> Tensor:
    """(tp * T, D) partial sums -> (T, D). Forward: reduce-scatter, SUM; backward: all-gather."""
    return reduce_scatter_rows(x_TD, tp)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features cut over tp."""

    def __init__(self, in_size: int, out_size: int, *, mesh: Mesh, weight_init: Init, bias_init: Init) -> None:
        super().__init__()
        self.weight = make_parameter(Placement((out_size, in_size), weight_init, "tp", 0, decay=True), mesh)
        self.bias = make_parameter(Placement((out_size,), bias_init, "tp", 0), mesh)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out / tp)."""
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input features cut over tp; returns this rank's tokens.

    The bias is added after the reduce-scatter: before it, each rank would add it and the sum would hold it tp times.
    """

    def __init__(
        self, in_shape: int | tuple[int, ...], out_size: int, *, mesh: Mesh, weight_init: Init, bias_init: Init
    ) -> None:
        """in_shape: one size, or the dims that make up the input features, of which the first is cut."""
        super().__init__()
        self.tp = mesh.tp
        shape = (out_size, *([in_shape] if isinstance(in_shape, int) else in_shape))
        self.weight = make_parameter(Placement(shape, weight_init, "tp", 1, decay=True), mesh)
        self.bias = make_parameter(Placement((out_size,), bias_init), mesh)

    def forward(self, x: Tensor) -> Tensor:
        """(tp * T, in / tp) -> (T, out)."""
        weight = self.weight.flatten(1)
        if self.tp.size == 1:
            return F.linear(x, weight, self.bias)
        return scatter_tokens(F.linear(x, weight), self.tp) + self.bias
