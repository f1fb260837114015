"""What crosses ranks inside the model, as pairs of forward and backward. Each is the identity on an axis of size 1.

Convention for gradients: the loss of a step is the SUM of the ranks' shares, so a gradient that comes back from
several ranks is summed, never averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.parallel.mesh import Axis
from limoe_dist.parallel.traffic import Call


def all_gather_rows(x: Tensor, axis: Axis) -> Tensor:
    """Forward: all-gather of dim 0 in rank order; (n, ...) -> (size * n, ...). Backward: reduce-scatter, SUM."""
    return x if axis.group is None else _AllGatherRows.apply(x, axis)


def reduce_scatter_rows(x: Tensor, axis: Axis) -> Tensor:
    """Forward: reduce-scatter of dim 0, SUM; (size * n, ...) -> (n, ...). Backward: all-gather."""
    return x if axis.group is None else _ReduceScatterRows.apply(x, axis)


def all_to_all_rows(x: Tensor, axis: Axis) -> Tensor:
    """Forward: equal-split all-to-all of dim 0: chunk i goes to rank i. Backward: the same (its own inverse)."""
    return x if axis.group is None else _AllToAllRows.apply(x, axis)


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter(grads[0], ctx.axis), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.axis), None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _exchange(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange(grads[0], ctx.axis), None


def _gather(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    with axis.traffic.call("all_gather", axis, out.nbytes):
        dist.all_gather_single(out, x.contiguous(), group=axis.group)
    return out


def _scatter(x: Tensor, axis: Axis) -> Tensor:
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    with axis.traffic.call("reduce_scatter", axis, x.nbytes):
        dist.reduce_scatter_single(out, x.contiguous(), group=axis.group)
    return out


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with axis.traffic.call("all_to_all", axis, x.nbytes):
        dist.all_to_all_single(out, x.contiguous(), group=axis.group)
    return out


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """The sum of a tensor over the axis, in place and without a gradient; for counts and metrics."""
    if axis.group is not None:
        with axis.traffic.call("all_reduce", axis, x.nbytes):
            dist.all_reduce(x, group=axis.group)
    return x


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """The maximum over the axis, in place and without a gradient."""
    if axis.group is not None:
        with axis.traffic.call("all_reduce", axis, x.nbytes):
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x


def vote(axis: Axis, device: torch.device, *numbers: int) -> list[int]:
    """The largest of each number over all ranks: how ranks that see different things act together. A collective."""
    return [int(each) for each in max_over(torch.tensor(numbers, device=device), axis).tolist()]


def raise_together(problems: Sequence[str], axis: Axis, device: torch.device) -> None:
    """Raises UserError on every rank of the axis where any rank has a problem, or on none: nobody is left waiting.

    The first rank that has one tells it; what all ranks found is told once. A collective, and so a barrier too.
    """
    # The largest number belongs to the lowest rank that has a problem; 0 where none has.
    places = int(max_over(torch.tensor(axis.size - axis.index if problems else 0, device=device), axis).item())
    if places:
        teller = axis.size - places
        raise UserError("\n".join(problems) or f"rank {teller} found a fault", told_by=teller)


@contextmanager
def all_or_none(axis: Axis, device: torch.device) -> Iterator[None]:
    """What some ranks do in the `with` either succeeds for all, or every rank raises UserError. A barrier at its end.

    Catches UserError and OSError; the `with` itself may hold no collective, which a failed rank would not join.
    """
    problems: list[str] = []
    try:
        yield
    except UserError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"{error.filename or 'a file'}: {error.strerror or error}"]
    raise_together(problems, axis, device)


@dataclass(frozen=True)
class Pending:
    """A collective that was started and goes on by itself."""

    work: dist.Work
    call: Call

    def wait(self) -> None:
        with self.call:
            self.work.wait()


def start_reduce_scatter(out: Tensor, x: Tensor, axis: Axis) -> Pending:
    """Starts the sum of `x` (size, n) over an axis of size > 1; row r arrives as `out` (n,) at rank r."""
    call = axis.traffic.call("reduce_scatter", axis, x.nbytes)
    work = dist.reduce_scatter_single(out, x.view(-1), group=axis.group, async_op=True)
    assert work is not None
    return Pending(work, call)


def gather_into(out: Tensor, x: Tensor, axis: Axis) -> None:
    """All-gather without a gradient: `x` (n,) of rank r becomes row r of `out` (size, n)."""
    if axis.group is None:
        out.view(-1).copy_(x)
    else:
        with axis.traffic.call("all_gather", axis, out.nbytes):
            dist.all_gather_single(out.view(-1), x, group=axis.group)
