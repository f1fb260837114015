"""Where a gradient is summed, and how long it is: one table for every layout.

Every parameter is tagged with its Placement. Its gradient is SUMMED over the ranks that hold the same values (dense:
world; cut over tp: dp; experts: edp), in parallel.reduce_dtype, in buckets of a fixed order; the loss is divided by the
global batch already, so nothing is averaged. The global norm counts every logical element once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.placement import placement_of

BUCKET_BYTES = 64 << 20


@torch.no_grad()
def reduce_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh, *, dtype: torch.dtype) -> None:
    """Sums every gradient over the ranks that replicate its parameter, in place; a missing gradient counts as zeros.

    A collective: all ranks call it with the same parameters in the same order.
    """
    by_axis: dict[str, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            # A rank without a gradient still takes part: else the others would wait for it.
            parameter.grad = torch.zeros_like(parameter)
        by_axis.setdefault(placement_of(parameter).replicas(mesh).name, []).append(parameter)
    for name in sorted(by_axis):
        axis: Axis = getattr(mesh, name)
        if axis.group is not None:
            for bucket in _buckets(by_axis[name], dtype):
                _sum_bucket([parameter.grad for parameter in bucket], axis, dtype)


def _buckets(parameters: list[nn.Parameter], dtype: torch.dtype) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += parameter.numel() * dtype.itemsize
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _sum_bucket(grads: list[Tensor | None], axis: Axis, dtype: torch.dtype) -> None:
    present = [grad for grad in grads if grad is not None]
    flat = torch.cat([grad.flatten().to(dtype) for grad in present])
    dist.all_reduce(flat, group=axis.group)
    for grad, part in zip(present, flat.split([grad.numel() for grad in present]), strict=True):
        grad.copy_(part.view_as(grad))


@torch.no_grad()
def global_grad_norm(parameters: Iterable[nn.Parameter], mesh: Mesh) -> Tensor:
    """The length of the whole gradient, a scalar of at least float32, the same on every rank and in every layout.

    Reduced gradients are equal on all replicas: each rank squares its own shard, and shards are added over their axis.
    """
    squares: dict[str | None, list[Tensor]] = {None: [], "tp": [], "ep": []}
    for parameter in parameters:
        assert parameter.grad is not None, "reduce_gradients comes first"
        squares[placement_of(parameter).axis].append(_sum_of_squares(parameter.grad))
    total = torch.zeros((), device=next(t for ts in squares.values() for t in ts).device, dtype=torch.float64)
    for name, parts in squares.items():
        if parts:
            part = torch.stack(parts).sum()
            total += part if name is None else sum_over(part, getattr(mesh, name))
    return total.sqrt()


def _sum_of_squares(grad: Tensor) -> Tensor:
    # float64 for the sum: the order of shards must not show in the norm, and clipping hangs on it.
    return grad.double().square().sum()


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], norm: Tensor, *, max_norm: float) -> None:
    """Scales all gradients by min(1, max_norm / norm), without asking the device for the number."""
    factor = (max_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(grads, factor.to(grads[0].dtype))
