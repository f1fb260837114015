"""What a rank keeps from step to step: a closed formula over ZeRO-1's pieces, their padding included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from limoe_dist.config.schema import Run
from limoe_dist.optim.adafactor import Adafactor
from limoe_dist.optim.engine import wide_dtype
from limoe_dist.parallel.pieces import Bucket


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds through the whole run, by the native engine; activations come on top."""

    weights: int
    gradients: int
    """Buffers of all parameters that the rank holds, in parallel.reduce_dtype."""
    summed_pieces: int
    """Sums of this rank's pieces; 0 where a rank has no replicas, for the buffers hold the sums then."""
    masters: int
    """At least float32, of this rank's pieces."""
    optimizer: int
    """AdamW: two moments of this rank's pieces. Adafactor: the first, rows and columns of the second, and scratch."""
    sum: int
    saved: int
    """Masters and the optimizer's state, as a checkpoint holds them: once more in the memory of the host, from which
    they are written. Not in `sum`."""


def memory_of(buckets: Sequence[Bucket], run: Run) -> Memory:
    """Buckets of a model whose weights have their final type; for rank 0, whose pieces are the largest."""
    dtype = wide_dtype(run)
    kept = sum(bucket.length for bucket in buckets) * dtype.itemsize
    cut = sum(bucket.length for bucket in buckets if bucket.replicas.size > 1) * dtype.itemsize
    state, scratch = (2 * kept, 0) if run.optim.name == "adamw" else _adafactor_bytes(buckets, run, dtype)
    parts = {
        "weights": sum(piece.parameter.nbytes for bucket in buckets for piece in bucket.pieces),
        "gradients": sum(bucket.replicas.size * bucket.length for bucket in buckets) * dtype.itemsize,
        "summed_pieces": cut,
        "masters": kept,
        "optimizer": state + scratch,
    }
    return Memory(**parts, sum=sum(parts.values()), saved=kept + state)


def _adafactor_bytes(buckets: Sequence[Bucket], run: Run, dtype: torch.dtype) -> tuple[int, int]:
    """State: momentum of the pieces, padding included, and second moments as they are factored. Scratch: a bucket."""
    flats = [torch.empty(bucket.length, dtype=dtype, device="meta") for bucket in buckets]
    state = Adafactor(list(buckets), flats, flats, run.optim).shards()
    seconds = [shard.tensor for name, shard in state.items() if not name.startswith("adafactor/momentum/")]
    return sum(tensor.nbytes for tensor in [*flats, *seconds]), max(flat.nbytes for flat in flats)
