"""Where a gradient is summed, and how long it is: one table for every layout.

Every parameter is tagged with its Placement. Its gradient is SUMMED over the ranks that hold the same values (dense:
world; cut over tp: dp; experts: edp), in parallel.reduce_dtype, in buckets of a fixed order; the loss is divided by the
global batch already, so nothing is averaged. Each replica receives the sum of its own piece alone (pieces.py), so that
over all ranks every logical element is there once: the global norm is a sum over the world.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from limoe_dist.parallel.collectives import Pending, start_reduce_scatter, sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.pieces import Bucket, make_buckets


@dataclass
class _Filling:
    """A bucket on its way from the backward passes of a step to its sum."""

    bucket: Bucket
    rows_nL: Tensor
    """This rank's gradients, added up over microbatches; row r goes to replica r."""
    rows: list[Tensor]
    """Its views (n, row_numel), one for each piece."""
    sum_L: Tensor
    """The sum over the replicas, of this rank's pieces."""
    given: list[bool]
    """Which parameters have a gradient so far in this step."""
    awaited: int
    """Parameters whose gradient the last backward pass has not brought yet."""
    pending: Pending | None = None


class Gradients:
    """Collects the gradients of a model's backward passes and sums them over its replicas.

    Hooks take each parameter's gradient as soon as it is there, so that `parameter.grad` is None outside. In the last
    backward pass of a step a bucket leaves as soon as it and all before it are full, while the pass goes on.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, *, dtype: torch.dtype, bucket_bytes: float, overlap: bool = True
    ) -> None:
        """dtype: of sums over microbatches and ranks."""
        self.mesh, self.overlap = mesh, overlap
        self.buckets = make_buckets(model.named_parameters(), mesh, numbers=bucket_bytes / dtype.itemsize)
        self._fillings = [_filling(bucket, dtype) for bucket in self.buckets]
        self._left = 0
        self._last = False
        # A hook is no part of what the garbage collector sees: one that held the buckets would keep them, and the
        # parameters in them, for good.
        me = weakref.ref(self)
        for place, bucket in enumerate(self.buckets):
            for number, piece in enumerate(bucket.pieces):
                piece.parameter.register_post_accumulate_grad_hook(partial(_hand_over, me, place, number))

    @property
    def sums(self) -> list[Tensor]:
        """(L,) for each bucket: the sums of this rank's pieces, whole after `finish`."""
        return [filling.sum_L for filling in self._fillings]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a loss to those of this step; in the last pass the sums over ranks begin."""
        self._last = last and self.overlap
        loss.backward()
        self._last = False

    def take(self, place: int, number: int, parameter: nn.Parameter) -> None:
        """A parameter's gradient goes into its bucket: the first of a step overwrites what the step before left."""
        assert parameter.grad is not None
        filling = self._fillings[place]
        for part, row in filling.bucket.pieces[number].match(parameter.grad, filling.rows[number]):
            if filling.given[number]:
                row += part
            else:
                row.copy_(part)
        filling.given[number] = True
        parameter.grad = None
        if self._last:
            filling.awaited -= 1
            self._send(lambda next_one: next_one.awaited == 0)

    def _send(self, ready: Callable[[_Filling], bool]) -> None:
        """Buckets leave in their fixed order, on every rank, whatever the order in which they fill."""
        while self._left < len(self._fillings) and ready(self._fillings[self._left]):
            filling = self._fillings[self._left]
            for rows, given in zip(filling.rows, filling.given, strict=True):
                if not given:
                    # No token came here, or the modality is absent: zeros, and nobody waits.
                    rows.zero_()
            if filling.bucket.replicas.size > 1:
                filling.pending = start_reduce_scatter(filling.sum_L, filling.rows_nL, filling.bucket.replicas)
            self._left += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Sends what the backward pass did not fill, and waits until every sum is there. A collective."""
        self._send(lambda _: True)
        for filling in self._fillings:
            if filling.pending is not None:
                filling.pending.wait()
                filling.pending = None

    @torch.no_grad()
    def norm(self, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The length of the whole gradient, a float64 scalar, the same on every rank and in every layout.

        And the sums over all ranks of `beside` (n,) float64, which travel with it.
        """
        # float64: the order of shards must not show in the norm, and clipping hangs on it.
        lengths = [torch.linalg.vector_norm(sum_L, dtype=torch.float64) for sum_L in self.sums]
        return norm_over(torch.stack(lengths).square().sum(), beside, self.mesh)

    @torch.no_grad()
    def clip(self, norm: Tensor, *, max_norm: float) -> None:
        """Scales all sums by min(1, max_norm / norm), without asking the device for the number."""
        factor = (max_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
        torch._foreach_mul_(self.sums, factor.to(self.sums[0].dtype))

    def clear(self) -> None:
        """Makes room for the gradients of the next step."""
        self._left = 0
        for filling in self._fillings:
            filling.given = [False] * len(filling.given)
            filling.awaited = len(filling.given)


def norm_over(squares: Tensor, beside: Tensor | None, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """From this rank's sum of squares the norm over the world; and what travels with it, (n,) summed. One collective.

    A number that is not finite spoils no other: sums are taken one by one.
    """
    vector = squares[None] if beside is None else torch.cat([squares[None], beside.to(squares)])
    summed = sum_over(vector, mesh.world)
    return summed[0].sqrt(), summed[1:]


def _hand_over(gradients: weakref.ref[Gradients], place: int, number: int, parameter: nn.Parameter) -> None:
    """The hook of a parameter: piece `number` of bucket `place`. Without anyone who collects, gradients stay."""
    found = gradients()
    if found is not None:
        found.take(place, number, parameter)


def _filling(bucket: Bucket, dtype: torch.dtype) -> _Filling:
    device, size = bucket.pieces[0].parameter.device, bucket.replicas.size
    # Zeros: padding is never written again.
    rows_nL = torch.zeros(size, bucket.length, dtype=dtype, device=device)
    return _Filling(
        bucket=bucket,
        rows_nL=rows_nL,
        rows=bucket.rows(rows_nL),
        sum_L=rows_nL[0] if size == 1 else torch.zeros(bucket.length, dtype=dtype, device=device),
        given=[False] * len(bucket.pieces),
        awaited=len(bucket.pieces),
    )
