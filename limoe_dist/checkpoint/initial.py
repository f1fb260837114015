"""Weights of another run to begin with: by name, positions interpolated to other lengths.

Pictures of another size have another grid of patches: learned positions are resized as a picture is, bilinearly and
smoothed where the grid shrinks. Texts of another length have them resized along the one direction (ViT, arXiv
2010.11929, section 3.2; for texts the same in one dimension).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from limoe_dist.checkpoint.contents import plain
from limoe_dist.checkpoint.manifest import NAME
from limoe_dist.checkpoint.reader import Reader, on_all_ranks, open_checkpoint
from limoe_dist.parallel.background import patiently
from limoe_dist.parallel.collectives import raise_together, vote
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard


@dataclass(frozen=True)
class Taken:
    """What a run began with."""

    checkpoint: Path
    tokenizer: str
    """sha256 of the vocabulary that those weights know."""
    names: tuple[str, ...]
    """Parameters whose values were taken."""
    resized: tuple[str, ...]
    """Those of them that are positions of another length."""
    missing: tuple[str, ...]
    """Parameters of this model that the other has not: they keep their first values."""
    unknown: tuple[str, ...]
    """Parameters of the other model that this one has not."""

    def text(self, tokenizer: str) -> str:
        """For a person; `tokenizer`: sha256 of this run's vocabulary."""
        lines = [f"beginning with {len(self.names)} parameters of {self.checkpoint}"]
        for what, names in (
            ("positions were resized", self.resized),
            ("not there, and left at their first values", self.missing),
            ("unknown here, and left out", self.unknown),
        ):
            if names:
                lines.append(f"  {what} ({len(names)}): {plain(', '.join(names))}")
        if tokenizer != self.tokenizer:
            lines.append("  warning: it was trained with another vocabulary: the same text is other tokens to it")
        return "\n".join(lines)


IMAGE, TEXT = "model/image_embed.position", "model/text_embed.position"


def take_weights(place: Path, weights: dict[str, Shard], mesh: Mesh, device: torch.device) -> Taken:
    """Fills `weights` (`model/NAME`), in place, from a checkpoint, or from the newest whole one of a run. A collective.

    Raises UserError, on all ranks and before anything is filled, where a parameter of the same name has another shape,
    but for positions, or none has the same name.
    """
    (is_checkpoint,) = vote(mesh.world, device, int((place / NAME).is_file()))
    reader = Reader(place, mesh, device) if is_checkpoint else open_checkpoint(place, mesh, device)
    stored = {name for name in reader.names if name.startswith("model/")}
    common = sorted(stored & set(weights))
    other = [name for name in common if reader.shape(name) != weights[name].shape]
    resized = [name for name in other if _can_resize(name, reader.shape(name), weights[name].shape)]
    raise_together(_problems(reader, weights, common, sorted(set(other) - set(resized))), mesh.world, device)

    def fill() -> None:
        for name in common:
            shard = weights[name]
            if name in resized:
                _fill(shard, _resized(name, reader.whole(name), shard.shape[0]))
            else:
                reader.fill(name, shard.tensor, shard.start)

    with on_all_ranks(mesh, device):
        patiently(fill, mesh.world, device)
    return Taken(
        checkpoint=reader.checkpoint,
        tokenizer=reader.state.tokenizer,
        names=_plain(common),
        resized=_plain(resized),
        missing=_plain(set(weights) - stored),
        unknown=_plain(stored - set(weights)),
    )


def _problems(reader: Reader, weights: dict[str, Shard], common: list[str], other: list[str]) -> list[str]:
    if not common:
        return [f"train.init_from={reader.checkpoint}: none of its parameters has the name of one of this model"]
    return [
        f"train.init_from={reader.checkpoint}: {name.removeprefix('model/')} has shape {reader.shape(name)} there and "
        f"{weights[name].shape} here: begin from a run of the same widths, experts, patch size and vocabulary"
        for name in other
    ]


def _can_resize(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    square = name != IMAGE or all(math.isqrt(shape[0]) ** 2 == shape[0] for shape in (before, after))
    return name in (IMAGE, TEXT) and len(before) == 2 and before[1:] == after[1:] and square


def _plain(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(name.removeprefix("model/") for name in names))


@torch.no_grad()
def _fill(shard: Shard, whole: Tensor) -> None:
    window = tuple(slice(a, a + n) for a, n in zip(shard.start, shard.tensor.shape, strict=True))
    shard.tensor.copy_(whole[window])


def _resized(name: str, position_ND: Tensor, length: int) -> Tensor:
    """(N, D) -> (length, D): pictures as a square grid of patches, texts as a row."""
    before, after = (_grid(name, n) for n in (len(position_ND), length))
    grid = position_ND.double().T.reshape(1, -1, *before)
    resized = F.interpolate(grid, size=after, mode="bilinear", align_corners=False, antialias=True)
    return resized.reshape(-1, length).T


def _grid(name: str, length: int) -> tuple[int, int]:
    if name == TEXT:
        return 1, length
    side = math.isqrt(length)
    return side, length // side
