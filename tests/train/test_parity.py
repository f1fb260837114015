"""The parts of `limoe verify` that one process can show: flips, forced routes, what is compared, what is to blame."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.model.moe_layer import Routes
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.parity.boxes import box_of, class_of, errors_of_boxes, parts_of
from limoe_dist.train.parity.case import Case
from limoe_dist.train.parity.checks import DECISIONS, GRADIENTS, NORM, OUTPUTS, START, Check, determined
from limoe_dist.train.parity.compare import Comparison, blame
from limoe_dist.train.parity.facts import Facts, lacking
from limoe_dist.train.parity.routes import UNEXPLAINED, Decision, Flips, follow, judge
from limoe_dist.train.parity.trial import Pass, run_trial
from limoe_dist.train.step import backward
from tests.support.cases import small_run

CPU = torch.device("cpu")


def decision(experts: list[int], kept: list[int]) -> Decision:
    """One group, one choice a token."""
    return Decision(torch.tensor(experts)[None, :, None], torch.tensor(kept, dtype=torch.bool)[None, :, None])


# Four tokens and two experts with two slots each: tokens 0, 1 and 2 want expert 0, and 2 has the smallest gate.
GATES = torch.tensor([[[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]]], dtype=torch.float64)
WANTED = decision([0, 0, 0, 1], [1, 1, 0, 1])


def judged(
    found: Decision, gates: Tensor = GATES, *, by: Literal["max", "sum"] | None = "max", valid: Tensor | None = None
) -> Flips:
    return judge(found, WANTED, gates, valid, by=by, limit=1e-6)


def test_equal_decisions_have_no_flips() -> None:
    assert judged(decision([0, 0, 0, 1], [1, 1, 0, 1])) == Flips(choices=0, slots=0, margin=0.0)


def test_with_two_choices_the_priority_may_be_their_sum() -> None:
    # Both tokens want expert 0, then 1, with one slot each: sums of 0.8, largest gates of 0.5 and 0.45.
    gates = torch.tensor([[[0.5, 0.3, 0.2], [0.45, 0.35, 0.2]]], dtype=torch.float64)
    experts = torch.tensor([[[0, 1], [0, 1]]])
    served, swapped = (
        Decision(experts, torch.tensor([[[first, first], [not first, not first]]])) for first in (True, False)
    )
    margins = {by: judge(swapped, served, gates, None, by=by, limit=1e-6).margin for by in ("max", "sum")}
    assert margins["max"] == pytest.approx(0.05)
    assert margins["sum"] == pytest.approx(0.0, abs=1e-12)


def test_a_choice_that_moved_has_the_margin_of_its_two_gates() -> None:
    # Token 2 took expert 1: 0.6 against 0.4.
    found = judged(decision([0, 0, 1, 1], [1, 1, 1, 1]))
    assert (found.choices, found.slots) == (1, 0)
    assert found.margin == pytest.approx(0.2)


def test_a_slot_that_changed_hands_has_the_margin_of_two_priorities() -> None:
    # Token 2 was served in place of token 1: 0.7 against 0.6.
    swapped = decision([0, 0, 0, 1], [1, 0, 1, 1])
    assert judged(swapped) == Flips(choices=0, slots=2, margin=pytest.approx(0.1))
    tied = GATES.clone()
    tied[0, 2, 0] = 0.7 - 4e-7
    assert judged(swapped, tied).margin == pytest.approx(4e-7)


def test_a_slot_lost_although_there_was_room_is_not_explained() -> None:
    assert judged(decision([0, 0, 0, 1], [1, 1, 0, 0])).margin == UNEXPLAINED


def test_where_order_is_that_of_the_group_no_priority_explains_a_slot() -> None:
    assert judged(decision([0, 0, 0, 1], [1, 0, 1, 1]), by=None).margin == UNEXPLAINED


def test_a_choice_that_moves_into_a_queue_may_push_one_out_and_no_more() -> None:
    # Token 3 has two gates that are as good as equal, and goes to expert 0 before token 1, which loses its slot.
    gates = GATES.clone()
    gates[0, 3] = torch.tensor([0.75, 0.75 + 2e-7], dtype=torch.float64)
    pushed = judged(decision([0, 0, 0, 0], [1, 0, 0, 1]), gates)
    assert (pushed.choices, pushed.slots) == (1, 1)
    assert pushed.margin == pytest.approx(2e-7)
    assert judged(decision([0, 0, 0, 0], [0, 0, 0, 1]), gates).margin > 0.1


def test_masked_padding_explains_nothing() -> None:
    # Token 2 is padding and stands in no queue: nothing was dropped, so token 1 had no one to lose its slot to.
    valid = torch.tensor([[True, True, False, True]])
    assert judged(decision([0, 0, 0, 1], [1, 0, 0, 1]), valid=valid).margin == UNEXPLAINED
    assert judged(decision([0, 0, 0, 1], [1, 0, 0, 1])).margin == pytest.approx(0.1)


def small_case(**train: object) -> Case:
    run = small_run("fp64")
    return Case(run.model_copy(update={"train": run.train.model_copy(update={"batch_pairs": 8} | train)}))


@pytest.mark.parametrize("microbatch_pairs", [0, 4])
def test_forced_decisions_give_the_gradient_of_free_ones(microbatch_pairs: int) -> None:
    case, mesh = small_case(microbatch_pairs=microbatch_pairs), Mesh.single()
    examples = case.examples("pairs", step=0, mesh=mesh, device=CPU)

    def gradients(routes: list[Routes]) -> dict[str, Tensor]:
        model = case.model(mesh, CPU)
        engine = make_engine(model, case.run, mesh)
        backward(model, engine, examples, step=0, run=case.run, mesh=mesh, routes=routes)
        return {name: shard.tensor.clone() for name, shard in engine.gradients().items()}

    free: list[Routes] = [{} for _ in range(8 // (microbatch_pairs or 8))]
    wanted = gradients(free)
    decisions = {block: Decision.of(free, block) for block in case.run.moe.blocks}
    forced = follow(decisions, examples, case.run)
    found = gradients(forced)
    # Slots are given out anew, so that another row of a buffer serves a token.
    assert not torch.equal(free[0][1].index.row_TK, forced[0][1].index.row_TK)
    assert torch.equal(free[0][1].index.kept_TK, forced[0][1].index.kept_TK)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13)


def test_the_case_moves_every_parameter_and_every_expert_and_bias_is_its_own() -> None:
    case, mesh = small_case(), Mesh.single()
    fresh = dict(build_model(case.run, mesh=mesh, device=CPU).named_parameters())
    for name, parameter in case.model(mesh, CPU).named_parameters():
        assert (parameter != fresh[name]).all(), name
        if name.endswith("bias"):
            assert (parameter != 0).all(), name
        if ".experts." in name:
            assert len({tuple(expert.flatten().tolist()) for expert in parameter}) == 8, name


def test_a_batch_is_the_same_whoever_holds_which_part_of_it() -> None:
    case, whole_mesh = small_case(), Mesh.single()
    whole = case.examples("pairs", step=3, mesh=whole_mesh, device=CPU)
    half = dataclasses.replace(whole_mesh, world=dataclasses.replace(whole_mesh.world, size=2, index=1))
    part = case.examples("pairs", step=3, mesh=half, device=CPU)
    assert part.images is not None
    assert whole.images is not None
    assert torch.equal(part.images, whole.images[4:])
    assert torch.equal(part.tokens, whole.tokens[4:])
    assert torch.equal(part.valid, whole.valid[4:])
    assert whole.valid[:, 0].all()
    other = case.examples("pairs", step=4, mesh=whole_mesh, device=CPU)
    assert not torch.equal(other.tokens, whole.tokens)


def test_a_trial_shows_outputs_of_every_module_for_every_token() -> None:
    trial = run_trial(small_case(recompute=True), ("pairs",), mesh=Mesh.single(), device=CPU)
    outputs = trial.passes[0].outputs
    assert list(outputs)[:5] == [
        "image_embed",
        "text_embed",
        "blocks.0.norm1",
        "blocks.0.attention",
        "blocks.0.norm2",
    ]
    # 8 pictures of 16 tokens and 8 captions of 5: once each, though every block was computed twice.
    assert {tuple(len(part) for part in parts) for name, parts in outputs.items() if "embed" not in name} == {(128, 40)}
    assert [len(part) for part in outputs["image_embed"]] == [128, 0]
    assert [len(part) for part in outputs["text_embed"]] == [0, 40]


def test_key_biases_are_set_apart_wherever_a_rank_cuts_the_tensor() -> None:
    name = "blocks.0.attention.qkv_bias"
    queries_keys_values = torch.tensor([[1.0], [2.0], [3.0]])
    assert {label: part.tolist() for label, part in parts_of(name, queries_keys_values, first=0)} == {
        name: [[1.0], [3.0]],
        f"{name} (keys)": [[2.0]],
    }
    assert {label: part.tolist() for label, part in parts_of(name, queries_keys_values[1:], first=1)} == {
        name: [[3.0]],
        f"{name} (keys)": [[2.0]],
    }


def shard(values: list[float]) -> Shard:
    return Shard(tensor=torch.tensor(values), shape=(len(values),), start=(0,), writes=True)


def test_errors_are_relative_to_the_largest_of_a_class_and_absolute_where_that_is_zero() -> None:
    mesh = Mesh.single()
    found = {
        "blocks.0.norm1.bias": shard([1.0, 0.5]),
        "blocks.1.norm1.bias": shard([10.0, 0.1]),
        "text_embed.table": shard([0.0, 0.25]),
    }
    wanted = {
        "blocks.0.norm1.bias": torch.tensor([1.0, 0.0]),
        "blocks.1.norm1.bias": torch.tensor([10.0, 0.1]),
        "text_embed.table": torch.zeros(2),
    }
    # 0.5 of 10, which is the largest of both blocks.
    assert class_of("blocks.0.norm1.bias") == class_of("blocks.1.norm1.bias")
    errors = errors_of_boxes(found, wanted, mesh=mesh, device=CPU)
    assert errors == pytest.approx({"blocks.0.norm1.bias": 0.05, "blocks.1.norm1.bias": 0.0, "text_embed.table": 0.25})
    found["text_embed.table"].tensor[0] = math.nan
    assert errors_of_boxes(found, wanted, mesh=mesh, device=CPU)["text_embed.table"] == math.inf


def test_a_box_is_cut_from_a_whole_tensor_where_it_begins() -> None:
    whole = torch.arange(12).view(3, 4)
    part = Shard(tensor=torch.zeros(2, 2), shape=(3, 4), start=(1, 2), writes=True)
    assert box_of(whole, part).tolist() == [[6, 7], [10, 11]]
    scalar = Shard(tensor=torch.zeros(()), shape=(), start=(), writes=True)
    assert box_of(torch.tensor(5.0), scalar).item() == 5.0


def test_an_update_is_determined_where_a_gradient_was_large_or_none_ever_came() -> None:
    trial = run_trial(small_case(), ("pairs",), mesh=Mesh.single(), device=CPU)

    def step(rows: list[list[float]], name: str = "w") -> Pass:
        shape = (len(rows), len(rows[0]))
        made = Shard(torch.tensor(rows), shape, (0, 0), writes=True)
        return dataclasses.replace(trial.passes[0], gradients={name: made})

    # One hundredth of 8 is 0.08. A zero among others may be rounding's, a row of zeros is not.
    first, second = step([[8.0, -0.1], [0.07, 0.0], [0.0, 0.0]]), step([[0.0, 0.0], [0.0, 0.2], [0.0, 0.0]])
    assert determined([first], 0.01)["w"].tolist() == [[True, True], [False, False], [True, True]]
    assert determined([first, second], 0.01)["w"].tolist() == [[True, True], [False, True], [True, True]]
    small = step([[0.0, 0.0], [0.0, 0.0], [0.0, 0.01]])
    assert determined([first, small], 0.01)["w"].tolist() == [[True, True], [False, False], [False, False]]
    # Queries, keys and values.
    bias = "blocks.0.attention.qkv_bias"
    found = determined([step([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], bias)], 0.01)[bias]
    assert found.tolist() == [[True, True], [False, False], [True, True]]


def comparison(*checks: Check) -> Comparison:
    facts = Facts(dropped_frac=0.2, idle={1: [5]}, groups={"pictures alone": 4}, norms=[2.0, 1.0, 2.0])
    return Comparison("fp64", checks, facts, (), ("blocks.0.attention", "blocks.1.moe", "blocks.2.mlp"))


def failed(what: str, step: str, *places: str) -> Check:
    return Check(what, step, 0.5, 1e-9, places[-1], places)


def test_the_forward_pass_is_to_blame_at_its_first_module_and_before_later_steps() -> None:
    passed = Check.of(START, "step 1: pairs", {"a": 0.0}, 0.0)
    assert blame([comparison(passed)]) is None
    # Decisions of a later step, and a decision behind the module that differs first.
    found = blame(
        [
            comparison(
                passed,
                failed(DECISIONS, "step 2: images", "blocks.1.moe"),
                failed(DECISIONS, "step 1: pairs", "blocks.1.moe"),
                failed(OUTPUTS, "step 1: pairs", "blocks.0.attention", "blocks.2.mlp"),
                failed(GRADIENTS, "step 1: pairs", "log_scale", "blocks.0.attention.out.bias"),
            )
        ]
    )
    assert found is not None
    assert (found.check.what, found.place) == (OUTPUTS, "blocks.0.attention")
    assert found.parameter == "blocks.0.attention.out.bias"


def test_the_first_parameter_of_the_backward_pass_is_to_blame_where_the_forward_pass_agrees() -> None:
    found = blame(
        [
            comparison(
                failed(DECISIONS, "step 2: images", "blocks.1.moe"),
                failed(GRADIENTS, "step 1: pairs", "blocks.2.mlp.up.bias", "blocks.0.norm1.bias"),
                failed(NORM, "step 1: pairs", NORM),
            )
        ]
    )
    assert found is not None
    assert (found.check.what, found.place, found.parameter) == (
        GRADIENTS,
        "blocks.2.mlp.up.bias",
        "blocks.2.mlp.up.bias",
    )


def test_batches_in_which_little_happens_are_not_enough() -> None:
    run: Run = small_run("fp64")
    groups = {"pictures and captions": 4, "pictures alone": 4, "captions alone": 4}
    enough = Facts(dropped_frac=0.05, idle={1: [5]}, groups=groups, norms=[2.0, 0.1, 2.0])
    assert lacking(enough, run) == []
    poor = Facts(dropped_frac=0.049, idle={}, groups=groups | {"captions alone": 0}, norms=[1.0, 1.0, 1.0])
    problems = lacking(poor, run)
    assert [problem[:24] for problem in problems] == [
        "4.9% of the tokens were ",
        "every expert was chosen ",
        "no routing group has cap",
        "the gradient is not clip",
    ]
    dense = run.model_copy(update={"moe": run.moe.model_copy(update={"blocks": ()})})
    assert lacking(dataclasses.replace(enough, dropped_frac=None, idle={}), dense) == []
