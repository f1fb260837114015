"""Which boxes of which logical tensors a checkpoint holds, from the headers of its files. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from limoe_dist.checkpoint.manifest import CheckpointManifest, Damaged, unreadable

KEY = "limoe"
SUFFIX = ".safetensors"
_Shape = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 63)], ...], Field(max_length=8)]
_Name = Annotated[str, Field(pattern=r"^.{1,300}$")]
_PLACES = TypeAdapter(dict[_Name, tuple[_Shape, _Shape]])
"""What stands under KEY in the header of a file: of each tensor its logical shape, and where its box begins."""
TYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1}


@dataclass(frozen=True)
class Part:
    """A box of a logical tensor."""

    file: Path
    shape: tuple[int, ...]
    """Of the logical tensor."""
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, BF16, ..."""


def contents(folder: Path, manifest: CheckpointManifest) -> dict[str, list[Part]]:
    """Every logical tensor with its boxes, from the headers of all files. Raises Damaged."""
    found: dict[str, list[Part]] = {}
    for file in manifest.files:
        if file.name.endswith(SUFFIX):
            for name, part in read_header(folder / file.name):
                found.setdefault(name, []).append(part)
    return dict(sorted(found.items()))


def read_header(path: Path) -> Iterator[tuple[str, Part]]:
    """The boxes of one file. Raises Damaged for a file that is no safetensors file, or none that a rank wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        # It checks the header's size, and that tensors lie within the file and do not overlap.
        with safe_open(path, framework="numpy") as file:
            placed = _PLACES.validate_json((file.metadata() or {}).get(KEY, ""))
            if unlike := set(file.keys()) ^ set(placed):
                raise Damaged(f"{path}: its header does not say where {plain(min(unlike))} belongs")
            for name, (shape, start) in placed.items():
                stored = file.get_slice(name)
                part = Part(path, shape, start, tuple(stored.get_shape()), str(stored.get_dtype()))
                if part.dtype not in TYPE_BYTES:
                    raise Damaged(f"{path}: {plain(name)} is of type {part.dtype}, which no rank writes")
                yield name, part
    except SafetensorError as error:
        raise Damaged(f"{path}: cannot be read: {error}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise Damaged(f"{path}: its header does not say where its tensors belong: {said}") from None


def misplaced(tensors: dict[str, list[Part]]) -> list[str]:
    """One sentence for each logical tensor of which the boxes do not hold every number exactly once."""
    return [problem for name, parts in tensors.items() if (problem := _misplaced(plain(name), parts))]


def _misplaced(name: str, parts: list[Part]) -> str | None:
    shape = parts[0].shape
    for part in parts:
        if part.shape != shape:
            return f"{part.file}: {name} is of shape {part.shape}, but of {shape} in {parts[0].file.name}"
        inside = len(part.start) == len(part.size) == len(shape) and all(
            begin + extent <= full for begin, extent, full in zip(part.start, part.size, shape, strict=True)
        )
        if not inside:
            return f"{part.file}: the box {part.start} + {part.size} of {name} does not fit into its shape {shape}"
    if not _tile(parts):
        files = ", ".join(sorted({part.file.name for part in parts}))
        return f"{parts[0].file.parent}: {files} do not hold every number of {name} exactly once"
    return None


def _tile(parts: Sequence[Part]) -> bool:
    """Whether boxes inside a shape hold every number of it exactly once.

    In a tiling an even number of boxes meets in every corner, but for the corners of the shape itself. Where that is so
    every number is held an odd number of times; where the volumes add up too, that is once.
    """
    shape = parts[0].shape
    odd = set(product(*((0, full) for full in shape)))
    for part in parts:
        if 0 not in part.size:
            odd ^= set(product(*((a, a + n) for a, n in zip(part.start, part.size, strict=True))))
    return not odd and sum(math.prod(part.size) for part in parts) == math.prod(shape)


def plain(text: str) -> str:
    """What a file claims may hold codes that a terminal obeys: they are shown, not sent."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
