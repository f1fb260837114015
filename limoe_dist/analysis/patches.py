"""Which expert each patch went to, as pictures: sheets of patches by expert, and whole pictures with coloured patches.

After Figure 2 of LIMoE (arXiv 2206.02770). All pixels are those that the model saw, decoded and encoded anew here.
Shapes: H = W pixels of a picture's side, N = n * n patches of a picture, row by row.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from limoe_dist.analysis.routing_record import (
    BlockRouting,
    Coloured,
    PatchSheet,
    Pictures,
    ShownPicture,
)
from limoe_dist.analysis.thumbnails import encoded
from limoe_dist.config.schema import Image as ImageSection

Pixels = npt.NDArray[np.uint8]

PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#7f4fc9")
"""Okabe and Ito's, told apart by people who do not see all colours, and a violet."""
OTHERS = "#b9bec4"
DROPPED = 24
_BETWEEN = 218
"""A grey between tiles, so that white ones are seen."""
MOST_BLOCKS = 4
MOST_SHEETS = 6
PATCHES = 24
COLUMNS = 12
SIDE = 112
"""Pixels of a whole picture in a sheet, at most; patches are as wide as a picture's side allows."""
PATCH_SIDE = 32
_GAP = 3


@dataclass(frozen=True)
class Looked:
    """A picture that was routed."""

    row: int
    key: str
    caption: str
    pixels: Pixels
    """(H, W, 3)"""
    experts: dict[int, npt.NDArray[np.int64]]
    """By block: (N,) the first choice of each patch; -1 where it got no slot."""


def pixels(images: Tensor, image: ImageSection) -> Pixels:
    """(n, 3, H, W) as the model gets them -> (n, H, W, 3) uint8."""
    values = (images.float() * image.std + image.mean).round().clamp(0, 255)
    return values.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def drawn_blocks(blocks: Sequence[int]) -> list[int]:
    """At most MOST_BLOCKS of them, evenly spread, the first and the last among them."""
    if len(blocks) <= MOST_BLOCKS:
        return list(blocks)
    return [blocks[round(i * (len(blocks) - 1) / (MOST_BLOCKS - 1))] for i in range(MOST_BLOCKS)]


def draw(looked: Sequence[Looked], blocks: dict[int, BlockRouting], folder: Path, *, shown: int) -> Pictures | None:
    """Writes the drawings into `folder`, which need not exist. None where no picture was looked at.

    shown: whole pictures, the first so many.
    """
    if not looked:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    side = math.isqrt(len(next(iter(looked[0].experts.values()))))
    numbers = drawn_blocks(list(blocks))
    experts = {block: _busiest(blocks[block]) for block in numbers}
    colours = {block: dict(zip(experts[block], PALETTE, strict=False)) for block in numbers}
    pictures = []
    for number, picture in enumerate(looked[:shown]):
        tiles = [picture.pixels] + [
            overlay(picture.pixels, picture.experts[block], colours[block]) for block in numbers
        ]
        file = _write(folder, f"picture-{number}", beside([_scaled(tile, SIDE) for tile in tiles]))
        maps = {str(block): tuple(experts_N.tolist()) for block, experts_N in picture.experts.items()}
        pictures.append(
            ShownPicture(row=picture.row, key=picture.key, caption=picture.caption, file=file, experts=maps)
        )
    sheets = {}
    for block in numbers:
        found = (_sheet(looked, block, expert, folder) for expert in experts[block][:MOST_SHEETS])
        sheets[str(block)] = tuple(sheet for sheet in found if sheet is not None)
    legend = {
        str(block): tuple(Coloured(expert=expert, colour=colour) for expert, colour in colours[block].items())
        for block in numbers
    }
    made = {each.file for each in pictures} | {each.file for of_block in sheets.values() for each in of_block}
    _forget_others(folder, made)
    names = tuple(str(block) for block in numbers)
    return Pictures(side=side, blocks=names, legend=legend, shown=tuple(pictures), sheets=sheets)


def _busiest(block: BlockRouting) -> list[int]:
    """The experts with the most image tokens, the busiest first; none without any."""
    order = sorted(block.experts, key=lambda expert: (-(expert.image_tokens or 0), expert.expert))
    return [expert.expert for expert in order if expert.image_tokens][: len(PALETTE)]


def patch_choices(looked: Sequence[Looked], block: int, expert: int, *, most: int = PATCHES) -> list[tuple[int, int]]:
    """(picture, patch) of patches that the expert processed: one of each picture in turn, until there are enough.

    Which one of a picture is random, the same for the same picture and expert: nothing is chosen for its looks.
    """
    queues = []
    for number, picture in enumerate(looked):
        mine = np.flatnonzero(picture.experts[block] == expert)
        queues.append([(number, int(patch)) for patch in np.random.default_rng([number, expert]).permutation(mine)])
    chosen: list[tuple[int, int]] = []
    turn = 0
    while len(chosen) < most and any(len(queue) > turn for queue in queues):
        chosen += [queue[turn] for queue in queues if len(queue) > turn]
        turn += 1
    return chosen[:most]


def _sheet(looked: Sequence[Looked], block: int, expert: int, folder: Path) -> PatchSheet | None:
    chosen = patch_choices(looked, block, expert)
    if not chosen:
        return None
    tiles = [
        _scaled(patch_of(looked[number].pixels, patch, looked[number].experts[block]), PATCH_SIDE)
        for number, patch in chosen
    ]
    rows = [beside(tiles[first : first + COLUMNS], width=COLUMNS) for first in range(0, len(tiles), COLUMNS)]
    file = _write(
        folder, f"block-{block}-expert-{expert}", np.concatenate([rows[0], *(row[_GAP:] for row in rows[1:])])
    )
    return PatchSheet(expert=expert, file=file, patches=tuple((looked[number].row, patch) for number, patch in chosen))


def patch_of(picture: Pixels, patch: int, experts_N: npt.NDArray[np.int64]) -> Pixels:
    """(h, h, 3): patch number `patch` of a picture with as many patches as experts_N has entries."""
    side = math.isqrt(len(experts_N))
    height = len(picture) // side
    y, x = patch // side * height, patch % side * height
    return picture[y : y + height, x : x + height]


def overlay(picture: Pixels, experts_N: npt.NDArray[np.int64], colours: dict[int, str]) -> Pixels:
    """The picture in grey, each patch tinted by its expert; black where none processed it."""
    side = math.isqrt(len(experts_N))
    height = len(picture) // side
    grey = picture.astype(np.float64).mean(-1, keepdims=True).repeat(3, axis=-1)
    out = np.empty_like(picture)
    for patch, expert in enumerate(experts_N.tolist()):
        y, x = patch // side * height, patch % side * height
        part = (slice(y, y + height), slice(x, x + height))
        if expert < 0:
            out[part] = DROPPED
            continue
        colour = np.array([int(colours.get(expert, OTHERS)[i : i + 2], 16) for i in (1, 3, 5)])
        out[part] = (0.4 * grey[part] + 0.6 * colour).astype(np.uint8)
    return out


def beside(tiles: Sequence[Pixels], *, width: int = 0) -> Pixels:
    """One row of equal tiles on grey, with gaps; as wide as `width` tiles."""
    height, breadth = tiles[0].shape[:2]
    columns = max(width, len(tiles))
    sheet = np.full((height + 2 * _GAP, columns * (breadth + _GAP) + _GAP, 3), _BETWEEN, dtype=np.uint8)
    for number, tile in enumerate(tiles):
        left = _GAP + number * (breadth + _GAP)
        sheet[_GAP : _GAP + height, left : left + breadth] = tile
    return sheet


def _scaled(tile: Pixels, side: int) -> Pixels:
    """Enlarged in whole steps, so that patches stay square, or made smaller."""
    factor = side // len(tile)
    if factor >= 1:
        return tile.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS))


def _write(folder: Path, name: str, sheet: Pixels) -> str:
    """PNG or JPEG, whichever is smaller; the file's name."""
    kind, content = encoded(Image.fromarray(sheet))
    temporary = folder / f".{name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(folder / f"{name}.{kind}")
    return f"{name}.{kind}"


def _forget_others(folder: Path, made: set[str]) -> None:
    """Removes drawings of an earlier analysis of the same step; no other file."""
    for pattern in ("picture-*.*", "block-*-expert-*.*"):
        for path in folder.glob(pattern):
            if path.name not in made and path.suffix in (".png", ".jpeg"):
                path.unlink(missing_ok=True)


def data_address_of(file: Path, *, most_bytes: int = 1 << 20) -> tuple[str, int, int] | None:
    """A data: address of a drawing, with its width and height; None for a file that is gone, large or no picture."""
    from limoe_dist.analysis.thumbnails import data_address

    try:
        if file.stat().st_size > most_bytes:
            return None
        content = file.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as picture:
            width, height = picture.size
            if width * height > 4 << 20:
                return None
            # Encoded anew: what the page holds was made here, whoever wrote the file.
            return data_address(picture.convert("RGB")), width, height
    # Decoders of damaged files raise all kinds.
    except Exception:
        return None
