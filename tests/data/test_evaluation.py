from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limoe_dist.config.schema import Image, Run, Text
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import EvalBatch, decode_rows, evaluation_batches, num_evaluation_batches
from limoe_dist.data.tokenizer import open_tokenizer
from tests.support.shards import damaged, write_shards

CPU = torch.device("cpu")
RUN = Run(
    image=Image(size=16, patch=8, flip=0.5, rotate_degrees=20.0, brightness=0.5), text=Text(length=8, vocab_size=100)
)


def of_rank(shards: ShardSet, rank: int, world: int, *, batch_pairs: int = 4) -> list[EvalBatch]:
    tokenizer = open_tokenizer(RUN, shards.manifest, shards.folder)
    return list(evaluation_batches(RUN, shards, tokenizer, batch_pairs=batch_pairs, rank=rank, world=world, device=CPU))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 11, 12, 13])
def test_every_row_is_real_once_and_all_ranks_make_the_same_number_of_batches(
    tmp_path: Path, world: int, rows: int
) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=rows, shards=1))
    ranks = [of_rank(shards, rank, world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {num_evaluation_batches(rows, batch_pairs=4, world=world)}
    assert {tuple(batch.images.shape) for batches in ranks for batch in batches} == {(4, 3, 16, 16)}
    seen = [
        int(row)
        for batches in ranks
        for batch in batches
        for row, real in zip(batch.rows, batch.real, strict=True)
        if real
    ]
    assert sorted(seen) == list(range(rows))


def test_pictures_are_those_of_the_rows_without_augmentation(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=11, shards=2))
    alone = [decode_rows(RUN, shards, [row], device=CPU).images[0] for row in range(11)]
    for rank in range(2):
        for batch in of_rank(shards, rank, 2):
            for row, image in zip(batch.rows, batch.images, strict=True):
                assert torch.equal(image, alone[row])
    assert len({image.sum().item() for image in alone}) == 11


def test_a_batch_tells_keys_concepts_captions_and_the_first_caption_s_tokens(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=3, shards=1))
    (batch,) = of_rank(shards, 0, 1)
    assert batch.rows.tolist() == [0, 1, 2, 0]
    assert batch.real.tolist() == [True, True, True, False]
    assert batch.keys == ("row-0", "row-1", "row-2", "row-0")
    assert batch.concepts == ("red square", "green circle", "blue stripe", "red square")
    assert batch.captions[1] == ("a green circle", "picture of a green circle")
    tokenizer = open_tokenizer(RUN, shards.manifest, shards.folder)
    expected = tokenizer(["a red square", "a green circle", "a blue stripe", "a red square"])
    assert batch.tokens is not None
    assert batch.valid is not None
    assert (batch.tokens.numpy() == expected.tokens).all()
    assert (batch.valid.numpy() == expected.valid).all()


def test_bad_rows_are_reported_once_and_not_real(tmp_path: Path) -> None:
    # Row 0 also pads the last batch, where it is not reported again.
    path = write_shards(tmp_path, rows=6, shards=1, pictures={0: damaged(0), 4: b""}, captions={2: [""]})
    batches = of_rank(ShardSet(path), 0, 1)
    assert [batch.real.tolist() for batch in batches] == [[False, True, False, True], [False, True, False, False]]
    assert [(bad.position, bad.key) for batch in batches for bad in batch.bad] == [
        (0, "row-0"),
        (2, "row-2"),
        (4, "row-4"),
    ]
    assert batches[0].images[0].abs().sum() == 0
    assert batches[0].images[1].abs().sum() > 0


def test_without_a_tokenizer_only_the_picture_counts(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=2, shards=1, captions={1: []}))
    (batch,) = evaluation_batches(RUN, shards, None, batch_pairs=2, rank=0, world=1, device=CPU)
    assert batch.tokens is None
    assert batch.real.tolist() == [True, True]
    assert batch.captions[1] == ()


def test_some_rows_are_each_real_once_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=9, shards=2))
    asked = [7, 2, 5, 0, 8]
    ranks = [
        list(evaluation_batches(RUN, shards, None, batch_pairs=2, rank=rank, world=2, device=CPU, numbers=asked))
        for rank in range(2)
    ]
    # Places 0 1 | 2 3 | 4, and padding with the first one asked for.
    assert [[batch.rows.tolist() for batch in batches] for batches in ranks] == [[[7, 2], [8, 7]], [[5, 0], [7, 7]]]
    assert [[batch.places.tolist() for batch in batches] for batches in ranks] == [[[0, 1], [4, 0]], [[2, 3], [0, 0]]]
    assert [batch.real.tolist() for batch in ranks[0]] == [[True, True], [True, False]]
    assert [batch.real.tolist() for batch in ranks[1]] == [[True, True], [False, False]]


def test_rows_can_be_asked_for_in_any_order(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=5, shards=1, pictures={3: b""}))
    pictures = decode_rows(RUN, shards, [4, 3, 0, 4], device=CPU)
    assert pictures.reasons == (None, "no picture", None, None)
    assert torch.equal(pictures.images[0], pictures.images[3])
    assert not torch.equal(pictures.images[0], pictures.images[2])
