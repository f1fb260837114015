"""ZeRO-1's cut: the ranks that hold the same part of a parameter share its master, its gradient's sum and its state.

    parameter (6, 4) on 3 replicas, cut along dim 0          a bucket of two parameters, L = 8 + 3 numbers a replica
    replica 0 keeps rows 0-1   [ . . . . ]                   rows (n, L)   [ 8 numbers of A | 3 of B ]  replica 0
    replica 1       rows 2-3   [ . . . . ]                                 [ 8 numbers of A | 3 of B ]  replica 1
    replica 2       rows 4-5   [ . . . . ]                                 [ 8 numbers of A | 1 of B, padding ]

Row r of a bucket is what replica r keeps, so that one reduce-scatter sums the gradients of a bucket and one all-gather
brings its new weights back. Source: ZeRO (arXiv 1910.02054), stage 1, cut along a tensor dim instead of a flat range.
Shapes: n replicas, L numbers of a bucket that a replica keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.placement import Placement, Shard, placement_of


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank keeps among its replicas."""

    name: str
    parameter: nn.Parameter
    placement: Placement
    replicas: Axis
    dim: int
    """Tensor dim that is cut over the replicas; 0 for a scalar, which is cut as a vector of length 1."""
    start: tuple[int, ...]
    """Where the piece begins in the logical tensor."""
    shape: tuple[int, ...]
    """Of this rank's piece; () or (0,) for a scalar. Uneven cuts leave the last replicas less, or nothing."""
    axes: tuple[tuple[Axis, ...], ...]
    """For each dim the axes of the mesh that cut it, those of size 1 left out."""
    row_numel: int
    """Numbers that a replica's row has for this parameter, padding included: those of the first, largest piece."""

    @staticmethod
    def of(name: str, parameter: nn.Parameter, mesh: Mesh) -> Piece:
        placement = placement_of(parameter)
        replicas = placement.replicas(mesh)
        local = tuple(parameter.shape) or (1,)
        dim = _replica_dim(placement, local, replicas.size)
        begin, end = _bounds(local[dim], replicas, replicas.index)
        start = [0] * len(local)
        axes: list[tuple[Axis, ...]] = [()] * len(local)
        shard = placement.shard(mesh)
        if shard is not None:
            start[placement.dim] = placement.local_slice(mesh).start
            axes[placement.dim] = (shard,)
        start[dim] += begin
        axes[dim] += (replicas,)
        shape = (*local[:dim], end - begin, *local[dim + 1 :])
        if not placement.shape:
            start, shape = [], () if end > begin else (0,)
        first = _bounds(local[dim], replicas, 0)[1]
        return Piece(
            name=name,
            parameter=parameter,
            placement=placement,
            replicas=replicas,
            dim=dim,
            start=tuple(start),
            shape=shape,
            axes=tuple(tuple(axis for axis in cuts if axis.size > 1) for cuts in axes),
            row_numel=math.prod(local) // local[dim] * first,
        )

    def shard(self, tensor: Tensor) -> Shard:
        """A tensor of this piece's shape as a box of the logical tensor."""
        return Shard(tensor=tensor, shape=self.placement.shape, start=self.start, writes=tensor.numel() > 0)

    def match(self, local: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of a tensor of the parameter's shape, and of rows (n, row_numel), that hold the same numbers."""
        size = self.replicas.size
        local = local.view(tuple(local.shape) or (1,))
        length = local.shape[self.dim]
        if length % size == 0:
            parts = local.unflatten(self.dim, (size, length // size)).movedim(self.dim, 0)
            yield parts, rows.view(parts.shape)
            return
        for place in range(size):
            begin, end = _bounds(length, self.replicas, place)
            part = local.narrow(self.dim, begin, end - begin)
            yield part, rows[place, : part.numel()].view(part.shape)


def _replica_dim(placement: Placement, local: tuple[int, ...], size: int) -> int:
    """The first dim that divides evenly, else the longest, of those that neither stack tensors nor are cut over tp.

    A vector that is cut over tp has no other dim and is cut again along the same one.
    """
    cut = {placement.dim} if placement.axis == "tp" else set()
    free = [dim for dim in range(placement.stacked, len(local)) if dim not in cut] or [placement.dim]
    even = [dim for dim in free if local[dim] % size == 0]
    return even[0] if even else max(free, key=lambda dim: local[dim])


def _bounds(length: int, axis: Axis, place: int) -> tuple[int, int]:
    part = -(-length // axis.size)
    return min(place * part, length), min((place + 1) * part, length)


@dataclass
class Bucket:
    """Parameters of the same replicas, type and decay: one call sums their gradients, one gathers their weights."""

    replicas: Axis
    decay: bool
    dtype: torch.dtype
    """Of the weights."""
    pieces: list[Piece] = field(default_factory=list)

    @property
    def length(self) -> int:
        """L."""
        return sum(piece.row_numel for piece in self.pieces)

    def rows(self, buffer_nL: Tensor) -> list[Tensor]:
        """Views (n, row_numel), one for each piece."""
        return list(buffer_nL.split([piece.row_numel for piece in self.pieces], dim=1))

    def views(self, flat_L: Tensor) -> list[Tensor]:
        """Views of this rank's row, one for each piece and of its shape."""
        parts = flat_L.split([piece.row_numel for piece in self.pieces])
        return [
            part[: math.prod(piece.shape)].view(piece.shape) for part, piece in zip(parts, self.pieces, strict=True)
        ]


def make_buckets(parameters: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, *, numbers: float) -> list[Bucket]:
    """All parameters in buckets of about `numbers` numbers, in the order in which a backward pass fills them.

    The backward pass comes to the last layers first. The order is a function of the model alone: the same on all ranks.
    """
    filled: list[Bucket] = []
    opened: dict[tuple[str, bool, torch.dtype], Bucket] = {}
    for name, parameter in reversed(list(parameters)):
        piece = Piece.of(name, parameter, mesh)
        kind = (piece.replicas.name, piece.placement.decay, parameter.dtype)
        bucket = opened.setdefault(kind, Bucket(piece.replicas, piece.placement.decay, parameter.dtype))
        bucket.pieces.append(piece)
        if bucket.length * bucket.replicas.size >= numbers:
            filled.append(opened.pop(kind))
    return filled + list(opened.values())
