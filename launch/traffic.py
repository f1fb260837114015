"""What a training step moves between ranks: a closed formula for each collective of limoe_dist.train.step.

    forward           tp: all-gather before attention and dense MLP, reduce-scatter after them; all-gather of text masks
                      ep: all-to-all to the experts, all-to-all back
    backward          tp, ep: each of them but the masks turned round: an all-gather becomes a reduce-scatter
    embedding pass    the forward once more, where train.microbatch_pairs cuts the batch of a rank
    recompute         the forward once more with train.recompute, but for the reduce-scatter after a dense MLP: torch
                      stops a block's second forward when it has the last tensor that the backward needs
    loss              world: all-gather of both embeddings, reduce-scatter of their gradients
    update            reduce-scatter of gradients and all-gather of weights over the replicas (world, dp or edp),
                      all-reduce of the gradient's norm, and of Adafactor's means of rows and columns that ranks share

Bytes are those of full buffers, as limoe_dist.parallel.traffic counts them. Not part of a step, and not counted:
the votes, metrics, evaluations and checkpoints of the loop.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from limoe_dist.config.schema import Run
from limoe_dist.optim.adafactor import factored_dims
from limoe_dist.optim.engine import wide_dtype
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.pieces import Bucket, Piece

if TYPE_CHECKING:
    from launch.counting import Shape

Op = Literal["all_gather", "reduce_scatter", "all_to_all", "all_reduce"]
During = Literal["forward", "backward", "embedding pass", "recompute", "loss", "update"]

REVERSED: dict[Op, Op] = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "all_to_all": "all_to_all",
}
NUMBER_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind in one step of one rank."""

    op: Op
    axis: str
    ranks: int
    """Of a group of the axis."""
    moves: str
    during: During
    calls: int
    num_bytes: int
    """Of all calls together, whole buffers: an all-gather's output, an all-reduce's tensor, the others' input."""
    leaving_bytes: int
    """What leaves the rank at the least: (n - 1) / n of the whole among n ranks; for an all-reduce twice that."""


def num_microbatches(run: Run, world: int) -> int:
    """Microbatches of a rank in a step; 1: its pairs all at once."""
    pairs = run.train.batch_pairs // world
    return pairs // (run.train.microbatch_pairs or pairs)


def extra_passes(run: Run, world: int) -> list[During]:
    """Forward passes besides the one that every step needs."""
    embedding: list[During] = ["embedding pass"] if num_microbatches(run, world) > 1 else []
    return [*embedding, "recompute"] if run.train.recompute else embedding


def step_exchanges(run: Run, shape: Shape, mesh: Mesh, buckets: Sequence[Bucket]) -> list[Exchange]:
    """Every exchange of `training_step` on the rank whose place the mesh gives; train.dtype must not be auto."""
    passes: list[During] = ["forward", "backward", *extra_passes(run, mesh.world.size)]
    found = [exchange for during in passes for exchange in _in_blocks(run, shape, mesh, during)]
    found += [*_in_loss(run, mesh), *_in_update(run, mesh, buckets)]
    return [exchange for exchange in found if exchange.ranks > 1 and exchange.calls]


def _exchange(op: Op, axis: Axis, moves: str, during: During, *, calls: int, num_bytes: int) -> Exchange:
    crossings = axis.size - 1 if op != "all_reduce" else 2 * (axis.size - 1)
    leaving = -(-num_bytes * crossings // axis.size)
    return Exchange(op, axis.name, axis.size, moves, during, calls, num_bytes, leaving)


def _in_blocks(run: Run, shape: Shape, mesh: Mesh, during: During) -> Iterator[Exchange]:
    """One pass over all blocks and all microbatches of a rank."""
    pairs, parts = run.train.batch_pairs // mesh.world.size, num_microbatches(run, mesh.world.size)
    moe_blocks, blocks = len(shape.moe_blocks), run.model.depth
    # With two towers pictures and captions go through their own blocks one after the other: twice the calls, as many
    # bytes; masks are those of captions.
    towers = 2 if run.model.towers == "two" else 1
    inner = NUMBER_BYTES[run.train.dtype]
    gathered = mesh.tp.size * pairs * shape.tokens_per_pair * run.model.width
    buffers = shape.num_experts * shape.groups // mesh.world.size * shape.capacity * run.model.width
    # Attention in every block, the MLP in dense ones.
    gathers = scatters = 2 * blocks - moe_blocks
    if during == "recompute":
        scatters = blocks
    masks = blocks if run.text.pad == "masked" and during != "backward" else 0
    mask_bytes = mesh.tp.size * pairs * shape.text_tokens
    kinds: list[tuple[Op, Axis, int, int]] = [
        ("all_gather", mesh.tp, gathers, gathered * inner),
        ("reduce_scatter", mesh.tp, scatters, gathered * inner),
        ("all_to_all", mesh.ep, 2 * moe_blocks, buffers * inner),
    ]
    moves = "token gradients" if during == "backward" else "tokens"
    for op, axis, times, num_bytes in kinds:
        op = REVERSED[op] if during == "backward" else op
        yield _exchange(op, axis, moves, during, calls=times * parts * towers, num_bytes=times * num_bytes)
    yield _exchange("all_gather", mesh.tp, "text masks", during, calls=masks * parts, num_bytes=masks * mask_bytes)


def _in_loss(run: Run, mesh: Mesh) -> Iterator[Exchange]:
    num_bytes = 2 * run.train.batch_pairs * run.model.embed_dim * _wide_bytes(run)
    yield _exchange("all_gather", mesh.world, "embeddings", "loss", calls=2, num_bytes=num_bytes)
    yield _exchange("reduce_scatter", mesh.world, "embedding gradients", "loss", calls=2, num_bytes=num_bytes)


def _in_update(run: Run, mesh: Mesh, buckets: Sequence[Bucket]) -> Iterator[Exchange]:
    for axis in (mesh.world, mesh.dp, mesh.edp):
        over = [bucket for bucket in buckets if bucket.replicas.name == axis.name]
        sums = sum(bucket.length for bucket in over) * axis.size * wide_dtype(run).itemsize
        weights = sum(bucket.length * bucket.dtype.itemsize for bucket in over) * axis.size
        yield _exchange("reduce_scatter", axis, "gradients", "update", calls=len(over), num_bytes=sums)
        yield _exchange("all_gather", axis, "weights", "update", calls=len(over), num_bytes=weights)
    # One float64 number.
    yield _exchange("all_reduce", mesh.world, "gradient norm", "update", calls=1, num_bytes=8)
    if run.optim.name == "adafactor":
        yield from _adafactor(run, [piece for bucket in buckets for piece in bucket.pieces])


def _adafactor(run: Run, pieces: Sequence[Piece]) -> Iterator[Exchange]:
    """Sums over a dim that ranks cut, those of all matrices in one tensor for each way in which dims are cut."""
    numbers: dict[tuple[Axis, ...], int] = defaultdict(int)
    for piece in pieces:
        dims = factored_dims(piece.placement, shortest=run.optim.min_factored_dim) or ()
        cut = sorted((dim for dim in dims if piece.axes[dim]), key=lambda dim: [axis.name for axis in piece.axes[dim]])
        for dim in cut:
            numbers[piece.axes[dim]] += _numbers_but(piece, dim)
        if len(cut) == 2:
            # The mean of all squares goes with the later of the two.
            numbers[piece.axes[cut[1]]] += _numbers_but(piece, *cut)
    for axes, count in numbers.items():
        for axis in axes:
            num_bytes = count * wide_dtype(run).itemsize
            yield _exchange("all_reduce", axis, "Adafactor means", "update", calls=1, num_bytes=num_bytes)


def _numbers_but(piece: Piece, *dims: int) -> int:
    """Numbers of a piece after a mean over some dims."""
    return math.prod(length for dim, length in enumerate(piece.shape) if dim not in dims)


def _wide_bytes(run: Run) -> int:
    """Of a number that stays at least float32."""
    return max(NUMBER_BYTES[run.train.dtype], 4)
