"""Every number of an evaluation, from planted embeddings, by plain NumPy over whole matrices of scores.

The rows have every flaw once: damaged, without picture, without caption, and captions that several rows share.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limoe_dist.data.arrow import ShardSet
from limoe_dist.eval.contrastive import contrastive_of
from limoe_dist.eval.embed import Embedder
from limoe_dist.eval.fewshot import Accuracy, FewShot, Shots, fewshot
from limoe_dist.eval.retrieval import retrieval_of
from limoe_dist.eval.zeroshot import zeroshot_of
from limoe_dist.parallel.mesh import Mesh
from tests.eval.planted import CPU, RUN, PlantedModel, PlantedTokenizer, flat, flat_shards
from tests.support import shards as support
from tests.support.shards import CONCEPTS, truncated

ROWS = 26
DAMAGED, EMPTY, UNCAPTIONED = [3], [7, 13], [11, 18, 21]
GOOD = [row for row in range(ROWS) if row not in DAMAGED + EMPTY]
PAIRS = [row for row in GOOD if row not in UNCAPTIONED]
# Neighbours share their first caption: both are right for each other, within a minibatch and across two.
CAPTIONS = {row: [f"text {row // 2}", f"other {row}"] for row in range(ROWS)} | {row: [] for row in UNCAPTIONED}
CLASSES = sorted(CONCEPTS)
TEXTS = [*CLASSES, *(f"text {n}" for n in range(13)), *(f"other {row}" for row in range(ROWS))]
RANDOM = np.random.default_rng(4)
IMAGE_RP = RANDOM.normal(size=(ROWS, 12))
TEXT_XP = RANDOM.normal(size=(len(TEXTS), 12))
# A caption is a little like its picture, and a class like the pictures of its concept: results that are not chance.
for row in range(ROWS):
    TEXT_XP[CLASSES.index(CONCEPTS[row % 8])] += 0.5 * IMAGE_RP[row]
    TEXT_XP[8 + row // 2] += 0.5 * IMAGE_RP[row]
    TEXT_XP[21 + row] += 0.5 * IMAGE_RP[row]
IMAGE_RP, TEXT_XP = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (IMAGE_RP, TEXT_XP))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("figures")
    return flat_shards(
        folder, ROWS, captions=CAPTIONS, pictures={row: truncated(row) for row in DAMAGED} | dict.fromkeys(EMPTY, b"")
    )


def embedder(shards: ShardSet, **settings: Any) -> Embedder:
    run = RUN.model_copy(update={"eval": RUN.eval.model_copy(update=settings)})
    model, tokenizer = PlantedModel(torch.tensor(IMAGE_RP), torch.tensor(TEXT_XP)), PlantedTokenizer(TEXTS)
    return Embedder(model, run, shards, tokenizer, mesh=Mesh.single(), device=CPU)  # type: ignore[arg-type]


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in ("examples", "rule")}


def recall(score: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Share of the rows of `score` that have a right column among their 1, 5 and 10 best."""
    best = np.argsort(-score, axis=1, kind="stable")
    hit = np.take_along_axis(right, best, axis=1)
    return {f"recall_at_{n}": hit[:, :n].any(1).mean() for n in (1, 5, 10)}


def chance(right: np.ndarray) -> dict[str, float]:
    """Mean chance that one of n columns drawn without replacement is right."""
    columns = right.shape[1]

    def of(count: int, n: int) -> float:
        return 1 - math.comb(columns - count, n) / math.comb(columns, n)

    return {f"recall_at_{n}": np.mean([of(int(count), n) for count in right.sum(1)]) for n in (1, 5, 10)}


def test_zero_shot_figures(shards: ShardSet) -> None:
    names = [(name,) for name in CLASSES]
    found = numbers(zeroshot_of(embedder(shards, templates=("{}",)), classes=names).to_json())
    place = np.argsort(-IMAGE_RP[GOOD] @ TEXT_XP[:8].T, axis=1)
    right = np.array([CLASSES.index(CONCEPTS[row % 8]) for row in GOOD])[:, None]
    assert 1 / 8 < (place[:, :1] == right).mean() < (place[:, :5] == right).any(1).mean() < 1
    assert found == {
        "rows": len(GOOD),
        "classes": 8,
        "top1": pytest.approx((place[:, :1] == right).mean()),
        "top5": pytest.approx((place[:, :5] == right).any(1).mean()),
        "chance_top1": pytest.approx(1 / 8),
        "chance_top5": pytest.approx(5 / 8),
        "bad_rows": 1,
        "pictureless_rows": 2,
        "unnamed_rows": 0,
        "templates": ["{}"],
        "templates_used": 1,
        "prompts": "written",
        "capacity": "full",
    }


def test_examples_show_the_best_of_a_row(shards: ShardSet) -> None:
    guesses = zeroshot_of(embedder(shards, templates=("{}",)), classes=[(name,) for name in CLASSES]).to_json()
    rows = [guess["row"] for guess in guesses["examples"]]
    assert len(rows) > 2
    assert set(rows) <= set(GOOD)
    best = np.argsort(-IMAGE_RP[rows] @ TEXT_XP[:8].T, axis=1)[:, :5]
    assert guesses["examples"] == [
        {
            "row": row,
            "key": f"row-{row}",
            "concept": CONCEPTS[row % 8],
            "first": [CLASSES[number] for number in best[place]],
        }
        for place, row in enumerate(rows)
    ]
    # Captions number 8 to 20 of TEXTS are those that come first; neighbours share theirs.
    score = IMAGE_RP[PAIRS] @ TEXT_XP[8:21].T
    found = retrieval_of(embedder(shards, captions="first")).to_json()["examples"]
    assert len(found) > 2
    for example in found:
        row = example["row"]
        texts = np.argsort(-score[PAIRS.index(row)])[:5]
        pictures = np.argsort(-score[:, row // 2])[:5]
        assert example == {
            "row": row,
            "key": f"row-{row}",
            "text": f"text {row // 2}",
            "texts": [f"text {number}" for number in texts],
            "rows": [PAIRS[place] for place in pictures],
        }


@pytest.mark.parametrize("captions", ["first", "all"])
def test_retrieval_figures(shards: ShardSet, captions: str) -> None:
    found = numbers(retrieval_of(embedder(shards, captions=captions)).to_json())
    carried = {row: CAPTIONS[row] if captions == "all" else CAPTIONS[row][:1] for row in PAIRS}
    texts = list(dict.fromkeys(text for row in PAIRS for text in carried[row]))
    score = IMAGE_RP[PAIRS] @ TEXT_XP[[TEXTS.index(text) for text in texts]].T
    right = np.array([[text in carried[row] for text in texts] for row in PAIRS])
    image_to_text, text_to_image = recall(score, right), recall(score.T, right.T)
    assert image_to_text != text_to_image
    assert chance(right)["recall_at_5"] != chance(right.T)["recall_at_5"]
    assert found == {
        "captions": captions,
        "rows": len(PAIRS),
        "texts": len(texts),
        "image_to_text": pytest.approx(image_to_text),
        "text_to_image": pytest.approx(text_to_image),
        "chance_image_to_text": pytest.approx(chance(right)),
        "chance_text_to_image": pytest.approx(chance(right.T)),
        "bad_rows": 1,
        "pictureless_rows": 2,
        "uncaptioned_rows": 3,
        "capacity": "full",
    }


@pytest.mark.parametrize("asked", [6, 50])
def test_contrastive_figures(shards: ShardSet, asked: int) -> None:
    found = contrastive_of(embedder(shards, minibatch=asked)).to_json()
    # 3 minibatches of 6 of the 20 pairs, or one of all.
    minibatch = min(asked, 20)
    counted = PAIRS[: 18 if asked == 6 else 20]
    hits, likely = np.zeros((2, len(counted))), np.zeros(len(counted))
    for first in range(0, len(counted), minibatch):
        rows = counted[first : first + minibatch]
        texts = [CAPTIONS[row][0] for row in rows]
        score = IMAGE_RP[rows] @ TEXT_XP[[TEXTS.index(text) for text in texts]].T
        right = np.array([[one == other for other in texts] for one in texts])
        part, place = slice(first, first + minibatch), np.arange(minibatch)
        hits[0, part] = right[place, score.argmax(1)]
        hits[1, part] = right[score.argmax(0), place]
        likely[part] = right.mean(1)
    assert hits[0].mean() != hits[1].mean()
    # Each picture has one caption here, and an equal caption is right.
    rule = found.pop("rule")
    assert "first captions of its minibatch" in rule
    assert "caption equal to the right one" in rule
    assert found == {
        "image_to_text": pytest.approx(hits[0].mean()),
        "text_to_image": pytest.approx(hits[1].mean()),
        "accuracy": pytest.approx(hits.mean()),
        "chance": pytest.approx(likely.mean()),
        "minibatch": minibatch,
        "asked_minibatch": asked,
        "left_out_rows": 20 - len(counted),
        "minibatches": 3 if asked == 6 else 1,
        "rows": len(counted),
        "bad_rows": 1,
        "pictureless_rows": 2,
        "uncaptioned_rows": 3,
        "capacity": "full",
    }


def test_few_shot_figures() -> None:
    counts = {
        "rows": 21,
        "shots": 10,
        "seeds": 3,
        "features": 64,
        "classes": 7,
        "short_classes": 2,
        "training_rows": 63,
    }
    counts |= {"bad_training_rows": 4, "bad_rows": 5, "pictureless_rows": 6, "unnamed_rows": 8, "other_rows": 9}
    accuracies = (Accuracy(8.0, (0.2, 0.6, 0.1)), Accuracy(1.0, (0.5, 0.5, 0.8)))
    found = FewShot(accuracies=accuracies, chance=1 / 7, short="use", capacity="paper", **counts)  # type: ignore[arg-type]
    # Means 0.3 and 0.6; squared distances 0.01, 0.09, 0.04 and 0.01, 0.01, 0.04, over 3 - 1.
    first = {"l2": 8.0, "mean": 0.3, "std": 0.07**0.5, "min": 0.1, "max": 0.6}
    second = {"l2": 1.0, "mean": 0.6, "std": 0.03**0.5, "min": 0.5, "max": 0.8}
    content = found.to_json()
    of_l2 = content.pop("of_l2")
    assert [each.pop("of_seeds") for each in of_l2] == [[0.2, 0.6, 0.1], [0.5, 0.5, 0.8]]
    assert of_l2 == [pytest.approx(first), pytest.approx(second)]
    assert content.pop("of_seeds") == [0.2, 0.6, 0.1]
    first["accuracy"] = first.pop("mean")
    texts = {name: content.pop(name) for name in ("short", "capacity")}
    assert texts == {"short": "use", "capacity": "paper"}
    assert content == pytest.approx(first | counts | {"chance": 1 / 7})


def test_rows_that_cannot_be_classified_are_counted_by_what_they_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Concept 0 is empty. Training rows 0 to 5 teach concepts 1 to 5. Of 24 evaluated rows
    #   0, 8, 16 have no concept; 3 is damaged; 4 and 5 have no picture; 6, 7, 14, 15, 22, 23 are of concepts 6 and 7;
    #   9, of concept 1, shows the picture of row 10.
    monkeypatch.setattr(support, "CONCEPTS", ("", *CONCEPTS[1:]))
    training = flat_shards(tmp_path / "training", 6)
    evaluated = flat_shards(tmp_path / "rows", 24, pictures={3: truncated(3), 4: b"", 5: b"", 9: flat(10)})
    axes = torch.eye(8)
    names = sorted(CONCEPTS[1:])
    model = PlantedModel(axes[torch.arange(24) % 8], axes[[CONCEPTS.index(name) for name in names]])
    reader = Embedder(model, RUN, evaluated, PlantedTokenizer(names), mesh=Mesh.single(), device=CPU)  # type: ignore[arg-type]
    found = zeroshot_of(reader).to_json()
    counts = ("rows", "classes", "bad_rows", "pictureless_rows", "unnamed_rows")
    assert [found[name] for name in counts] == [18, 7, 1, 2, 3]
    assert (found["top1"], found["chance_top1"], found["chance_top5"]) == pytest.approx((17 / 18, 1 / 7, 5 / 7))
    shots = Shots(shots=1, seeds=2, l2=(1.0,))
    learned = fewshot(model, RUN, training, evaluated, shots, mesh=Mesh.single(), device=CPU).to_json()  # type: ignore[arg-type]
    assert [learned[name] for name in counts] == [12, 5, 1, 2, 3]
    assert (learned["other_rows"], learned["training_rows"], learned["features"], learned["seeds"]) == (6, 5, 8, 2)
    assert (learned["accuracy"], learned["chance"]) == pytest.approx((11 / 12, 1 / 5))
