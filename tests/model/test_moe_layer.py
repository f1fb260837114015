"""Who is served by which expert, by the settings of the layer. 16 pairs: 16 * 16 image tokens, 16 * 5 text tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limoe_dist.config.schema import Run
from limoe_dist.model.moe_layer import EVALUATION, Route, Routes, RoutingMode
from limoe_dist.model.tower import Limoe, TowerOutput, build_model
from limoe_dist.parallel.mesh import Mesh
from tests.support.cases import batch, perturbed_model, small_run

BLOCK = 1
IMAGES, TEXTS = 2 * 16, 2 * 5
"""Tokens of a group of 2 pairs."""


def varied(**moe: Any) -> Run:
    run = small_run("fp64", pad="token")
    return run.model_copy(update={"moe": run.moe.model_copy(update=moe)})


def passed(model: Limoe, mode: RoutingMode) -> tuple[TowerOutput, Route]:
    routes: Routes = {}
    images, tokens, _ = batch(0, torch.float64)
    with torch.no_grad():
        output = model(images, tokens, mode=mode, routes=routes)
    return output, routes[BLOCK]


def training(step: int = 0, first_group: int = 0) -> RoutingMode:
    return RoutingMode(training=True, seed=3, step=step, first_group=first_group)


def one_expert_for_all(**moe: Any) -> Limoe:
    """Every gate is equal, so that all 42 tokens of a group ask for expert 0, which has 8 slots: 42 / 8 rounded up."""
    model = perturbed_model(varied(noise_std=0.0, **moe), Mesh.single())
    with torch.no_grad():
        model.blocks[BLOCK].moe.router.zero_()
    return model


@pytest.mark.parametrize(
    ("order", "served"),
    [
        ("priority", range(8)),  # equal gates: as they stand
        ("images_first", range(8)),
        ("text_first", range(IMAGES, IMAGES + 8)),
    ],
)
def test_a_fixed_order_serves_one_modality_before_the_other(order: str, served: range) -> None:
    _, route = passed(one_expert_for_all(order=order), training())
    for kept_SK in route.kept_GSK:
        assert kept_SK[:, 0].nonzero().flatten().tolist() == list(served)


def test_a_random_order_belongs_to_the_step_and_the_group_and_prefers_nobody() -> None:
    model = one_expert_for_all(order="random")
    first, again, other_step, other_group = (
        passed(model, mode)[1].order_GS for mode in (training(), training(), training(1), training(0, 8))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other_step)
    # Group 0 of ranks that begin at group 8 is the 9th: other numbers.
    assert not torch.equal(first, other_group)
    assert all(sorted(order.tolist()) == list(range(IMAGES + TEXTS)) for order in first)
    texts = sum(int((passed(model, training(step))[1].kept_GSK[:, IMAGES:, 0]).sum()) for step in range(25))
    # 25 steps of 8 groups give 1,600 slots, of which texts should have 10 in 42, 381, by chance plus or minus 17.
    assert 381 - 4 * 17 < texts < 381 + 4 * 17


def test_the_order_of_service_is_that_of_the_gates() -> None:
    model = perturbed_model(varied(noise_std=0.0), Mesh.single())
    caught: list[torch.Tensor] = []
    layer = model.blocks[BLOCK].moe
    decide = layer._decide

    def catch(gates_GSE: torch.Tensor, *rest: Any) -> Route:
        caught.append(gates_GSE)
        return decide(gates_GSE, *rest)

    layer._decide = catch
    _, route = passed(model, training())
    served = caught[0].max(-1).values.gather(1, route.order_GS)
    assert (served[:, :-1] >= served[:, 1:]).all()


def test_pools_keep_modalities_apart_and_their_losses_finite() -> None:
    run = varied(image_experts=5, min_image_experts=5.0, min_text_experts=3.0, mutual_information=1.0)
    model = perturbed_model(run, Mesh.single())
    images, tokens, _ = batch(0, torch.float64)
    routes: Routes = {}
    output = model(images, tokens, mode=training(), routes=routes)
    expert_GS = routes[BLOCK].expert_GSK[..., 0]
    assert expert_GS[:, :IMAGES].max() < 5 <= expert_GS[:, IMAGES:].min()
    total = torch.stack([loss for record in output.records.values() for loss in record.losses.values()]).sum()
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # What modalities tell about experts is all there is to know: H of their shares, 32 and 10 of 42 tokens.
    shares = torch.tensor([IMAGES, TEXTS], dtype=torch.float64) / (IMAGES + TEXTS)
    known = -(shares * shares.log()).sum() * len(expert_GS)
    torch.testing.assert_close(output.records[BLOCK].losses["mutual_information"].detach(), -known)


def test_a_pool_is_not_left_where_a_second_gate_underflows() -> None:
    run = varied(image_experts=4, top_k=2, min_image_experts=4.0, min_text_experts=3.0, noise_std=0.0)
    model = build_model(run, mesh=Mesh.single(), device=torch.device("cpu"))
    with torch.no_grad():
        # Logits of some thousands: every second gate is 0, as are those of the other pool.
        model.blocks[BLOCK].moe.router.mul_(1e4)
    _, route = passed(model, training())
    assert route.expert_GSK[:, :IMAGES].max() < 4 <= route.expert_GSK[:, IMAGES:].min()


def test_each_modality_has_its_own_router() -> None:
    model = build_model(varied(routers="per_modality", noise_std=0.0), mesh=Mesh.single(), device=torch.device("cpu"))
    assert model.blocks[BLOCK].moe.router.shape == (2, 32, 8)
    _, before = passed(model, training())
    with torch.no_grad():
        model.blocks[BLOCK].moe.router[1].neg_()
    _, after = passed(model, training())
    assert torch.equal(before.expert_GSK[:, :IMAGES], after.expert_GSK[:, :IMAGES])
    assert not torch.equal(before.expert_GSK[:, IMAGES:], after.expert_GSK[:, IMAGES:])


def test_pruned_experts_that_nobody_asked_for_are_not_missed() -> None:
    run = varied()
    whole = perturbed_model(run, Mesh.single())
    output, _ = passed(whole, EVALUATION)
    kept = {block: output.records[block].routed_E2.sum(1).nonzero().flatten().tolist() for block in output.records}
    # Expert 5 of block 1 idles.
    assert 5 not in kept[BLOCK]
    names = tuple(" ".join(map(str, numbers)) for numbers in kept.values())
    pruned = build_model(varied(kept_experts=names), mesh=Mesh.single(), device=torch.device("cpu"))
    weights = whole.state_dict()
    for name, value in weights.items():
        if ".experts." in name:
            weights[name] = value[kept[int(name.split(".")[1])]]
    pruned.load_state_dict(weights)
    again, route = passed(pruned, EVALUATION)
    assert torch.equal(again.image_BP, output.image_BP)
    assert torch.equal(again.text_BP, output.text_BP)
    # Experts keep their numbers in what is reported.
    assert torch.equal(again.records[BLOCK].routed_E2, output.records[BLOCK].routed_E2)
    assert set(route.expert_GSK.unique().tolist()) <= set(kept[BLOCK])


def test_a_token_of_a_pruned_expert_takes_the_best_one_that_is_left() -> None:
    run = varied(kept_experts=("3 6", "0 1 2 3 4 5 6 7"))
    model = build_model(run, mesh=Mesh.single(), device=torch.device("cpu"))
    output, route = passed(model, EVALUATION)
    assert set(route.expert_GSK.unique().tolist()) == {3, 6}
    assert output.records[BLOCK].routed_E2.sum() == 16 * (16 + 5)


@pytest.mark.parametrize(("factor", "slots"), [(0.0, 8), (2.0, 12), (4.0, 24)])
def test_evaluation_may_have_a_capacity_of_its_own(factor: float, slots: int) -> None:
    model = one_expert_for_all(eval_capacity="paper", eval_capacity_factor=factor)
    _, route = passed(model, EVALUATION)
    # 42 tokens * factor / 8 experts, rounded up to a multiple of 4: 5.25 -> 8, 10.5 -> 12, 21 -> 24.
    assert route.kept_GSK.sum((1, 2)).tolist() == [slots] * 8
    _, route = passed(model, training())
    assert route.kept_GSK.sum((1, 2)).tolist() == [8] * 8


def test_two_towers_do_not_share_a_block() -> None:
    run = varied(blocks=())
    run = run.model_copy(update={"model": run.model.model_copy(update={"towers": "two"})})
    model = build_model(run, mesh=Mesh.single(), device=torch.device("cpu"))
    images, tokens, _ = batch(0, torch.float64)
    with torch.no_grad():
        before = model(images, tokens)
        for block in model.text_blocks:
            block.mlp.down.weight.zero_()
        after = model(images, tokens)
    assert torch.equal(before.image_BP, after.image_BP)
    assert not torch.equal(before.text_BP, after.text_BP)


def test_pooled_features_are_what_the_projection_sees() -> None:
    model = perturbed_model(varied(), Mesh.single())
    output, _ = passed(model, EVALUATION)
    for pooled, projection, embedded in (
        (output.image_BD, model.image_projection, output.image_BP),
        (output.text_BD, model.text_projection, output.text_BP),
    ):
        expected = torch.nn.functional.normalize(pooled @ projection.detach(), dim=-1)
        torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-6)
