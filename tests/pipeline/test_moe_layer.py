"""Settings of a MoE layer, from the setting to the layer's outputs and losses, on gates that were written by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from limoe_dist.model.moe_layer import AUX_LOSSES, EVALUATION, MoeRecord
from limoe_dist.model.tower import aux_loss, build_model
from limoe_dist.parallel.mesh import Mesh
from tests.pipeline import hand_layer as hand
from tests.pipeline.hand_layer import TRAINING, layer_of, layout_of, logs, passed, run_of

LN2 = math.log(2)


@pytest.mark.parametrize(("priority", "served"), [("max", 0), ("sum", 1)])
def test_priority_by_sum_serves_another_token_than_by_the_largest_gate(priority: str, served: int) -> None:
    # Both tokens want expert 0, then 1. Largest gates 0.5 and 0.46, sums 0.8 and 0.9. Capacity 2 * 2 * 0.75 / 3 = 1.
    gates = [[0.5, 0.3, 0.2], [0.46, 0.44, 0.1]]
    layer = layer_of(run_of(3, top_k=2, capacity_factor=0.75, priority=priority))
    out_TD, record, route = passed(layer, logs(gates), layout_of(2, 1, 0, 1))
    wanted = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    wanted[served][:2] = gates[served][:2]
    assert out_TD.tolist() == [pytest.approx(row, abs=1e-12) for row in wanted]
    assert route.kept_GSK.tolist() == [[[token == served] * 2 for token in (0, 1)]]
    assert record.routed_E2.tolist() == [[2, 0], [2, 0], [0, 0]]
    assert record.kept_E2.tolist() == [[1, 0], [1, 0], [0, 0]]


@pytest.mark.parametrize("order", ["priority", "images_first", "text_first"])
def test_the_order_of_service_serves_the_larger_gate_or_one_modality(order: str) -> None:
    # One slot of expert 0 for an image with gate 0.6 and a text with 0.7, an image with 0.65 between them.
    gates = [[0.6, 0.4], [0.65, 0.35], [0.7, 0.3], [0.55, 0.45]]
    layer = layer_of(run_of(2, capacity_factor=0.5, order=order))
    out_TD, _, _ = passed(layer, logs(gates), layout_of(1, 2, 1, 2))
    served = {"priority": 2, "images_first": 0, "text_first": 2}[order]
    assert [row.index(max(row)) if max(row) else None for row in out_TD.T.tolist()] == [served, None]
    assert out_TD[served, 0].item() == pytest.approx(gates[served][0])


def test_outputs_weigh_experts_with_their_gates_as_they_are() -> None:
    # 0.5 and 0.3, not 0.625 and 0.375.
    layer = layer_of(run_of(3, top_k=2, capacity_factor=4.0))
    out_TD, _, _ = passed(layer, logs([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), layout_of(1, 1, 1, 1))
    assert out_TD.tolist() == [pytest.approx([0.5, 0.3, 0.0]), pytest.approx([0.0, 0.2, 0.7])]


CLEAN = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]
NOISY = [[0.2, 0.7, 0.1], [0.25, 0.45, 0.3], [0.5, 0.1, 0.4]]


def test_the_noisy_gates_choose_and_weigh_and_the_clean_ones_make_the_losses() -> None:
    run = run_of(3, capacity_factor=3.0, noise_std=1.5, load=1.0, local_image=1.0, mutual_information=1.0)
    out_TD, record, _ = passed(layer_of(run), logs(CLEAN), layout_of(1, 2, 1, 1), noisy=logs(NOISY)[None])
    assert out_TD.tolist() == [
        pytest.approx([0.0, 0.7, 0.0]),
        pytest.approx([0.0, 0.45, 0.0]),
        pytest.approx([0.5, 0.0, 0.0]),
    ]
    clean, noisy = logs(CLEAN).tolist(), logs(NOISY).tolist()
    images, texts = clean[:2], clean[2:]
    found = {name: loss.item() for name, loss in record.losses.items()}
    assert found == pytest.approx(
        {
            "importance": hand.importance(clean),
            "z": hand.z(clean),
            # Noise of a deviation of 1.5 / 3.
            "load": hand.load(clean, noisy, k=1, deviation=0.5),
            "local_image": hand.local(images),
            "local_text": hand.local(texts),
            "global_image": hand.global_loss(images, 3),
            "global_text": hand.global_loss(texts, 3),
            "mutual_information": hand.mutual_information(images, texts, 2 / 3),
        },
        rel=1e-10,
        abs=1e-12,
    )
    assert record.entropy_2.tolist() == pytest.approx([2 * hand.local(images), hand.local(texts)])
    assert record.tokens_2.tolist() == [2, 1]


def test_the_load_loss_compares_with_the_last_of_the_chosen() -> None:
    run = run_of(3, top_k=2, capacity_factor=3.0, noise_std=1.5, load=1.0)
    _, record, _ = passed(layer_of(run), logs(CLEAN), layout_of(1, 2, 1, 1), noisy=logs(NOISY)[None])
    wanted = hand.load(logs(CLEAN).tolist(), logs(NOISY).tolist(), k=2, deviation=0.5)
    assert record.losses["load"].item() == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        # 0.5, 0.25, 0.25: ln 2 / 2 + 2 * (1/4) * 2 ln 2 = 1.5 ln 2; less ln 2; and of 0.75 and 0.25.
        ("plain", 1.5 * LN2),
        ("above_log_k", 0.5 * LN2),
        ("merged", -0.75 * math.log(0.75) + 0.5 * LN2),
    ],
)
def test_the_form_of_the_local_loss_reaches_both_modalities(form: str, wanted: float) -> None:
    run = run_of(3, top_k=2, capacity_factor=3.0, local_form=form, local_image=1.0)
    _, record, _ = passed(layer_of(run), logs([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]), layout_of(1, 1, 1, 1))
    assert record.losses["local_image"].item() == pytest.approx(wanted, rel=1e-12)
    assert record.losses["local_text"].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("prior", "wanted"),
    [
        # Images all on expert 0, texts all on 1: minus the entropy of the shares, 3 and 1 of 4 tokens or one half each.
        ("tokens", -(2 * LN2 - 0.75 * math.log(3))),
        ("uniform", -LN2),
    ],
)
def test_the_prior_of_mutual_information_is_the_share_of_tokens_or_one_half(prior: str, wanted: float) -> None:
    run = run_of(2, mutual_information=1.0, modality_prior=prior, capacity_factor=4.0)
    x_TD = logs([[1.0, 1e-300]] * 3 + [[1e-300, 1.0]])
    _, record, _ = passed(layer_of(run), x_TD, layout_of(3, 1, 1, 1))
    assert record.losses["mutual_information"].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("prior", ["tokens", "uniform"])
def test_masked_padding_counts_in_no_loss_and_no_figure(prior: str) -> None:
    # 2 groups of a picture of 2 tokens and a caption of 3, of which 1 and 2 are there. Padding is far from the others.
    draw = random.Random(5)
    rows = [[draw.gauss(0, 1) for _ in range(4)] for _ in range(10)]
    rows[5] = rows[6] = rows[9] = [9.0, -9.0, 4.0, 0.0]
    valid = torch.tensor([[True, False, False], [True, True, False]])
    weights = dict.fromkeys(AUX_LOSSES, 1.0)
    run = run_of(4, pad="masked", modality_prior=prior, noise_std=2.0, capacity_factor=4.0, **weights)
    clean = torch.tensor(rows, dtype=torch.float64)
    layout = layout_of(2, 2, 2, 3, groups=2, valid=valid)
    noisy = clean[layout.token_GS] + torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    _, record, route = passed(layer_of(run), clean, layout, noisy=noisy)
    wanted: dict[str, float] = dict.fromkeys(AUX_LOSSES, 0.0)
    for images, texts in ((rows[0:2], rows[4:5]), (rows[2:4], rows[7:9])):
        both = images + texts
        drawn = [[a + b for a, b in zip(row, [0.3, -0.2, 0.1, 0.0], strict=True)] for row in both]
        share = {"tokens": len(images) / len(both), "uniform": 0.5}[prior]
        for name, value in {
            "importance": hand.importance(both),
            "load": hand.load(both, drawn, k=1, deviation=0.5),
            "z": hand.z(both),
            "local_image": hand.local(images),
            "local_text": hand.local(texts),
            "global_image": hand.global_loss(images, 4),
            "global_text": hand.global_loss(texts, 4),
            "mutual_information": hand.mutual_information(images, texts, share),
        }.items():
            wanted[name] += value
    assert {name: loss.item() for name, loss in record.losses.items()} == pytest.approx(wanted, rel=1e-10)
    assert record.tokens_2.tolist() == [4, 3]
    assert record.routed_E2.sum(0).tolist() == [4, 3]
    assert record.kept_E2.sum(0).tolist() == [4, 3]
    texts = rows[4:5] + rows[7:9]
    assert record.entropy_2.tolist() == pytest.approx([4 * hand.local(rows[:4]), 3 * hand.local(texts)])
    assert not route.kept_GSK[0, 3:].any()
    assert not route.kept_GSK[1, 4:].any()


def test_losses_are_sums_over_groups_and_not_of_their_tokens_together() -> None:
    # Each group is unbalanced, both together are not.
    run = run_of(2, capacity_factor=4.0)
    x_TD = logs([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]])
    _, record, _ = passed(layer_of(run), x_TD, layout_of(2, 1, 2, 1, groups=2))
    # (0.4 / 0.5)^2 a group.
    assert record.losses["importance"].item() == pytest.approx(2 * 0.64)


def test_a_threshold_asks_for_the_experts_of_its_own_modality() -> None:
    run = run_of(4, min_image_experts=2.0, min_text_experts=3.0, capacity_factor=4.0)
    x_TD = logs([[0.7, 0.1, 0.1, 0.1], [0.85, 0.05, 0.05, 0.05]])
    _, record, _ = passed(layer_of(run), x_TD, layout_of(1, 1, 1, 1))
    image, text = hand.shannon([0.7, 0.1, 0.1, 0.1]), hand.shannon([0.85, 0.05, 0.05, 0.05])
    assert image > LN2
    assert record.losses["global_image"].item() == 0.0
    assert record.losses["global_text"].item() == pytest.approx(math.log(3) - text, rel=1e-12)


def test_one_modality_alone_has_no_losses_of_the_other_and_none_of_both() -> None:
    run = run_of(2, mutual_information=1.0, local_image=1.0, capacity_factor=4.0)
    for layout, gone in ((layout_of(2, 1, 0, 1), "text"), (layout_of(0, 1, 2, 1), "image")):
        _, record, _ = passed(layer_of(run), logs([[0.9, 0.1], [0.4, 0.6]]), layout)
        here = {"text": "image", "image": "text"}[gone]
        assert {*record.losses} == {"importance", "z", f"local_{here}", f"global_{here}"}


def record(**losses: float) -> MoeRecord:
    nothing = torch.zeros(2)
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in losses.items()}
    return MoeRecord(values, nothing, nothing, nothing, nothing)


def test_the_auxiliary_loss_is_divided_by_the_active_losses_and_not_by_those_that_are_there() -> None:
    run = run_of(4, aux_weight=0.5, importance=1.0, z=2.0, local_text=3.0, global_image=0.0, global_text=0.25)
    whole = {1: record(importance=1.0, z=10.0, local_text=100.0, global_text=1000.0, local_image=7.0)}
    # 1 + 20 + 300 + 250 = 571, over 4 active losses and 8 groups, times a half.
    found = aux_loss(whole, run, global_groups=8)
    assert found is not None
    assert found.item() == pytest.approx(0.5 * 571 / (4 * 8))
    # Pictures alone: 1 + 20, over the same 4.
    pictures = {1: record(importance=1.0, z=10.0, local_image=7.0)}
    found = aux_loss(pictures, run, global_groups=8)
    assert found is not None
    assert found.item() == pytest.approx(0.5 * 21 / (4 * 8))
    # Blocks are summed, not averaged.
    found = aux_loss({**whole, 3: record(z=1.0)}, run, global_groups=8)
    assert found is not None
    assert found.item() == pytest.approx(0.5 * 573 / (4 * 8))
    assert aux_loss({1: record(local_image=7.0)}, run, global_groups=8) is None


def slots_of(mode: Any, *, valid: Tensor | None = None, **moe: Any) -> list[int]:
    """Tokens that expert 0 of 2 serves in each of 2 groups, which all want it: 3 images and 2 texts a group."""
    run = run_of(2, pad="token" if valid is None else "masked", **moe)
    layout = layout_of(2, 3, 2, 2, groups=2, valid=valid)
    out_TD, _, route = passed(layer_of(run), logs([[0.9, 0.1]] * 10), layout, mode)
    assert (out_TD[:, 0] > 0).sum().item() == route.kept_GSK.sum().item()
    return route.kept_GSK.sum((1, 2)).tolist()


def test_slots_are_limited_in_training_and_in_evaluation_only_where_that_is_asked_for() -> None:
    # 5 tokens * 1.2 / 2 = 3 slots.
    assert slots_of(TRAINING, capacity_factor=1.2) == [3, 3]
    assert slots_of(EVALUATION, capacity_factor=1.2) == [5, 5]
    assert slots_of(EVALUATION, capacity_factor=1.2, eval_capacity="paper") == [3, 3]
    assert slots_of(EVALUATION, capacity_factor=1.2, eval_capacity="paper", eval_capacity_factor=0.8) == [2, 2]
    assert slots_of(TRAINING, capacity_factor=1.2, eval_capacity="paper", eval_capacity_factor=0.8) == [3, 3]
    # Of 3.05 slots a fourth is begun, and the multiple of 2 is above.
    assert slots_of(TRAINING, capacity_factor=1.22) == [4, 4]
    assert slots_of(TRAINING, capacity_factor=0.9, capacity_multiple=2) == [4, 4]
    # Masked padding counts for the capacity, and takes no slot.
    valid = torch.tensor([[True, False], [True, True]])
    assert slots_of(TRAINING, valid=valid, capacity_factor=1.6) == [4, 4]
    assert slots_of(TRAINING, valid=valid, capacity_factor=2.0) == [4, 5]
    assert slots_of(EVALUATION, valid=valid) == [4, 5]


def test_evaluation_has_neither_noise_nor_losses() -> None:
    x_TD = logs([[0.6, 0.4], [0.3, 0.7]])
    layer = layer_of(run_of(2, noise_std=50.0))
    out_TD, record_, _ = passed(layer, x_TD, layout_of(1, 1, 1, 1), EVALUATION)
    assert out_TD.tolist() == [pytest.approx([0.6, 0.0]), pytest.approx([0.0, 0.7])]
    assert record_.losses == {}


def test_noise_has_the_deviation_of_the_setting_over_the_experts_and_is_new_in_each_step_group_block_and_seed() -> None:
    layout = layout_of(4, 400, 0, 1, groups=4)
    x_TD = torch.zeros(1600, 8, dtype=torch.float64)
    layer = layer_of(run_of(8, noise_std=4.0))

    def noise(**changes: int) -> Tensor:
        clean, noisy = layer.logits(x_TD, layout, replace(TRAINING, **changes))
        assert (clean == 0).all()
        return noisy

    with torch.no_grad():
        first = noise()
        # 12,800 numbers of deviation 4 / 8: that of their deviation is 0.5 / sqrt(25600) = 0.003, of their mean 0.0044.
        assert first.std().item() == pytest.approx(0.5, abs=0.015)
        assert first.mean().item() == pytest.approx(0.0, abs=0.02)
        others = [noise(step=1), noise(seed=4), noise(first_group=4)]
        layer.index = 3
        others.append(noise())
        layer.index = 1
        assert torch.equal(noise(), first)
        # Global group 2 is the third of a rank that begins at 0, and the first of one that begins at 2.
        assert torch.equal(noise(first_group=2)[:2], first[2:])
    alike = [first[0], *first[1:], *(other[0] for other in others)]
    for number, one in enumerate(alike):
        for other in alike[:number]:
            # Independent: a correlation of deviation 1 / sqrt(3200) = 0.018.
            assert abs((one * other).mean().item() / 0.25) < 0.1


def test_the_scale_of_cosines_is_one_over_the_temperature() -> None:
    small = run_of(2)
    run = small.model_copy(update={"model": small.model.model_copy(update={"init_temperature": 0.25})})
    model = build_model(run, mesh=Mesh.single(), device=torch.device("cpu"))
    assert model.scale.item() == pytest.approx(4.0, rel=1e-6)
    with torch.no_grad():
        model.log_scale += math.log(3)
    assert model.scale.item() == pytest.approx(12.0, rel=1e-6)
