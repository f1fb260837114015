from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.data.arrow import ShardSet
from limoe_dist.eval.retrieval import Recall, Retrieval, retrieval, texts_of_pictures
from limoe_dist.parallel.mesh import Mesh
from tests.eval.planted import CPU, RUN, PlantedModel, PlantedTokenizer, flat_shards
from tests.support.shards import truncated


def retrieve(
    shards: ShardSet, image: Tensor, text: Tensor, texts: list[str], *, captions: Literal["first", "all"] = "first"
) -> Retrieval:
    model = PlantedModel(image, text)
    return retrieval(
        model,  # type: ignore[arg-type]
        RUN.model_copy(update={"eval": RUN.eval.model_copy(update={"captions": captions})}),
        shards,
        PlantedTokenizer(texts),  # type: ignore[arg-type]
        mesh=Mesh.single(),
        device=CPU,
    )


def test_recall_both_ways_of_a_known_ranking(tmp_path: Path) -> None:
    # Texts are the axes. Scores of picture i (a row) for text j (a column), 12 x 12, all 0 but for:
    #   (0, 0) = 1       picture 0 finds text 0 first, and text 0 picture 0
    #   (1, 2..5) = 1, (1, 1) = 0.5: picture 1 finds text 1 at place 5; text 1 finds picture 1 first
    # Pictures 2 to 5 score -1 for all texts up to their own, -2 for their own: theirs comes last, at place 12.
    # Pictures 6 to 11 score all 0: ties go to the lower number, so that picture i finds text i at place i + 1.
    score = torch.zeros(12, 12)
    score[0, 0] = 1
    score[1, 2:6], score[1, 1] = 1, 0.5
    for i in range(2, 6):
        score[i] = -1
        score[i, i] = -2
    captions = [f"text {i}" for i in range(12)]
    shards = flat_shards(tmp_path, 12, captions={i: [text, "not used"] for i, text in enumerate(captions)})
    found = retrieve(shards, score, torch.eye(12), captions)
    # Image to text, places: 1, 5, 12 x 4, 7, 8, 9, 10, 11, 12.
    assert found.image_to_text == Recall(1 / 12, 2 / 12, 6 / 12)
    # Text to image: texts 0 and 1 first. Texts 2 to 5: picture 1, then pictures 0 and 6 to 11, the three others of
    # 2 to 5, and the own one last: place 12. Texts 6 to 11: pictures 0, 1, then 6, 7, ...: text i at place i - 3.
    assert found.text_to_image == Recall(2 / 12, (2 + 3) / 12, (2 + 6) / 12)
    assert found.chance_image_to_text.at5 == pytest.approx(5 / 12)
    assert found.chance_text_to_image.at10 == pytest.approx(10 / 12)


def test_equal_captions_are_one_text_and_any_of_its_pictures_is_right(tmp_path: Path) -> None:
    # Pictures 0 and 2 carry the same text. Picture 2 is the nearest to it: without the rule, picture 0 would count
    # as not found by its text, and one of two equal texts as wrong for each picture.
    captions = {0: ["A bear"], 1: ["a tulip"], 2: ["a  bear"]}
    image = torch.tensor([[0.6, 0.5], [0.1, 1.0], [1.0, 0.0]])
    found = retrieve(flat_shards(tmp_path, 3, captions=captions), image, torch.eye(2), ["A bear", "a tulip"])
    assert (found.rows, found.texts) == (3, 2)
    assert found.image_to_text.at1 == 1.0
    assert found.text_to_image.at1 == 1.0
    # The text of two of three pictures: 2/3; the other: 1/3.
    assert found.chance_text_to_image.at1 == pytest.approx(0.5)
    assert [example.text for example in found.examples] == ["A bear", "a tulip", "A bear"]
    assert found.examples[0].rows == (2, 0, 1)


def test_equal_captions_are_one_text_that_keeps_its_first_spelling() -> None:
    # Picture 0 has two captions that are equal, and so one link; picture 3's first caption is picture 0's other one.
    carried = texts_of_pictures([["Bear", "bear ", "grizzly"], ["tulip"], ["bear ", "Tulip"], ["Grizzly"]])
    assert carried.texts == ("Bear", "grizzly", "tulip")
    assert carried.first_R.tolist() == [0, 2, 0, 1]
    assert carried.link_L2.tolist() == [[0, 0], [0, 1], [1, 2], [2, 0], [2, 2], [3, 1]]


def test_with_all_captions_any_of_them_is_right_and_each_is_a_query(tmp_path: Path) -> None:
    # Texts a, b, c, d are the axes. Picture 0 carries a and b, picture 1 carries c, picture 2 carries d and b again.
    captions = {0: ["a", "b"], 1: ["c"], 2: ["d", "B", "d "]}
    image = torch.tensor(
        [
            [0.1, 0.8, 0.9, 0.0],  # finds c, b: right at place 2
            [0.0, 0.7, 0.6, 0.0],  # finds b, c: right at place 2
            [0.2, 0.9, 0.0, 0.8],  # finds b: right at once, by its second caption
        ]
    )
    found = retrieve(flat_shards(tmp_path, 3, captions=captions), image, torch.eye(4), list("abcd"), captions="all")
    assert (found.rows, found.texts, found.captions) == (3, 4, "all")
    assert found.image_to_text == Recall(1 / 3, 1.0, 1.0)
    # a finds picture 2 (0.2 to 0.1), b picture 2, which carries it, c picture 0, d picture 2.
    assert found.text_to_image == Recall(2 / 4, 1.0, 1.0)
    # Right among 4 texts: 2, 1 and 2. Right among 3 pictures: 1, 2, 1 and 1.
    assert found.chance_image_to_text.at1 == pytest.approx((2 + 1 + 2) / 3 / 4)
    assert found.chance_text_to_image.at1 == pytest.approx((1 + 2 + 1 + 1) / 4 / 3)
    assert "any text that it carries" in found.to_json()["rule"]


def test_coco_s_five_captions_of_a_planted_model(tmp_path: Path) -> None:
    # Picture i carries texts 5 i to 5 i + 4; text j is the axis j, and picture i points along one of its own: text
    # 5 i + i. All of its other texts score 0, like everybody else's: ties go to the lower number.
    captions = {i: [f"text {5 * i + j}" for j in range(5)] for i in range(4)}
    texts = [text for own in captions.values() for text in own]
    image = torch.eye(20)[[6 * i for i in range(4)]]
    found = retrieve(flat_shards(tmp_path, 4, captions=captions), image, torch.eye(20), texts, captions="all")
    assert found.texts == 20
    assert found.image_to_text.at1 == 1.0
    # Texts 0, 6, 12 and 18 find their picture; of the others all find picture 0, right for texts 1 to 4.
    assert found.text_to_image.at1 == (4 + 4) / 20
    first = retrieve(flat_shards(tmp_path / "b", 4, captions=captions), image, torch.eye(20), texts)
    # Texts 0, 5, 10, 15 alone: picture 0 finds text 0; the others have 0 for all, and find text 0 too.
    assert (first.texts, first.image_to_text.at1, first.text_to_image.at1) == (4, 1 / 4, 1 / 4)


def test_rows_without_a_caption_or_a_good_picture_are_left_out_and_counted(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 4, captions={0: ["a"], 1: [" "], 2: ["c"], 3: ["d"]}, pictures={2: truncated(2)})
    # Row 1 has no caption, row 2 no picture: rows 0 and 3 remain, with texts "a" and "d".
    image = torch.tensor([[1.0, 0.0], [9.0, 9.0], [9.0, 9.0], [0.0, 1.0]])
    found = retrieve(shards, image, torch.eye(2), ["a", "d"])
    assert (found.rows, found.texts, found.uncaptioned_rows, found.bad_rows) == (2, 2, 1, 1)
    assert found.image_to_text.at1 == 1.0
    assert [example.row for example in found.examples] == [0, 3]


def test_nothing_to_find_is_refused(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 2, captions={0: [], 1: [""]})
    with pytest.raises(UserError) as caught:
        retrieve(shards, torch.eye(2), torch.eye(2), [])
    assert "no row has both a caption and a picture (of its 2 rows, 2 hold a picture alone" in str(caught.value)
    assert "give --data the manifest of captioned pictures" in str(caught.value)


def test_rows_that_have_either_but_never_both_are_refused(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 3, captions={0: [], 1: ["a"], 2: []}, pictures={1: b"", 2: b""})
    with pytest.raises(UserError, match="1 hold a picture alone, 1 a text alone, 1 neither"):
        retrieve(shards, torch.eye(3), torch.eye(3), ["a"])


def test_texts_alone_are_left_out_and_counted_apart_from_damaged_pictures(tmp_path: Path) -> None:
    shards = flat_shards(
        tmp_path, 4, captions={i: [c] for i, c in enumerate("abcd")}, pictures={1: b"", 2: truncated(2)}
    )
    found = retrieve(shards, torch.eye(4), torch.eye(4)[[0, 3]], ["a", "d"])
    assert (found.rows, found.pictureless_rows, found.bad_rows, found.uncaptioned_rows) == (2, 1, 1, 0)


def test_a_model_that_embeds_all_alike_gets_chance(tmp_path: Path) -> None:
    captions = [f"text {i}" for i in range(20)]
    shards = flat_shards(tmp_path, 20, captions={i: [text] for i, text in enumerate(captions)})
    found = retrieve(shards, torch.ones(20, 2), torch.ones(20, 2), captions)
    assert found.image_to_text == found.text_to_image == Recall(1 / 20, 5 / 20, 10 / 20)


def test_the_json_holds_the_rule_and_every_figure(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 2, captions={0: ["a"], 1: ["b"]})
    found = json.loads(json.dumps(retrieve(shards, torch.eye(2), torch.eye(2), ["a", "b"]).to_json()))
    assert "are one text" in found["rule"]
    assert found["image_to_text"] == {"recall_at_1": 1.0, "recall_at_5": 1.0, "recall_at_10": 1.0}
    assert found["examples"][1] == {"row": 1, "key": "row-1", "text": "b", "texts": ["b", "a"], "rows": [1, 0]}
