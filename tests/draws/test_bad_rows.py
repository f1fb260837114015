"""Augmentation and captions of a batch in which some rows are bad, against each picture decoded alone.

The loader draws by position. A replacement row, the next good row of the shard, takes the draws of its position.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from limoe_dist.config.schema import Data, Image, Run, Text, Train
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.augment import augment_params, identity_params
from limoe_dist.data.dali import Decoder
from limoe_dist.data.evaluation import decode_rows, evaluation_batches
from limoe_dist.data.loader import Batch, Loader
from limoe_dist.data.order import row_at
from limoe_dist.data.tokenizer import open_tokenizer
from tests.draws import reference
from tests.support.shards import CONCEPTS, damaged, picture, truncated, write_shards

CPU = torch.device("cpu")
ROWS, SEED = 12, 6
AUGMENTED = Image(
    size=16,
    patch=8,
    min_crop_area=0.3,
    flip=0.5,
    rotate_degrees=20.0,
    scale=0.3,
    translate=0.2,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue_degrees=40.0,
)
RUN = Run(
    image=AUGMENTED,
    text=Text(length=24, vocab_size=100),
    data=Data(max_bad_frac=0.9),
    train=Train(batch_pairs=ROWS, steps=2, seed=SEED),
)
# Row r has 1 + r % 5 captions, all of them different.
CAPTIONS = {
    row: [f"{CONCEPTS[row % 8]} {CONCEPTS[(row // 8 + 2 * n) % 8]} {CONCEPTS[n]}" for n in range(1 + row % 5)]
    for row in range(ROWS)
}


def a_set(folder: Path, bad: Mapping[int, bytes]) -> Path:
    return write_shards(folder, rows=ROWS, shards=1, pictures=bad, captions=CAPTIONS)


def batches(path: Path, run: Run = RUN, *, rank: int = 0, world: int = 1) -> list[Batch]:
    shards = ShardSet(path)
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    with Loader(run, shards, tokenizer, rank=rank, world=world, first_step=0, device=CPU) as loader:
        return list(loader)


@pytest.fixture(scope="module")
def alone() -> Decoder:
    return Decoder(AUGMENTED, mode="train", batch_size=1, threads=1, device=CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Batch]]:
    path = a_set(tmp_path_factory.mktemp("whole"), {})
    return path, batches(path)


def augmented_alone(decoder: Decoder, row: int, position: int) -> torch.Tensor:
    params = augment_params(np.array([position]), AUGMENTED, seed=SEED)
    return decoder.decode([np.frombuffer(picture(row), dtype=np.uint8)], params)[0]


def caption_of(row: int, position: int) -> str:
    """The first draw of a position chooses the caption."""
    captions = CAPTIONS[row]
    return captions[int(reference.philox_uniforms(position, SEED, 1)[0] * len(captions))]


def order_of_epoch(epoch: int) -> list[int]:
    return row_at(np.arange(epoch * ROWS, (epoch + 1) * ROWS), rows=ROWS, seed=SEED)[1].tolist()


ORDER = order_of_epoch(0)
FIRST, MIDDLE, LAST = ORDER[0], ORDER[5], ORDER[-1]
NEXT = (FIRST + 1) % ROWS


def undecodable(*rows: int) -> dict[int, bytes]:
    """A whole header, and pixels that only the decoder finds to be damaged."""
    return {row: damaged(row) for row in rows}


def refused(*rows: int) -> dict[int, bytes]:
    """Bad by the header, before anything is decoded."""
    return {row: (b"", b"no picture", truncated(row, format="JPEG"))[n % 3] for n, row in enumerate(rows)}


BAD = {
    "none": {},
    "first": undecodable(FIRST),
    "middle": undecodable(MIDDLE),
    "last": undecodable(LAST),
    "first, by its header": refused(FIRST),
    "middle, by its header": refused(MIDDLE),
    "last, by its header": refused(LAST),
    "first and last": undecodable(FIRST, LAST),
    "neighbours in the batch": undecodable(*ORDER[3:6]),
    "neighbours in the shard": undecodable(FIRST, NEXT, (FIRST + 2) % ROWS),
    "both kinds": undecodable(ORDER[1], ORDER[7]) | refused(ORDER[4], ORDER[10], ORDER[11]),
    "all but two": undecodable(*ORDER[2:7]) | refused(*ORDER[7:]),
}


@pytest.mark.parametrize("name", BAD)
def test_every_picture_and_caption_beside_bad_rows_is_that_of_its_position(
    name: str, alone: Decoder, whole: tuple[Path, list[Batch]], tmp_path: Path
) -> None:
    bad = BAD[name]
    path = a_set(tmp_path, bad) if bad else whole[0]
    found = batches(path)
    tokenizer = open_tokenizer(RUN, ShardSet(path).manifest, ShardSet(path).folder)
    for epoch, batch in enumerate(found):
        # In the second epoch the bad rows are known before they are decoded.
        for place, row in enumerate(order_of_epoch(epoch)):
            position, used = epoch * ROWS + place, row
            while used in bad:
                used = (used + 1) % ROWS
            assert batch.rows[place] == used
            image = augmented_alone(alone, used, position)
            assert torch.equal(batch.images[place], image), f"epoch {epoch}, place {place}"
            expected = tokenizer([caption_of(used, position)])
            assert (batch.tokens[place].numpy() == expected.tokens[0]).all(), f"epoch {epoch}, place {place}"
            assert (batch.valid[place].numpy() == expected.valid[0]).all()
            if row not in bad:
                assert torch.equal(batch.images[place], whole[1][epoch].images[place])
                assert torch.equal(batch.tokens[place], whole[1][epoch].tokens[place])


def test_a_rank_beside_others_augments_by_global_positions(alone: Decoder, tmp_path: Path) -> None:
    path = a_set(tmp_path, undecodable(ORDER[7]))
    for batch in batches(path, rank=1, world=2):
        for place, used in enumerate(batch.rows.tolist()):
            assert torch.equal(batch.images[place], augmented_alone(alone, used, batch.first_position + place))


def test_the_pictures_of_this_file_tell_positions_and_rows_apart(alone: Decoder) -> None:
    # Else the comparisons above could not fail.
    images = [augmented_alone(alone, row, position) for row in range(3) for position in range(4)]
    for i, first in enumerate(images):
        assert all((first - second).abs().mean() > 0.02 for second in images[:i])
    assert len({text for captions in CAPTIONS.values() for text in captions}) == sum(map(len, CAPTIONS.values()))
    chosen = [CAPTIONS[row].index(caption_of(row, place)) for place, row in enumerate(ORDER) if len(CAPTIONS[row]) > 1]
    assert len({*chosen}) > 2


def test_captions_over_many_positions_are_those_of_the_first_draw(whole: tuple[Path, list[Batch]]) -> None:
    run = RUN.model_copy(update={"train": RUN.train.model_copy(update={"steps": 12})})
    tokenizer = open_tokenizer(run, ShardSet(whole[0]).manifest, ShardSet(whole[0]).folder)
    for epoch, batch in enumerate(batches(whole[0], run)):
        texts = [caption_of(row, epoch * ROWS + place) for place, row in enumerate(order_of_epoch(epoch))]
        assert (batch.tokens.numpy() == tokenizer(texts).tokens).all()


@pytest.mark.parametrize("bad", [{}, undecodable(0), undecodable(5, 6), refused(11), undecodable(0) | refused(3, 11)])
def test_evaluation_neither_augments_nor_replaces(bad: dict[int, bytes], tmp_path: Path) -> None:
    path = a_set(tmp_path, bad)
    shards = ShardSet(path)
    tokenizer = open_tokenizer(RUN, shards.manifest, shards.folder)
    plain = Decoder(Image(size=16, patch=8), mode="train", batch_size=1, threads=1, device=CPU)
    expected = [
        torch.zeros(3, 16, 16)
        if row in bad
        else plain.decode([np.frombuffer(picture(row), dtype=np.uint8)], identity_params(1))[0]
        for row in range(ROWS)
    ]
    (batch,) = evaluation_batches(RUN, shards, tokenizer, batch_pairs=ROWS, rank=0, world=1, device=CPU)
    assert torch.equal(batch.images, torch.stack(expected))
    assert batch.rows.tolist() == list(range(ROWS))
    assert batch.real.tolist() == [row not in bad for row in range(ROWS)]
    firsts = tokenizer([CAPTIONS[row][0] for row in range(ROWS)])
    assert (batch.tokens.numpy() == firsts.tokens).all()
    asked = [7, 5, 0, 0, 11]
    pictures = decode_rows(RUN, shards, asked, device=CPU)
    assert torch.equal(pictures.images, torch.stack([expected[row] for row in asked]))
    assert [reason is not None for reason in pictures.reasons] == [row in bad for row in asked]
