"""big_vision's Adafactor on ZeRO-1's pieces: second moments by row and column, momentum, no relative step.

A matrix of squared gradients is kept as two averages, from which each of its elements is estimated:

                   d0
            [ . . . . . . ]   row: mean over d0, a number for each place along d1
        d1  [ . . . . . . ]   column: mean over d1, a number for each place along d0
            [ . . . . . . ]   second moment of element (i, j) = row_i * column_j / mean of all

d0 and d1 are the longest and the second longest dim; other dims, and those that only put tensors together (experts;
q, k and v), have averages of their own. The averages are those of the whole matrix, whatever cuts it: sums over a dim
that an axis of the mesh cuts are added up over that axis, those of all matrices in one flat tensor.
Source: Adafactor (arXiv 1804.04235) as Scaling Vision Transformers (arXiv 2106.04560) changed it; optax's factoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limoe_dist.config.schema import Optim
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Axis
from limoe_dist.parallel.pieces import Bucket, Piece
from limoe_dist.parallel.placement import Placement, Shard

TINY = 1e-30
"""Added to squared gradients: an update without gradient is 0 and not 0 / 0."""
LEAST = 1e-38
"""What no second moment is below after its first step, for the steps that are left out before: 0 / 0 again."""


class Adafactor:
    """weight -= rate * (momentum + weight_decay * weight), the momentum being that of g / sqrt(second moment).

    Averages start from zero without a correction; the second moment's first decay is 0. Decay is for kernels only, and
    optim.weight_decay is times the learning rate, as in vmoe (0.1) and for this project's AdamW. big_vision's wd is
    times the schedule without the peak: its 1e-4 at a peak of 1e-3 is 0.1 here.
    """

    def __init__(self, buckets: list[Bucket], weights: list[Tensor], grads: list[Tensor], optim: Optim) -> None:
        """weights, grads: (L,) for each bucket, float32 or float64; the state is of the weights' type."""
        self.steps = 0
        self.optim = optim
        # One for all buckets and steps: fresh memory of this size costs a CPU more than the arithmetic does.
        scratch_L = weights[0].new_empty(max(weight_L.numel() for weight_L in weights))
        self._parts = [
            _Part(bucket, weight_L, grad_L, scratch_L[: weight_L.numel()], optim)
            for bucket, weight_L, grad_L in zip(buckets, weights, grads, strict=True)
        ]
        self._rounds = _rounds([matrix for part in self._parts for matrix in part.matrices.values()])

    @torch.no_grad()
    def step(self, rate: float, keep: Tensor | None = None) -> None:
        """One update with the gradients as they are; `rate` is the learning rate of this step. A collective.

        keep: where this scalar is 0, weights and moments stay as they are, whatever the gradients hold.
        """
        pace = 1 - min(self.optim.max_decay, 1 - (self.steps + 1) ** -self.optim.decay_exponent)
        like = self._parts[0].weight_L
        pulse = _Pulse.of(
            like.new_ones(()) if keep is None else keep, pace=pace, fade=self.optim.beta1, rate=rate, like=like
        )
        found: dict[_Average, Tensor] = {}
        for part in self._parts:
            found |= part.look(pulse)
        means = _take_in(self._rounds, found, pulse.pace)
        for part in self._parts:
            part.update(means, pulse)
        self.steps += 1

    def shards(self) -> dict[str, Shard]:
        """`adafactor/momentum/NAME`, with `second/NAME` or, where it is factored, `row/NAME` and `column/NAME`."""
        return {f"adafactor/{name}": shard for part in self._parts for name, shard in part.shards().items()}


@dataclass(frozen=True)
class _Pulse:
    """How far a step moves things, as scalars on the device; where it is left out, nothing moves."""

    left_out: Tensor
    """bool."""
    pace: Tensor
    """Of second moments to this step's squares."""
    fade: Tensor
    """What is left of the momentum."""
    rate: Tensor

    @staticmethod
    def of(keep: Tensor, *, pace: float, fade: float, rate: float, like: Tensor) -> _Pulse:
        one = keep.to(like)
        left_out = one == 0
        return _Pulse(left_out, one * pace, like.new_full((), fade).masked_fill(left_out, 1.0), one * rate)


@dataclass(frozen=True, eq=False)
class _Average:
    """Squared gradients, averaged over one dim of the whole tensor and exponentially over the steps."""

    piece: Piece
    dim: int
    running: Tensor
    """The shape of the piece, with 1 in place of `dim`."""

    @staticmethod
    def over(dim: int, piece: Piece, weight_L: Tensor) -> _Average:
        return _Average(piece, dim, weight_L.new_zeros((*piece.shape[:dim], 1, *piece.shape[dim + 1 :])))

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those over which this rank's share has to be summed."""
        return self.piece.axes[self.dim]

    @property
    def length(self) -> int:
        """Of `dim` in the whole tensor."""
        return self.piece.placement.shape[self.dim]

    def shard(self) -> Shard:
        """The ranks that cut `dim` hold the same numbers: the first of each axis writes. Its piece is never empty."""
        shape, start = self.piece.placement.shape, self.piece.start
        return Shard(
            tensor=self.running.squeeze(self.dim),
            shape=(*shape[: self.dim], *shape[self.dim + 1 :]),
            start=(*start[: self.dim], *start[self.dim + 1 :]),
            writes=self.running.numel() > 0 and all(axis.index == 0 for axis in self.axes),
        )


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The two averages of a factored piece."""

    row: _Average
    column: _Average
    first: _Average
    """Row or column: that of the earlier round."""
    second: _Average

    @staticmethod
    def of(piece: Piece, weight_L: Tensor, *, shortest: int) -> _Matrix | None:
        """None where the second longest dim is shorter than `shortest`, or is missing."""
        dims = factored_dims(piece.placement, shortest=shortest)
        if dims is None:
            return None
        d1, d0 = dims
        row, column = _Average.over(d0, piece, weight_L), _Average.over(d1, piece, weight_L)
        first, second = sorted((row, column), key=lambda average: _turn(average.axes))
        return _Matrix(row, column, first, second)


def factored_dims(placement: Placement, *, shortest: int) -> tuple[int, int] | None:
    """The second longest and the longest dim of the tensors that are stacked, of equals the later one first."""
    shape = placement.shape
    dims = sorted(range(placement.stacked, len(shape)), key=lambda dim: shape[dim])
    if len(dims) < 2 or shape[dims[-2]] < shortest:
        return None
    return dims[-2], dims[-1]


class _Part:
    """The pieces of one bucket; parameters are numbered as in the bucket. Padding stays zero: its gradient is."""

    def __init__(self, bucket: Bucket, weight_L: Tensor, grad_L: Tensor, scratch_L: Tensor, optim: Optim) -> None:
        """scratch_L: holds nothing between calls."""
        self.optim, self.pieces = optim, bucket.pieces
        self.decay = optim.weight_decay if bucket.decay else 0.0
        self.weight_L, self.grad_L, self.scratch_L = weight_L, grad_L, scratch_L
        self.momentum_L = torch.zeros_like(weight_L)
        self.grads, self.scratch, self.momenta = (bucket.views(x_L) for x_L in (grad_L, scratch_L, self.momentum_L))
        self.matrices: dict[int, _Matrix] = {}
        self.seconds: dict[int, Tensor] = {}
        for number, piece in enumerate(bucket.pieces):
            matrix = _Matrix.of(piece, weight_L, shortest=optim.min_factored_dim)
            if matrix is None:
                self.seconds[number] = weight_L.new_zeros(piece.shape)
            else:
                self.matrices[number] = matrix

    def look(self, pulse: _Pulse) -> dict[_Average, Tensor]:
        """Takes this step's squares into the moments that are not factored; this rank's shares of the averages."""
        # Nothing times what is not finite is not nothing.
        self.grad_L.masked_fill_(pulse.left_out, 0.0)
        torch.square(self.grad_L, out=self.scratch_L).add_(TINY)
        _move(list(self.seconds.values()), [self.scratch[number] for number in self.seconds], pulse.pace)
        averages = [(number, each) for number, matrix in self.matrices.items() for each in (matrix.row, matrix.column)]
        shares = _shares([(self.scratch[number], average) for number, average in averages])
        return dict(zip((average for _, average in averages), shares, strict=True))

    def update(self, means: dict[_Matrix, Tensor], pulse: _Pulse) -> None:
        """means: of all squares of a matrix, with dims d0 and d1 of length 1."""
        self.momentum_L.mul_(pulse.fade)
        share = 1 - self.optim.beta1
        if self.seconds:
            torch._foreach_addcmul_(
                [self.momenta[number] for number in self.seconds],
                [self.grads[number] for number in self.seconds],
                torch._foreach_rsqrt(torch._foreach_clamp_min(list(self.seconds.values()), LEAST)),
                value=share,
            )
        for number, matrix in self.matrices.items():
            row = (matrix.row.running.clamp(min=LEAST) / means[matrix].clamp(min=LEAST)).rsqrt_()
            half = torch.mul(self.grads[number], row, out=self.scratch[number])
            self.momenta[number].addcmul_(half, matrix.column.running.clamp(min=LEAST).rsqrt_(), value=share)
        if self.decay:
            self.weight_L.mul_(1 - pulse.rate * self.decay)
        self.weight_L.sub_(torch.mul(self.momentum_L, pulse.rate, out=self.scratch_L))

    def shards(self) -> dict[str, Shard]:
        found = {}
        for number, (piece, momentum) in enumerate(zip(self.pieces, self.momenta, strict=True)):
            found[f"momentum/{piece.name}"] = piece.shard(momentum)
            if number in self.seconds:
                found[f"second/{piece.name}"] = piece.shard(self.seconds[number])
            else:
                matrix = self.matrices[number]
                found |= {f"row/{piece.name}": matrix.row.shard(), f"column/{piece.name}": matrix.column.shard()}
        return found


@dataclass(frozen=True)
class _Round:
    """All averages over dims that the same axes cut: their shares are summed in one flat tensor."""

    axes: tuple[Axis, ...]
    averages: list[_Average]
    closing: list[_Matrix]
    """Matrices whose other dim an earlier round averaged: this one brings the mean of all their squares."""
    opening: list[_Matrix]
    """Matrices of which this round is the first."""


def _turn(axes: tuple[Axis, ...]) -> tuple[bool, tuple[str, ...]]:
    """Rounds have the same order on every rank; what no axis cuts comes last, when nothing is left to be sent."""
    return not axes, tuple(axis.name for axis in axes)


def _rounds(matrices: Sequence[_Matrix]) -> list[_Round]:
    rounds: dict[tuple[bool, tuple[str, ...]], _Round] = {}
    for matrix in matrices:
        for average in (matrix.first, matrix.second):
            turn = rounds.setdefault(_turn(average.axes), _Round(average.axes, [], [], []))
            turn.averages.append(average)
        rounds[_turn(matrix.first.axes)].opening.append(matrix)
        if matrix.second.axes:
            rounds[_turn(matrix.second.axes)].closing.append(matrix)
    return [rounds[turn] for turn in sorted(rounds)]


def _move(averages: list[Tensor], targets: list[Tensor], pace: Tensor) -> None:
    """Each average goes the way `pace`, 0 to 1, to its target; with 0 it stays as it is, to the bit."""
    if averages:
        torch._foreach_lerp_(averages, targets, [pace] * len(averages))


def _take_in(rounds: Sequence[_Round], found: dict[_Average, Tensor], pace: Tensor) -> dict[_Matrix, Tensor]:
    """Takes this rank's shares of the averages, summed over the ranks, into the running ones; the mean of each matrix.

    A matrix that is cut both ways has one average after its first round; that average's mean over the other dim is
    then a sum over ranks again, and goes with the second round.
    """
    means: dict[_Matrix, Tensor] = {}
    for turn in rounds:
        shares = [found[average] for average in turn.averages] + [means[matrix] for matrix in turn.closing]
        sums = _summed(shares, turn.axes)
        count = len(turn.averages)
        _move([average.running for average in turn.averages], sums[:count], pace)
        means |= zip(turn.closing, sums[count:], strict=True)
        opened = _shares([(matrix.first.running, matrix.second) for matrix in turn.opening])
        means |= zip(turn.opening, opened, strict=True)
    return means


def _shares(both: Sequence[tuple[Tensor, _Average]]) -> list[Tensor]:
    """What this rank's part of each tensor adds to its mean over the average's dim, which stays with length 1."""
    sums = [tensor.sum(average.dim, keepdim=True) for tensor, average in both]
    if sums:
        torch._foreach_div_(sums, [average.length for _, average in both])
    return sums


def _summed(shares: list[Tensor], axes: tuple[Axis, ...]) -> list[Tensor]:
    """Each tensor's sum over the axes, with one all-reduce for each axis."""
    if not axes:
        return shares
    flat = torch.cat([share.flatten() for share in shares])
    for axis in axes:
        sum_over(flat, axis)
    parts = flat.split([share.numel() for share in shares])
    return [part.view_as(share) for part, share in zip(parts, shares, strict=True)]
