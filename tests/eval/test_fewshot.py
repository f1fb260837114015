from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.data.arrow import ShardSet
from limoe_dist.eval.embed import picture_features
from limoe_dist.eval.fewshot import Accuracy, FewShot, Shots, drawn, fewshot
from limoe_dist.parallel.mesh import Mesh
from tests.eval.models import CPU, laid_out, small_model
from tests.eval.models import RUN as SMALL
from tests.eval.planted import RUN, PlantedModel, flat, flat_shards
from tests.support.ranks import RanksPool
from tests.support.shards import truncated, write_shards


def learn(training: ShardSet, shards: ShardSet, features: Tensor, shots: Shots) -> FewShot:
    model = PlantedModel(features, torch.eye(2))
    return fewshot(model, RUN, training, shards, shots, mesh=Mesh.single(), device=CPU)  # type: ignore[arg-type]


def of_concepts(rows: int) -> Tensor:
    """(rows, 8): the feature of picture i is the axis of its concept, i % 8."""
    return torch.eye(8)[torch.arange(rows) % 8]


def test_separate_features_are_learned_from_one_picture_each(tmp_path: Path) -> None:
    # Training rows 0..15: concepts 0..7 twice, greys 0..15. Evaluated rows 0..4 have the greys of training rows, but
    # row 3 has the grey of concept 5 and row 4 that of concept 6: 3 of 5 are right.
    training = flat_shards(tmp_path / "training", 16)
    shards = flat_shards(tmp_path / "evaluated", 5, pictures={3: flat(5), 4: flat(6)})
    found = learn(training, shards, of_concepts(16), Shots(shots=1, seeds=2, l2=(1.0,)))
    assert found.accuracies == (Accuracy(1.0, (3 / 5, 3 / 5)),)
    assert (found.rows, found.classes, found.training_rows, found.chance) == (5, 8, 8, 1 / 8)
    assert found.features == 8


def test_only_drawn_training_pictures_are_embedded(tmp_path: Path) -> None:
    training = flat_shards(tmp_path / "training", 16)
    shards = flat_shards(tmp_path / "evaluated", 2)
    model = PlantedModel(of_concepts(16), torch.eye(2))
    shots = Shots(shots=1, seeds=1)
    fewshot(model, RUN, training, shards, shots, mesh=Mesh.single(), device=CPU)  # type: ignore[arg-type]
    rows_K = [[number, number + 8] for number in range(8)]
    # Classes are sorted by name, rows by number; the evaluated rows 0 and 1 come after.
    assert model.rows == [*sorted(row for rows in drawn(rows_K, shots=1, seed=0) for row in rows), 0, 1]


def test_draws_differ_by_seed_and_grow_with_the_shots() -> None:
    rows_K = [list(range(50)), list(range(100, 103))]
    few, more, other = (drawn(rows_K, shots=n, seed=seed) for n, seed in ((5, 0), (10, 0), (5, 1)))
    assert [len(rows) for rows in more] == [10, 3]
    assert set(few[0]) < set(more[0]) < set(rows_K[0])
    assert few[0] != other[0]
    assert few == drawn(rows_K, shots=5, seed=0)


def test_every_row_is_drawn_about_equally_often() -> None:
    # 400 draws of 2 in 8 rows: each row 100 times on average, standard deviation sqrt(400 * 1/4 * 3/4) = 8.7.
    counts = torch.zeros(8)
    for seed in range(400):
        counts[drawn([list(range(8))], shots=2, seed=seed)[0]] += 1
    assert counts.min() > 100 - 5 * 8.7
    assert counts.max() < 100 + 5 * 8.7


def test_classes_with_too_few_pictures_are_skipped_or_used(tmp_path: Path) -> None:
    # 12 training rows: concepts 0 to 3 have two pictures, 4 to 7 one.
    training = flat_shards(tmp_path / "training", 12)
    shards = flat_shards(tmp_path / "evaluated", 8)
    skipped = learn(training, shards, of_concepts(12), Shots(shots=2, seeds=1))
    assert (skipped.classes, skipped.short_classes, skipped.rows, skipped.other_rows) == (4, 4, 4, 4)
    used = learn(training, shards, of_concepts(12), Shots(shots=2, seeds=1, short_classes="use"))
    assert (used.classes, used.short_classes, used.rows, used.other_rows) == (8, 4, 8, 0)
    assert used.training_rows == 4 * 2 + 4


def test_no_class_with_enough_pictures_is_refused_with_what_would_do(tmp_path: Path) -> None:
    training = flat_shards(tmp_path / "training", 12)
    with pytest.raises(UserError) as caught:
        learn(training, flat_shards(tmp_path / "evaluated", 8), of_concepts(12), Shots())
    assert "--shots=10: 0 of the 8 classes" in str(caught.value)
    assert "(the most is 2)" in str(caught.value)
    assert "use --shots 2 or fewer, or --short-classes use" in str(caught.value)


def test_pictures_alone_are_enough_and_texts_alone_are_passed_over(tmp_path: Path) -> None:
    # No row has a caption. Training row 8 (concept 0) and evaluated row 1 hold no picture; evaluated row 2 is damaged,
    # and so is training row 3, the only picture of its class: it is never found.
    none: dict[int, list[str]] = {row: [] for row in range(16)}
    training = flat_shards(tmp_path / "training", 9, captions=none, pictures={8: b"", 3: truncated(3)})
    shards = flat_shards(tmp_path / "evaluated", 4, captions=none, pictures={1: b"", 2: truncated(2)})
    found = learn(training, shards, of_concepts(16), Shots(shots=1, seeds=1, l2=(1.0,)))
    assert (found.rows, found.pictureless_rows, found.bad_rows, found.bad_training_rows) == (2, 1, 1, 1)
    assert found.accuracy.mean == 1 / 2


@pytest.mark.parametrize("which", ["training", "evaluated"])
def test_shards_without_concepts_are_refused(tmp_path: Path, which: str) -> None:
    paths = {name: write_shards(tmp_path / name, rows=16, concepts=name != which) for name in ("training", "evaluated")}
    with pytest.raises(UserError) as caught:
        learn(ShardSet(paths["training"]), ShardSet(paths["evaluated"]), of_concepts(16), Shots(shots=1))
    assert str(paths[which]) in str(caught.value)


def test_learning_from_what_is_evaluated_is_refused(tmp_path: Path) -> None:
    shards = flat_shards(tmp_path, 16)
    with pytest.raises(UserError, match="would be learned from and evaluated on"):
        learn(shards, ShardSet(shards.path), of_concepts(16), Shots(shots=1))


def test_the_json_holds_the_spread_and_every_penalty(tmp_path: Path) -> None:
    training, shards = flat_shards(tmp_path / "training", 16), flat_shards(tmp_path / "evaluated", 8)
    found = learn(training, shards, of_concepts(16), Shots(shots=1, seeds=3, l2=(1024.0, 1.0)))
    content = json.loads(json.dumps(found.to_json()))
    assert (content["accuracy"], content["std"], content["l2"], content["shots"]) == (1.0, 0.0, 1024.0, 1)
    assert [each["l2"] for each in content["of_l2"]] == [1024.0, 1.0]
    assert content["of_seeds"] == [1.0, 1.0, 1.0]


def test_spread_of_seeds_by_hand() -> None:
    # Mean of 0.2, 0.4, 0.6: 0.4; squares of the differences 0.04, 0, 0.04: sqrt(0.08 / 2) = 0.2.
    assert Accuracy(1.0, (0.2, 0.4, 0.6)).mean == pytest.approx(0.4)
    assert Accuracy(1.0, (0.2, 0.4, 0.6)).std == pytest.approx(0.2)
    assert Accuracy(1.0, (0.2,)).std is None


def test_features_are_what_the_projection_turns_into_embeddings(tmp_path: Path) -> None:
    shards, model = ShardSet(write_shards(tmp_path, rows=6)), small_model()
    found = picture_features(model, SMALL, shards, [5, 0, 3], mesh=Mesh.single(), device=CPU)
    assert found.feature_RD.shape == (3, 16)
    whole = picture_features(model, SMALL, shards, mesh=Mesh.single(), device=CPU).feature_RD
    # 1e-5: sums in another order, in float32.
    assert torch.allclose(found.feature_RD, whole[[5, 0, 3]], atol=1e-5)
    projected = torch.nn.functional.normalize(found.feature_RD @ model.image_projection.detach(), dim=1)
    embedded = model(decoded(shards, [5, 0, 3]), None).image_BP
    assert torch.allclose(projected, embedded, atol=1e-5)


def decoded(shards: ShardSet, rows: list[int]) -> Tensor:
    from limoe_dist.data.evaluation import decode_rows

    return decode_rows(SMALL, shards, rows, device=CPU).images


def learned_on_a_rank(training: Path, evaluated: Path, tp: int, ep: int) -> dict[str, object]:
    mesh = Mesh.build(tp=tp, ep=ep) if torch.distributed.is_initialized() else Mesh.single()
    run = laid_out(tp=tp, ep=ep)
    shots = Shots(shots=3, seeds=2, l2=(1024.0, 1.0))
    return fewshot(
        small_model(run, mesh=mesh), run, ShardSet(training), ShardSet(evaluated), shots, mesh=mesh, device=CPU
    ).to_json()


def test_two_ranks_learn_what_one_process_learns(tmp_path: Path, ranks2: RanksPool) -> None:
    training, evaluated = write_shards(tmp_path / "training", rows=37), write_shards(tmp_path / "evaluated", rows=13)
    expected = learned_on_a_rank(training, evaluated, 1, 1)
    assert 0 < expected["accuracy"] <= 1  # type: ignore[operator]
    for tp, ep in ((1, 2), (2, 1)):
        assert ranks2.run(learned_on_a_rank, training, evaluated, tp, ep) == [expected, expected]


@pytest.mark.parametrize("batch_pairs", [3, 8])
def test_the_training_capacity_is_obeyed_for_pictures_alone(tmp_path: Path, batch_pairs: int) -> None:
    # 3 pictures are no multiple of group_pairs = 4: then a pass is one group.
    training, evaluated = write_shards(tmp_path / "training", rows=37), write_shards(tmp_path / "evaluated", rows=13)
    moe = SMALL.moe.model_copy(update={"eval_capacity": "paper"})
    run = SMALL.model_copy(update={"moe": moe, "eval": SMALL.eval.model_copy(update={"batch_pairs": batch_pairs})})
    model, shots = small_model(run), Shots(shots=3, seeds=1)
    found = fewshot(model, run, ShardSet(training), ShardSet(evaluated), shots, mesh=Mesh.single(), device=CPU)
    assert found.capacity == "paper"
    assert found.rows == 13


def test_every_seed_draws_its_own_pictures(tmp_path: Path) -> None:
    # One of 4 pictures of each of 8 classes, 12 times: 12 different draws reach nearly all 32 pictures, 2 at most 16.
    training = flat_shards(tmp_path / "training", 32)
    shards = flat_shards(tmp_path / "evaluated", 2)
    model = PlantedModel(of_concepts(32), torch.eye(2))
    shots = Shots(shots=1, seeds=12)
    fewshot(model, RUN, training, shards, shots, mesh=Mesh.single(), device=CPU)  # type: ignore[arg-type]
    rows_K = [list(range(number, 32, 8)) for number in range(8)]
    drawn_rows = {row for seed in range(12) for rows in drawn(rows_K, shots=1, seed=seed) for row in rows}
    assert len(drawn_rows) > 24
    # Rows 0 and 1 are evaluated, and the last batch is filled up with one of its own rows.
    assert set(model.rows) == drawn_rows | {0, 1}


def test_a_training_picture_that_cannot_be_decoded_leaves_the_others_their_features(tmp_path: Path) -> None:
    # Training row 2, the only picture of concept 2, is damaged: the pictures of concepts 3 to 7 come behind it.
    training = flat_shards(tmp_path / "training", 8, pictures={2: truncated(2)})
    shards = flat_shards(tmp_path / "evaluated", 8)
    found = learn(training, shards, of_concepts(8), Shots(shots=1, seeds=1, l2=(1.0,)))
    assert found.bad_training_rows == 1
    assert found.accuracy.mean == 7 / 8
