"""Every number of an evaluation, from planted embeddings, by plain NumPy over whole matrices of scores.

The rows have every flaw once: damaged, without picture, without caption, and captions that several rows share.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from limoe_dist.data.arrow import ShardSet
from limoe_dist.eval.contrastive import contrastive_of
from limoe_dist.eval.embed import Embedder
from limoe_dist.eval.fewshot import Accuracy, FewShot
from limoe_dist.eval.retrieval import retrieval_of
from limoe_dist.eval.zeroshot import zeroshot_of
from limoe_dist.parallel.mesh import Mesh
from tests.eval.planted import CPU, RUN, PlantedModel, PlantedTokenizer, flat_shards
from tests.support.shards import CONCEPTS, truncated

ROWS, MINIBATCH = 26, 5
DAMAGED, EMPTY, UNCAPTIONED = 3, 7, 11
GOOD = [row for row in range(ROWS) if row not in (DAMAGED, EMPTY)]
PAIRS = [row for row in GOOD if row != UNCAPTIONED]
# Neighbours share their first caption: both are right for each other, within a minibatch and across two.
CAPTIONS = {row: [f"text {row // 2}", f"other {row}"] for row in range(ROWS)} | {UNCAPTIONED: []}
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
    return flat_shards(folder, ROWS, captions=CAPTIONS, pictures={DAMAGED: truncated(DAMAGED), EMPTY: b""})


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
        "pictureless_rows": 1,
        "unnamed_rows": 0,
        "templates": ["{}"],
        "templates_used": 1,
        "prompts": "written",
        "capacity": "full",
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
        "pictureless_rows": 1,
        "uncaptioned_rows": 1,
        "capacity": "full",
    }


def test_contrastive_figures(shards: ShardSet) -> None:
    found = numbers(contrastive_of(embedder(shards, minibatch=MINIBATCH)).to_json())
    counted = PAIRS[: len(PAIRS) // MINIBATCH * MINIBATCH]
    hits, likely = np.zeros((2, len(counted))), np.zeros(len(counted))
    for first in range(0, len(counted), MINIBATCH):
        rows = counted[first : first + MINIBATCH]
        texts = [CAPTIONS[row][0] for row in rows]
        score = IMAGE_RP[rows] @ TEXT_XP[[TEXTS.index(text) for text in texts]].T
        right = np.array([[one == other for other in texts] for one in texts])
        part, place = slice(first, first + MINIBATCH), np.arange(MINIBATCH)
        hits[0, part] = right[place, score.argmax(1)]
        hits[1, part] = right[score.argmax(0), place]
        likely[part] = right.mean(1)
    assert hits[0].mean() != hits[1].mean()
    assert found == {
        "image_to_text": pytest.approx(hits[0].mean()),
        "text_to_image": pytest.approx(hits[1].mean()),
        "accuracy": pytest.approx(hits.mean()),
        "chance": pytest.approx(likely.mean()),
        "minibatch": MINIBATCH,
        "asked_minibatch": MINIBATCH,
        "left_out_rows": len(PAIRS) - len(counted),
        "minibatches": len(counted) // MINIBATCH,
        "rows": len(counted),
        "bad_rows": 1,
        "pictureless_rows": 1,
        "uncaptioned_rows": 1,
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
