from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from limoe_dist.analysis import patches
from limoe_dist.analysis.patches import Looked, beside, data_address_of, draw, drawn_blocks, overlay, patch_choices
from limoe_dist.analysis.routing_record import BlockRouting, ExpertRouting
from limoe_dist.config.schema import Image as ImageSection


def looked(row: int, experts: list[int]) -> Looked:
    """A picture of 2 x 2 patches of 4 pixels; patch n has grey level 50 * n."""
    grey = np.kron(np.array([[0, 50], [100, 150]]), np.ones((4, 4))).astype(np.uint8)
    return Looked(row, f"row-{row}", "a <b>", grey[..., None].repeat(3, -1), {1: np.array(experts)})


def block_of(*image_tokens: int) -> BlockRouting:
    experts = tuple(
        ExpertRouting(
            expert=number,
            image_tokens=tokens,
            text_tokens=None,
            image_frac=None,
            of_images_frac=tokens / sum(image_tokens),
            of_texts_frac=None,
            kind="image",
        )
        for number, tokens in enumerate(image_tokens)
    )
    return BlockRouting(image=None, text=None, experts=experts)


def test_pixels_are_those_before_normalisation() -> None:
    image = ImageSection(mean=127.5, std=127.5)
    values = torch.tensor([-1.0, 1.0, 0.2, 9.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert patches.pixels(values, image)[0, :, :, 0].tolist() == [[0, 255], [153, 255]]


def test_a_patch_is_cut_where_it_lies() -> None:
    picture = looked(0, [0, 0, 0, 0])
    cut = [patches.patch_of(picture.pixels, patch, picture.experts[1]) for patch in range(4)]
    assert [set(patch.flatten().tolist()) for patch in cut] == [{0}, {50}, {100}, {150}]


def test_patches_are_tinted_by_expert_and_black_where_dropped() -> None:
    tinted = overlay(looked(0, [3, 3, -1, 7]).pixels, np.array([3, 3, -1, 7]), {3: "#ff0000"})
    # 0.4 of the grey and 0.6 of the colour.
    assert tinted[0, 0].tolist() == [153, 0, 0]
    assert tinted[0, 4].tolist() == [20 + 153, 20, 20]
    assert tinted[4, 0].tolist() == [patches.DROPPED] * 3
    # Expert 7 has no colour: that of all others.
    assert tinted[4, 4].tolist() == [int(0.4 * 150 + 0.6 * int(patches.OTHERS[i : i + 2], 16)) for i in (1, 3, 5)]


def test_patches_come_from_each_picture_in_turn() -> None:
    pictures = [looked(0, [5, 5, 5, 5]), looked(1, [5, 0, 0, 0]), looked(2, [0, 0, 0, -1])]
    chosen = patch_choices(pictures, 1, 5)
    assert [number for number, _ in chosen] == [0, 1, 0, 0, 0]
    assert sorted(patch for number, patch in chosen if number == 0) == [0, 1, 2, 3]
    assert patch_choices(pictures, 1, 5, most=2) == chosen[:2]
    assert patch_choices(pictures, 1, 9) == []


def test_of_many_blocks_four_are_drawn_the_ends_among_them() -> None:
    assert drawn_blocks([1, 3]) == [1, 3]
    assert drawn_blocks([1, 3, 5, 7, 9, 11]) == [1, 5, 7, 11]


def test_a_row_of_tiles_has_gaps() -> None:
    tile = np.zeros((4, 4, 3), dtype=np.uint8)
    assert beside([tile, tile]).shape == (4 + 2 * 3, 2 * (4 + 3) + 3, 3)
    assert beside([tile], width=2).shape == beside([tile, tile]).shape


def test_drawings_are_small_pictures_of_the_busiest_experts(tmp_path: Path) -> None:
    folder = tmp_path / "analysis-3"
    pictures = [looked(4, [2, 2, 0, -1]), looked(9, [2, 0, 0, 0])]
    # Of an earlier analysis: it goes.
    folder.mkdir()
    (folder / "block-1-expert-31.png").write_bytes(b"")
    found = draw(pictures, {1: block_of(4, 0, 3)}, folder, shown=1)
    assert found is not None
    assert found.side == 2
    # Expert 1 got nothing, and has neither colour nor sheet.
    assert [(each.expert, each.colour) for each in found.legend["1"]] == [(0, "#e69f00"), (2, "#56b4e9")]
    assert [sheet.expert for sheet in found.sheets["1"]] == [0, 2]
    assert sorted(found.sheets["1"][0].patches) == [(4, 2), (9, 1), (9, 2), (9, 3)]
    (shown,) = found.shown
    assert (shown.row, shown.experts) == (4, {"1": (2, 2, 0, -1)})
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [shown.file, *(sheet.file for sheet in found.sheets["1"])]
    )
    assert Image.open(folder / shown.file).size == (2 * (112 + 3) + 3, 112 + 6)
    assert draw([], {1: block_of(4)}, folder, shown=1) is None


def test_a_drawing_is_read_as_a_picture_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert data_address_of(file) is None
    file.write_bytes(b"<script>alert(1)</script>")
    assert data_address_of(file) is None
    Image.new("RGB", (20, 10), "red").save(file)
    drawn = data_address_of(file)
    assert drawn is not None
    assert drawn[0].startswith("data:image/")
    assert drawn[1:] == (20, 10)
    assert data_address_of(file, most_bytes=10) is None
