"""Draws outside of training: few-shot pictures, rows and patches for analysis, verification's batches, retry pauses."""

from __future__ import annotations

import dataclasses
import random
import threading

import numpy as np
import pytest
import torch

from limoe_dist.analysis.patches import Looked, patch_choices
from limoe_dist.analysis.routed_pairs import drawn_rows
from limoe_dist.config.schema import Image, Model, Moe, Run, Text, Train
from limoe_dist.data import remote
from limoe_dist.eval.fewshot import drawn
from limoe_dist.model.tower import build_model
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.placement import placement_of
from limoe_dist.train.parity.case import Case
from limoe_dist.train.parity.trial import project
from tests.draws import reference
from tests.draws.statistics import check_counts, check_independent, check_normal, check_share, check_uniform

CPU = torch.device("cpu")


def test_few_shot_draws_take_every_row_and_every_pair_of_rows_as_often() -> None:
    classes = [[3, 14, 15, 92, 65], [35, 89, 79, 32, 38]]
    draws = [drawn(classes, shots=2, seed=seed) for seed in range(4000)]
    pairs = np.array(
        [
            [rows.index(one) * 5 + rows.index(two) for rows, (one, two) in zip(classes, draw, strict=True)]
            for draw in draws
        ]
    )
    numbers = []
    for rows, column in zip(classes, pairs.T, strict=True):
        # Rows come in rising order: ten pairs.
        cells = [
            rows.index(one) * 5 + rows.index(two) for i, one in enumerate(sorted(rows)) for two in sorted(rows)[i + 1 :]
        ]
        assert {*column.tolist()} == {*cells}
        numbers.append(np.searchsorted(sorted(cells), column))
        check_counts(np.bincount(numbers[-1]), "pairs of rows")
    check_counts(np.bincount(numbers[0] * 10 + numbers[1], minlength=100), "two classes")
    check_counts(np.bincount(numbers[0][:-1] * 10 + numbers[0][1:], minlength=100), "neighbouring seeds")


def test_few_shot_draws_are_those_of_seed_and_row_and_nest() -> None:
    rows = list(range(50, 70))
    for seed in (0, 3, 2**32 + 1):
        # The rows with the smallest first draws of their numbers.
        order = sorted(rows, key=lambda row, seed=seed: reference.philox_uniforms(row, seed, 1)[0])
        for shots in (1, 5, 20, 30):
            assert drawn([rows], shots=shots, seed=seed) == [sorted(order[:shots])]
            assert drawn([[7], rows[::-1], rows], shots=shots, seed=seed)[1:] == [sorted(order[:shots])] * 2


def test_rows_for_analysis_are_a_fixed_random_order_without_repeats() -> None:
    for total in (1, 10, 5000):
        order = drawn_rows(total, 0)
        assert sorted(order) == list(range(total))
        assert drawn_rows(total, total // 2 + 1) == order[: total // 2 + 1]
    check_uniform(order[:1000], 0, 4999, "rows")
    check_independent([order], ["rows"], lags=(1, 2, 8))


def looked(*experts: int) -> Looked:
    blank = np.zeros((4, 4, 3), dtype=np.uint8)
    return Looked(0, "", "", blank, {1: np.array(experts), 3: np.array(experts)})


def test_the_patches_of_an_expert_are_any_of_a_picture_s_and_of_all_pictures_in_turn() -> None:
    # 600 pictures; expert 0 has the even patches of 10, expert 1 the odd ones.
    pictures = [looked(*[patch % 2 for patch in range(10)]) for _ in range(600)]
    chosen = {}
    for expert in (0, 1):
        found = patch_choices(pictures, 1, expert, most=600)
        assert [picture for picture, _ in found] == list(range(600))
        patches = np.array([patch for _, patch in found])
        assert (patches % 2 == expert).all()
        chosen[expert] = patches // 2
        check_counts(np.bincount(chosen[expert], minlength=5), f"expert {expert}")
        check_counts(np.bincount(chosen[expert][:-1] * 5 + chosen[expert][1:], minlength=25), "neighbouring pictures")
        assert patch_choices(pictures, 3, expert, most=600) == found
        assert patch_choices(pictures[:7], 1, expert, most=7) == found[:7]
        # A second turn has another patch of each picture.
        again = patch_choices(pictures[:5], 1, expert, most=10)
        assert again[:5] == found[:5]
        assert all(
            first[0] == second[0] and first[1] != second[1] for first, second in zip(again, again[5:], strict=False)
        )
    check_counts(np.bincount(chosen[0] * 5 + chosen[1], minlength=25), "two experts")


def a_case(seed: int = 4, *, pairs: int = 240) -> Case:
    return Case(
        Run(
            model=Model(width=60, heads=5, mlp_dim=140, embed_dim=36, depth=2),
            image=Image(size=14, patch=7),
            text=Text(length=7, vocab_size=10),
            moe=Moe(blocks=(1,), num_experts=4, group_pairs=2, min_image_experts=2.0, min_text_experts=2.0),
            train=Train(batch_pairs=pairs, seed=seed, dtype="fp64"),
        ),
        skew=2.0,
    )


def rank_of(rank: int, size: int) -> Mesh:
    return dataclasses.replace(Mesh.single(), world=Axis("world", size, rank, None))


def test_verification_s_batches_are_normal_pictures_and_uniform_tokens_and_lengths() -> None:
    batches = [a_case().examples("pairs", step=step, mesh=Mesh.single(), device=CPU) for step in range(10)]
    images = torch.stack([batch.images for batch in batches]).numpy()
    check_normal(images, 1.0, "images")
    tokens = torch.stack([batch.tokens for batch in batches]).flatten()
    assert tokens.dtype == torch.int64
    counts = np.bincount(tokens.numpy())
    assert len(counts) == 10
    check_counts(counts, "tokens")
    valid = torch.stack([batch.valid for batch in batches]).flatten(0, 1)
    lengths = valid.sum(1)
    assert (valid == (torch.arange(7) < lengths[:, None])).all()
    # At least one token of each caption counts, and all of them as often as one.
    counts = np.bincount(lengths.numpy())[1:]
    assert len(counts) == 7
    check_counts(counts, "lengths")
    # 2,400 pairs: pictures, tokens and lengths are independent, and so are steps and pairs.
    rows = [images.reshape(2400, -1)[:, 0], images.reshape(2400, -1)[:, 1], images.reshape(2400, -1)[:, -1]]
    rows += [tokens.view(2400, 7)[:, 0], tokens.view(2400, 7)[:, 6], lengths]
    check_independent([np.asarray(row, dtype=float) for row in rows], range(6), lags=(0, 1, 240))
    others = [a_case(seed=5), a_case(seed=6)]
    seeds = [batches[0], *(case.examples("pairs", step=0, mesh=Mesh.single(), device=CPU) for case in others)]
    steps = batches[1:3]
    check_independent([batch.images[:10].flatten().numpy() for batch in (*seeds, *steps)], range(5))
    check_independent([batch.tokens.flatten().double().numpy() for batch in (*seeds, *steps)], range(5))


def test_verification_s_pairs_belong_to_their_global_number() -> None:
    whole = a_case(pairs=12).examples("pairs", step=3, mesh=Mesh.single(), device=CPU)
    for rank in range(3):
        part = a_case(pairs=12).examples("pairs", step=3, mesh=rank_of(rank, 3), device=CPU)
        for name in ("images", "tokens", "valid"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[4 * rank : 4 * rank + 4]), name
    texts = a_case(pairs=12).examples("texts", step=3, mesh=Mesh.single(), device=CPU)
    images = a_case(pairs=12).examples("images", step=3, mesh=Mesh.single(), device=CPU)
    assert texts.images is None
    assert images.tokens is None
    assert torch.equal(texts.tokens, whole.tokens)
    assert torch.equal(images.images, whole.images)


def test_verification_moves_every_parameter_by_independent_normal_numbers() -> None:
    case, mesh = a_case(), Mesh.single()
    untilted = dataclasses.replace(case, skew=0.0)
    before = dict(build_model(case.run, mesh=mesh, device=CPU).named_parameters())
    after = dict(untilted.model(mesh, CPU).named_parameters())
    moved, names = [], []
    for name, parameter in before.items():
        if name.endswith("router") or name == "blocks.1.norm2.bias":
            continue  # tilted as well
        step = (after[name] - parameter).detach().double().numpy().ravel()
        init = placement_of(parameter).init
        # 0.05 where the value is a constant or a bias, which also moves by 0.05; else a tenth of the initial scale.
        constant = init.kind == "constant" or name.endswith("bias")
        mean, std = 0.05 if name.endswith("bias") else 0.0, 0.05 if constant else 0.1 * init.scale
        if name == "log_scale":
            assert 0 < abs(step[0]) < 5 * std
            continue
        check_normal(step - mean, std, name)
        if step.size >= 1000:
            moved.append(step[:1000])
            names.append(name)
    check_independent(moved, names, lags=(0, 1))


def test_the_projection_of_verification_is_onto_one_normal_direction() -> None:
    found = project(torch.eye(600, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(found, reference.normal(reference.stream_key("verify-direction"), 600), rtol=1e-12)
    check_normal(found, 1.0, "direction")


class Patient(threading.Event):
    """Notes how long it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.pauses.append(timeout)
        return False


@pytest.mark.parametrize(("failed", "longest"), [(1, 0.5), (2, 1.0), (5, 8.0), (7, 30.0), (20, 30.0)])
def test_pauses_between_retries_double_up_to_a_limit_and_jitter_by_a_half(
    failed: int, longest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The only draw without a key: hosts must differ.
    monkeypatch.setattr(remote, "random", random.Random(failed))
    stopped = Patient()
    for _ in range(5000):
        remote._wait(remote.Patience(), failed, stopped)
    check_uniform(stopped.pauses, 0.5 * longest, 1.5 * longest, f"failure {failed}")
    check_share(np.array(stopped.pauses) > longest, 0.5, "longer than the middle")
