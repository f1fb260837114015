from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.data.arrow import ShardSet
from limoe_dist.eval.classes import ClassNames
from limoe_dist.eval.zeroshot import ZeroShot, class_embeddings, class_prompts, zeroshot
from limoe_dist.parallel.mesh import Mesh
from tests.eval.planted import CPU, RUN, PlantedModel, PlantedTokenizer, flat_shards
from tests.support.shards import CONCEPTS, truncated

SORTED = sorted(CONCEPTS)


def preferring(*places: int) -> Tensor:
    """(R, 8): row i has the class of concept i % 8 at the given place, and the other classes in their order."""
    rows = []
    for row, place in enumerate(places):
        order = [number for number in range(8) if number != SORTED.index(CONCEPTS[row % 8])]
        order.insert(place, SORTED.index(CONCEPTS[row % 8]))
        # The first gets score 8, the last 1.
        rows.append([8.0 - order.index(number) for number in range(8)])
    return torch.tensor(rows)


def classify(
    shards: ShardSet, image: Tensor, *, classes: list[ClassNames] | None = None, texts: list[str] | None = None
) -> ZeroShot:
    texts = texts or SORTED
    model = PlantedModel(image, torch.eye(len(texts), 8))
    return zeroshot(
        model,  # type: ignore[arg-type]
        RUN,
        shards,
        PlantedTokenizer(texts),  # type: ignore[arg-type]
        mesh=Mesh.single(),
        device=CPU,
        classes=classes,
    )


def test_top1_and_top5_of_a_planted_model(tmp_path: Path) -> None:
    # Three pictures of eight find their class first; places 0, 0, 1, 4, 0 and 2 are among the first five.
    found = classify(flat_shards(tmp_path, 8), preferring(0, 0, 1, 4, 5, 7, 0, 2))
    assert (found.rows, found.classes) == (8, 8)
    assert (found.top1, found.top5) == (3 / 8, 6 / 8)
    assert (found.chance_top1, found.chance_top5) == (pytest.approx(1 / 8), pytest.approx(5 / 8))


def test_a_padded_batch_counts_each_row_once(tmp_path: Path) -> None:
    # Five rows in batches of four: row 0, which is right, fills the second batch three times, and counts once.
    found = classify(flat_shards(tmp_path, 5), preferring(0, 7, 7, 7, 7), classes=[(name,) for name in SORTED])
    assert found.rows == 5
    assert found.top1 == 1 / 5


def test_the_first_guesses_of_every_row_are_there(tmp_path: Path) -> None:
    found = classify(flat_shards(tmp_path, 8), preferring(0, 0, 1, 4, 5, 7, 0, 2))
    assert found.row_R.tolist() == list(range(8))
    assert found.first_R5.shape == (8, 5)
    red = next(guess for guess in found.examples if guess.row == 0)
    assert (red.key, red.concept, red.first[0]) == ("row-0", "red square", "red square")


def test_bad_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 8, pictures={5: truncated(5)})
    found = classify(shards, preferring(0, 0, 1, 4, 5, 7, 0, 2))
    assert (found.rows, found.bad_rows) == (7, 1)
    assert found.top1 == 3 / 7


def test_fewer_than_five_classes_make_top5_certain(tmp_path: Path) -> None:
    found = classify(flat_shards(tmp_path, 3), preferring(7, 7, 7), classes=[(name,) for name in CONCEPTS[:3]])
    assert (found.chance_top1, found.chance_top5, found.top5) == (pytest.approx(1 / 3), 1.0, 1.0)


def test_a_class_file_s_further_names_count_for_their_class(tmp_path: Path) -> None:
    # Texts: "red square" (1, 0, 0), "crimson box" (0, 1, 0), "green circle" (0, 0, 1). The class of the first two lies
    # at (0.71, 0.71, 0). Picture 0 = (0.1, 1, 0.6): 0.78 for red, 0.6 for green; its first name alone would give 0.1.
    shards = flat_shards(tmp_path, 2)
    image = torch.zeros(2, 8)
    image[0, :3] = torch.tensor([0.1, 1.0, 0.6])
    image[1, :3] = torch.tensor([0.1, 0.1, 1.0])
    texts = ["red square", "crimson box", "green circle"]
    alone = classify(shards, image, classes=[("red square",), ("green circle",)], texts=texts)
    both = classify(shards, image, classes=[("red square", "crimson box"), ("green circle",)], texts=texts)
    assert (alone.top1, both.top1) == (0.5, 1.0)


def test_prompts_are_every_name_in_every_template() -> None:
    made = class_prompts([("bear", "grizzly"), ("{tulip}",)], ("{}", "one {}, {} again"))
    bears = ("bear", "one bear, bear again", "grizzly", "one grizzly, grizzly again")
    assert made.texts == (*bears, "{tulip}", "one {tulip}, {tulip} again")
    assert made.class_X.tolist() == [0, 0, 0, 0, 1, 1]


def test_canonical_prompts_lose_case_and_punctuation_in_names_and_templates() -> None:
    made = class_prompts([("Pick-up truck",), ("T_shirt",)], ("A photo of a {}.", "{}!"), style="canonical")
    assert made.texts == ("a photo of a pickup truck", "pickup truck", "a photo of a t shirt", "t shirt")


def test_the_set_clip_is_80_prompts_for_each_name_beside_other_templates() -> None:
    made = class_prompts([("bear", "grizzly"), ("tulip",)], ("clip", "{}"))
    assert len(made.texts) == 3 * 81
    assert made.class_X.bincount().tolist() == [2 * 81, 81]
    assert made.texts[0] == "a bad photo of a bear."
    assert made.texts[80] == "bear"


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([("bear!",), ("bear",)], 'class "bear" is then the same as "bear!"'),
        ([("bear",), ("?",)], 'class "?" is then nothing'),
    ],
)
def test_concepts_that_canonical_prompts_cannot_tell_apart_are_refused(classes: list[ClassNames], message: str) -> None:
    with pytest.raises(UserError) as caught:
        class_prompts(classes, ("{}",), style="canonical")
    assert message in str(caught.value)


def test_pictures_without_captions_are_classified_and_rows_without_pictures_counted(tmp_path: Path) -> None:
    # Rows 2 and 6 are texts alone: 0, 1, 3, 4, 5 and 7 remain, of which 0 and 1 are right.
    shards = flat_shards(tmp_path, 8, captions={row: [] for row in range(8)}, pictures={2: b"", 6: b""})
    found = classify(shards, preferring(0, 0, 0, 4, 5, 7, 0, 2))
    assert (found.rows, found.bad_rows, found.pictureless_rows) == (6, 0, 2)
    assert found.top1 == 2 / 6


def test_a_class_is_the_mean_of_its_prompts_at_length_one() -> None:
    # Class 0: (1, 0) and (0, 1) give (0.5, 0.5), at length 1 (0.7071, 0.7071). Class 1 has one prompt.
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    found = class_embeddings(text, torch.tensor([0, 1, 0]), 2)
    assert torch.allclose(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]), atol=1e-6)


def test_a_concept_that_is_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='concept "green circle" is in none of the 1 classes'):
        classify(flat_shards(tmp_path, 2), preferring(0, 0), classes=[("red square",)])


def test_diverged_weights_are_refused_and_not_counted_as_right(tmp_path: Path) -> None:
    image = preferring(0, 0, 0)
    image[1] = float("nan")
    with pytest.raises(UserError, match=r"1 of the 3 embeddings of the pictures .* are not finite"):
        classify(flat_shards(tmp_path, 3), image)


def test_a_set_without_any_good_picture_is_refused(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 2, pictures={0: b"", 1: truncated(1)})
    with pytest.raises(UserError, match="none of its 2 pictures can be decoded"):
        classify(shards, preferring(0, 0))


def test_texts_alone_are_refused(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 2, pictures={0: b"", 1: b""})
    with pytest.raises(UserError, match=r"none of its 2 rows holds a picture \(texts alone\)"):
        classify(shards, preferring(0, 0))


def test_the_json_holds_every_figure(tmp_path: Path) -> None:
    found = json.loads(json.dumps(classify(flat_shards(tmp_path, 8), preferring(*range(8))).to_json()))
    assert found["top1"] == 1 / 8
    assert found["top5"] == 5 / 8
    assert found["templates"] == ["{}"]
    assert found["capacity"] == "full"
    assert found["examples"][0]["first"][0] == "red square"
