"""Weights and state of a rank as a formula of the settings: no module is built, and torch is not imported.

Every tensor of the model is a row of a table: its shape, what cuts it, what repeats it. `launch/memory.py` gets the
same numbers from the modules themselves, and a test holds this against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from limoe_dist.config.schema import Run


@dataclass(frozen=True)
class Weight:
    """One kind of tensor."""

    shape: tuple[int, ...]
    """As one process would hold it."""
    count: int
    """How many of them the model has."""
    axis: Literal["tp", "ep"] | None = None
    dim: int = 0
    """Which the axis cuts."""
    stacked: int = 0
    """Leading dims that put tensors together."""
    wide: bool = False
    """Kept in at least float32."""
    decay: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def weights_of(run: Run) -> Iterator[Weight]:
    """Every tensor of the model; see limoe_dist/model."""
    model, moe = run.model, run.moe
    width, hidden = model.width, model.mlp_dim
    head = (model.heads, width // model.heads)
    towers = 2 if model.towers == "two" else 1
    blocks, mixtures = towers * model.depth, len(moe.blocks)
    yield Weight((width, 3, run.image.patch, run.image.patch), 1, decay=True)
    yield Weight((width,), 1)
    yield Weight((run.image_tokens, width), 1)
    yield Weight((run.text.vocab_size, width), 1)
    yield Weight((run.text.length, width), 1)
    # Norms: two of each block, and the last of each tower.
    yield Weight((width,), 2 * (2 * blocks + towers), wide=True)
    yield Weight((3, *head, width), blocks, "tp", 1, stacked=1, decay=True)
    yield Weight((3, *head), blocks, "tp", 1, stacked=1)
    yield Weight((width, *head), blocks, "tp", 1, decay=True)
    yield Weight((width,), blocks)
    dense = blocks - mixtures
    yield Weight((hidden, width), dense, "tp", 0, decay=True)
    yield Weight((hidden,), dense, "tp", 0)
    yield Weight((width, hidden), dense, "tp", 1, decay=True)
    yield Weight((width,), dense)
    routers = (2,) if moe.routers == "per_modality" else ()
    yield Weight((*routers, width, moe.num_experts), mixtures, stacked=len(routers), wide=True, decay=True)
    yield Weight((moe.num_experts, width, hidden), mixtures, "ep", 0, stacked=1, decay=True)
    yield Weight((moe.num_experts, hidden), mixtures, "ep", 0, stacked=1)
    yield Weight((moe.num_experts, hidden, width), mixtures, "ep", 0, stacked=1, decay=True)
    yield Weight((moe.num_experts, width), mixtures, "ep", 0, stacked=1)
    yield Weight((width, model.embed_dim), 2, decay=True)
    yield Weight((), 1, wide=True)


@dataclass(frozen=True)
class Estimate:
    """Bytes, by the native engine; activations, decoded pictures and the framework's own memory come on top."""

    weights: int
    gradients: int
    masters: int
    """With the sums of this rank's pieces, where it has replicas."""
    optimizer: int
    """Of Adafactor with an upper bound of its scratch: a bucket."""
    scratch: int
    """That bound; 0 for AdamW."""
    checkpoint: int
    """On disk, of all ranks: masters and state."""

    @property
    def sum(self) -> int:
        return self.weights + self.gradients + self.masters + self.optimizer


def estimate(run: Run, *, world: int, dtype: Literal["fp32", "fp64", "bf16"]) -> Estimate:
    """Of rank 0, whose pieces are the largest, where the blocks compute in `dtype`; tp and ep divide what they cut."""
    sizes = {None: 1, "tp": run.parallel.tp, "ep": run.parallel.ep}
    small, wide = {"fp32": (4, 4), "fp64": (8, 8), "bf16": (2, 4)}[dtype]
    summed = 8 if "fp64" in (dtype, run.parallel.reduce_dtype) else 4
    adamw = run.optim.name == "adamw"
    weights = gradients = masters = sums = state = whole = 0
    kinds: dict[tuple[object, ...], int] = {}
    largest = 0
    for weight in weights_of(run):
        cut, replicas = sizes[weight.axis], world // sizes[weight.axis]
        local = _local(weight, cut)
        row = _row(weight, local, replicas)
        weights += weight.count * weight.size // cut * (wide if weight.wide else small)
        gradients += weight.count * row * replicas * summed
        masters += weight.count * row * summed
        sums += weight.count * row * summed if replicas > 1 else 0
        moments = 2 * row if adamw else row + _second(weight, local, replicas, run.optim.min_factored_dim)
        state += weight.count * moments * summed
        on_disk = (
            2 * weight.size if adamw else weight.size + _second(weight, weight.shape, 1, run.optim.min_factored_dim)
        )
        whole += weight.count * (weight.size + on_disk) * summed
        kind = (weight.axis, weight.decay, weight.wide and dtype == "bf16")
        kinds[kind] = kinds.get(kind, 0) + weight.count * row
        # A bucket is closed by the tensor that makes it full.
        if weight.count:
            largest = max(largest, row + math.ceil(run.parallel.bucket_mb * 1e6 / summed / replicas))
    scratch = 0 if adamw else min(largest, max(kinds.values())) * summed
    return Estimate(weights, gradients, masters + sums, state + scratch, scratch, whole)


def _local(weight: Weight, cut: int) -> tuple[int, ...]:
    """Shape on a rank; a scalar is a vector of length 1."""
    shape = [size // cut if weight.axis and dim == weight.dim else size for dim, size in enumerate(weight.shape)]
    return tuple(shape) or (1,)


def _cut_dim(weight: Weight, local: tuple[int, ...], replicas: int) -> int:
    """The dim along which ZeRO-1 cuts: as limoe_dist/parallel/pieces.py chooses it."""
    taken = {weight.dim} if weight.axis == "tp" else set()
    free = [dim for dim in range(weight.stacked, len(local)) if dim not in taken] or [weight.dim]
    even = [dim for dim in free if local[dim] % replicas == 0]
    return even[0] if even else max(free, key=lambda dim: local[dim])


def _row(weight: Weight, local: tuple[int, ...], replicas: int) -> int:
    """Numbers that each replica keeps, the padding of an uneven cut included."""
    dim = _cut_dim(weight, local, replicas)
    return math.prod(local) // local[dim] * -(-local[dim] // replicas)


def _second(weight: Weight, local: tuple[int, ...], replicas: int, shortest: int) -> int:
    """Numbers of Adafactor's second moment of a piece: rows and columns where both dims are long, else all."""
    local = local or (1,)
    dim = _cut_dim(weight, local, replicas)
    piece = (*local[:dim], -(-local[dim] // replicas), *local[dim + 1 :])
    dims = sorted(range(weight.stacked, len(weight.shape)), key=lambda each: weight.shape[each])
    if len(dims) < 2 or weight.shape[dims[-2]] < shortest:
        return math.prod(piece)
    return math.prod(piece) // piece[dims[-1]] + math.prod(piece) // piece[dims[-2]]
