from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.data.arrow import ShardSet
from limoe_dist.eval.contrastive import Contrastive, accuracy_in_minibatches, contrastive, contrastive_of
from limoe_dist.eval.embed import Embedder
from limoe_dist.eval.retrieval import retrieval_of
from limoe_dist.eval.zeroshot import zeroshot_of
from limoe_dist.parallel.mesh import Mesh
from tests.eval.planted import CPU, RUN, PlantedModel, PlantedTokenizer, flat_shards
from tests.support.shards import CONCEPTS, truncated


def measured(shards: ShardSet, image: Tensor, text: Tensor, texts: list[str], *, minibatch: int) -> Contrastive:
    return contrastive(
        PlantedModel(image, text),  # type: ignore[arg-type]
        RUN.model_copy(update={"eval": RUN.eval.model_copy(update={"minibatch": minibatch})}),
        shards,
        PlantedTokenizer(texts),  # type: ignore[arg-type]
        mesh=Mesh.single(),
        device=CPU,
    )


def captioned(folder: Path, texts: list[str]) -> ShardSet:
    return flat_shards(folder, len(texts), captions={row: [text, "not used"] for row, text in enumerate(texts)})


def test_each_direction_within_its_minibatch(tmp_path: Path) -> None:
    # Scores of picture i (a row) for text j (a column); minibatches are pairs 0 and 1, and pairs 2 and 3; pair 4 is
    # left out. What lies outside a minibatch is 9: it would win everywhere.
    score = torch.full((5, 5), 9.0)
    score[:2, :2] = torch.tensor([[3.0, 2.0], [4.0, 1.0]])
    score[2:4, 2:4] = torch.tensor([[1.0, 0.0], [0.5, 0.6]])
    texts = [f"text {i}" for i in range(5)]
    found = measured(captioned(tmp_path, texts), score, torch.eye(5), texts, minibatch=2)
    # Image to text: picture 0 finds text 0 (3), picture 1 text 0 (4), 2 and 3 their own: 3 of 4.
    # Text to image: text 0 finds picture 1 (4), text 1 picture 0 (2), 2 and 3 their own: 2 of 4.
    assert (found.image_to_text, found.text_to_image, found.accuracy) == (3 / 4, 2 / 4, 5 / 8)
    assert (found.rows, found.minibatch, found.minibatches, found.left_out) == (4, 2, 2, 1)
    assert found.chance == 1 / 2


def test_fewer_rows_than_a_minibatch_are_one(tmp_path: Path) -> None:
    texts = ["a", "b", "c"]
    found = measured(captioned(tmp_path, texts), torch.eye(3), torch.eye(3), texts, minibatch=1024)
    assert (found.minibatch, found.asked, found.minibatches, found.rows, found.left_out) == (3, 1024, 1, 3, 0)
    assert (found.accuracy, found.chance) == (1.0, pytest.approx(1 / 3))


def test_an_equal_caption_is_right_too(tmp_path: Path) -> None:
    # Pictures 0 and 2 carry the same text, of axis 0. Picture 0 finds it; the text finds picture 2, which carries it.
    image = torch.tensor([[0.6, 0.5], [0.1, 1.0], [1.0, 0.0]])
    shards = captioned(tmp_path, ["A bear", "a tulip", "a  bear"])
    found = measured(shards, image, torch.eye(2), ["A bear", "a tulip"], minibatch=3)
    assert (found.image_to_text, found.text_to_image) == (1.0, 1.0)
    # Two of three texts are right for pictures 0 and 2, one for picture 1.
    assert found.chance == pytest.approx((2 / 3 + 1 / 3 + 2 / 3) / 3)


def test_an_equal_caption_in_another_minibatch_does_not_help() -> None:
    image = text = torch.eye(4)
    crossed = torch.tensor([0, 1, 0, 1])
    assert accuracy_in_minibatches(image, text, crossed, 2) == (1.0, 1.0)
    assert accuracy_in_minibatches(image, text.flip(0), torch.arange(4), 2) == (0.5, 0.5)


def test_rows_that_are_no_whole_pair_are_left_out_and_counted(tmp_path: Path) -> None:
    captions = {0: ["a"], 1: [" "], 2: ["c"], 3: ["d"], 4: ["e"]}
    shards = flat_shards(tmp_path, 5, captions=captions, pictures={2: truncated(2), 4: b""})
    image = torch.tensor([[1.0, 0.0], [9.0, 9.0], [9.0, 9.0], [0.0, 1.0], [9.0, 9.0]])
    found = measured(shards, image, torch.eye(2), ["a", "d"], minibatch=2)
    assert (found.rows, found.bad_rows, found.pictureless_rows, found.uncaptioned_rows) == (2, 1, 1, 1)
    assert found.accuracy == 1.0


def test_shards_without_a_pair_are_refused(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 2, captions={0: [], 1: ["a"]}, pictures={1: b""})
    with pytest.raises(UserError, match=r"no row has both .* and contrastive accuracy compares pictures"):
        measured(shards, torch.eye(2), torch.eye(2), ["a"], minibatch=2)


def test_a_model_that_embeds_all_alike_gets_chance(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(8)]
    found = measured(captioned(tmp_path, texts), torch.ones(8, 2), torch.ones(8, 2), texts, minibatch=4)
    assert found.image_to_text == found.text_to_image == found.chance == 1 / 4


def test_the_json_holds_every_figure(tmp_path: Path) -> None:
    texts = ["a", "b", "c"]
    found = json.loads(
        json.dumps(measured(captioned(tmp_path, texts), torch.eye(3), torch.eye(3), texts, minibatch=2).to_json())
    )
    assert {name: found[name] for name in ("image_to_text", "text_to_image", "accuracy", "chance")} == {
        "image_to_text": 1.0,
        "text_to_image": 1.0,
        "accuracy": 1.0,
        "chance": 0.5,
    }
    assert (found["minibatch"], found["minibatches"], found["rows"], found["left_out_rows"]) == (2, 1, 2, 1)


def test_all_tasks_share_one_embedding_of_the_pictures(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(8)]
    model = PlantedModel(torch.eye(8), torch.eye(16, 8))
    embedder = Embedder(
        model,  # type: ignore[arg-type]
        RUN,
        captioned(tmp_path, texts),
        PlantedTokenizer([*sorted(CONCEPTS), *texts]),  # type: ignore[arg-type]
        mesh=Mesh.single(),
        device=CPU,
    )
    zeroshot_of(embedder)
    retrieval_of(embedder)
    contrastive_of(embedder)
    assert model.rows == list(range(8))


def test_a_last_minibatch_that_is_exactly_full_counts(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(4)]
    found = measured(captioned(tmp_path, texts), torch.eye(4), torch.eye(4), texts, minibatch=2)
    assert (found.rows, found.minibatches, found.left_out) == (4, 2, 0)
