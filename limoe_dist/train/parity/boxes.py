"""What rank 0 found alone reaches all ranks, and every rank compares the part that it holds.

A few logical tensors at a time cross the ranks, so that no rank needs room for a second model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from limoe_dist.parallel.collectives import max_over, sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard

KEY_BIAS, KEY_ROW = "attention.qkv_bias", 1
"""(3, heads, head width): queries, keys, values. A key's bias adds the same to all logits of a query, which changes no
attention: its true gradient is zero, and so its errors are absolute."""
KEYS = " (keys)"
BUNDLE_NUMBERS = 4_000_000


def told(
    values: Sequence[Tensor | None],
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    mesh: Mesh,
    device: torch.device,
) -> list[Tensor]:
    """The tensors that rank 0 gives, on every rank; `values` of other ranks are not looked at. A collective."""
    flat = torch.zeros(sum(math.prod(shape) for shape in shapes), dtype=dtype, device=device)
    parts = [
        part.view(tuple(shape))
        for part, shape in zip(flat.split([math.prod(shape) for shape in shapes]), shapes, strict=True)
    ]
    for part, value in zip(parts, values, strict=True):
        if mesh.rank == 0:
            assert value is not None
            part.copy_(value)
    # A sum with zeros: a broadcast by a wrapper that counts what crosses the ranks.
    sum_over(flat, mesh.world)
    return parts


def told_numbers(values: Sequence[float] | None, count: int, *, mesh: Mesh, device: torch.device) -> list[float]:
    """As `told`, for a list of numbers."""
    given = None if values is None else torch.tensor(values, dtype=torch.float64)
    (found,) = told([given], [(count,)], torch.float64, mesh=mesh, device=device)
    numbers: list[float] = found.tolist()
    return numbers


def class_of(name: str) -> str:
    """A parameter's name without the number of its block: parameters of one kind have one scale."""
    return re.sub(r"blocks\.\d+\.", "blocks.*.", name)


def errors_of_boxes(
    found: Mapping[str, Shard],
    wanted: Mapping[str, Tensor],
    *,
    mesh: Mesh,
    device: torch.device,
    spread: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The largest error of each tensor over all ranks, by name; inf where a number is not finite. A collective.

    Relative to the largest number of the tensor's class, or absolute where that is zero; key biases absolute.
    wanted, spread, masks: whole logical tensors, read on rank 0 alone.
    spread: the tensors that give the scales, where those are not `wanted`.
    masks: where there is something to compare; everywhere where it is left out.
    """
    scales = _scales(list(found), wanted if spread is None else spread, mesh=mesh, device=device)
    errors = {label: torch.zeros((), dtype=torch.float64, device=device) for label in labels_of(found)}
    for names in _bundles(found):
        shapes, dtype = [found[name].shape for name in names], found[names[0]].tensor.dtype
        wholes = told([wanted.get(name) for name in names], shapes, dtype, mesh=mesh, device=device)
        known: Sequence[Tensor | None] = [None] * len(names)
        if masks is not None:
            known = told([masks.get(name) for name in names], shapes, torch.uint8, mesh=mesh, device=device)
        for name, whole, mask in zip(names, wholes, known, strict=True):
            shard = found[name]
            difference = (shard.tensor.to(device) - box_of(whole, shard)).abs().double()
            if mask is not None:
                difference *= box_of(mask, shard)
            for label, part in parts_of(name, difference, first=shard.start[0] if shard.start else 0):
                if part.numel():
                    errors[label] = part.max() / (1.0 if label.endswith(KEYS) else scales[class_of(name)])
    worst = max_over(torch.stack(list(errors.values())).nan_to_num(nan=torch.inf), mesh.world)
    return dict(zip(errors, worst.tolist(), strict=True))


def _bundles(found: Mapping[str, Shard]) -> Iterator[list[str]]:
    """Names whose whole tensors, of one type, are told together: one alone, or several small ones."""
    by_type = sorted(found, key=lambda name: str(found[name].tensor.dtype))
    bundle: list[str] = []
    for name in by_type:
        together = [*bundle, name]
        numbers = sum(math.prod(found[other].shape) for other in together)
        if bundle and (found[bundle[0]].tensor.dtype != found[name].tensor.dtype or numbers > BUNDLE_NUMBERS):
            yield bundle
            together = [name]
        bundle = together
    yield bundle


def fill_boxes(mine: Mapping[str, Shard], wanted: Mapping[str, Tensor], *, mesh: Mesh, device: torch.device) -> None:
    """Gives every rank its boxes of the whole tensors that rank 0 has. A collective."""
    for names in _bundles(mine):
        shapes, dtype = [mine[name].shape for name in names], mine[names[0]].tensor.dtype
        wholes = told([wanted.get(name) for name in names], shapes, dtype, mesh=mesh, device=device)
        for name, whole in zip(names, wholes, strict=True):
            mine[name].tensor.copy_(box_of(whole, mine[name]))


def _scales(
    names: Sequence[str], tensors: Mapping[str, Tensor], *, mesh: Mesh, device: torch.device
) -> dict[str, float]:
    classes = list(dict.fromkeys(class_of(name) for name in names))
    largest = dict.fromkeys(classes, 0.0)
    for name in names if mesh.rank == 0 else ():
        for label, part in parts_of(name, tensors[name], first=0):
            if part.numel() and not label.endswith(KEYS):
                largest[class_of(name)] = max(largest[class_of(name)], part.abs().max().item())
    numbers = told_numbers(list(largest.values()), len(classes), mesh=mesh, device=device)
    return {name: number or 1.0 for name, number in zip(classes, numbers, strict=True)}


def labels_of(names: Iterable[str]) -> list[str]:
    """The names under which errors are told: those of tensors, and of the keys in biases that hold them."""
    return [label for name in names for label in ((name, name + KEYS) if name.endswith(KEY_BIAS) else (name,))]


def parts_of(name: str, tensor: Tensor, *, first: int) -> Iterator[tuple[str, Tensor]]:
    """The tensor under its name; of a bias that holds keys, and whose first row is row `first`, those apart."""
    if not name.endswith(KEY_BIAS):
        yield name, tensor
        return
    is_key = torch.arange(first, first + len(tensor), device=tensor.device) == KEY_ROW
    yield name, tensor[~is_key]
    yield name + KEYS, tensor[is_key]


def box_of(whole: Tensor, part: Shard) -> Tensor:
    """The part of a whole logical tensor that a rank holds."""
    if not part.shape:
        return whole.reshape(-1)[: part.tensor.numel()].view(part.tensor.shape)
    places = zip(part.start, part.tensor.shape, strict=True)
    return whole[tuple(slice(start, start + size) for start, size in places)]
