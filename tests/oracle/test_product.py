"""The product against the oracle: forward pass, losses, gradients, updates and log lines of random configurations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.oracle import product
from tests.oracle.cases import FOCI, Case, cases, perturbed
from tests.oracle.log import log_line
from tests.oracle.step import StepResult, Trainer, forward
from tests.support.ranks import RanksPool

CLOSE = 1e-10
"""Largest error of a number of the forward pass or the log, relative where it is above 1: fp64 and a few operations."""
GRADIENT = 1e-8
"""Largest error of a gradient, relative to the largest of its parameter."""
UPDATED = 1e-9
"""Largest error of a weight after three steps."""
NOISE = 1e-10
"""A gradient below this share of the largest one is rounding, which an optimizer that divides by the gradient's size
turns into an update of any size. Key biases have such gradients (they change no attention)."""
UNTIMED = {"time", "pairs_per_s", "seconds_per_step", "memory_bytes"}


def close(found: Any, wanted: Any, what: str, limit: float = CLOSE) -> None:
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    assert found.shape == wanted.shape, f"{what}: shape {found.shape}, not {wanted.shape}"
    error = np.abs(found - wanted) / np.maximum(1, np.abs(wanted))
    assert not error.size or error.max() <= limit, f"{what}: off by {error.max():.2e}\n{found}\n{wanted}"


ELSEWHERE = {
    "image": {"mean", "std", "min_crop_area", "flip", "rotate_degrees", "scale", "translate", "brightness", "contrast"}
    | {"saturation", "hue_degrees"},
    "text": {"vocab_size"},
    "optim": {"engine", "zero_stage", "offload"},
    "train": {"dtype", "init_from", "stop_grace_s"},
}
"""Settings of the sections below that decide no number of a step from given pixels and weights, or only its precision:
pixels, the size of a table, other engines, and files."""


@settings(max_examples=200, phases=(Phase.generate,))
@given(data=st.data())
def draw(data: st.DataObject, seen: dict[str, set[Any]]) -> None:
    run = data.draw(cases(focus=data.draw(st.sampled_from(["", *FOCI])))).run
    for section in ("model", "image", "text", "moe", "optim", "train"):
        for name, value in getattr(run, section):
            if name not in ELSEWHERE.get(section, ()):
                seen.setdefault(f"{section}.{name}", set()).add(value)


def test_every_setting_that_decides_a_step_is_drawn_with_several_values() -> None:
    seen: dict[str, set[Any]] = {}
    draw(seen=seen)
    assert [name for name, values in seen.items() if len(values) < 2] == []


def facts_of(case: Case, results: list[StepResult]) -> set[str]:
    """What of FOCI the case is, and what happened in its steps."""
    run, moe = case.run, case.run.moe
    facts = {
        "no experts": not moe.blocks and run.model.towers == "one",
        "two towers": run.model.towers == "two",
        "pruned experts": bool(moe.blocks and moe.kept_experts),
        "two pools": bool(moe.blocks and moe.image_experts),
        "sums": bool(moe.blocks) and moe.top_k > 1 and (moe.order, moe.priority) == ("priority", "sum"),
        "groups": run.train.microbatch_pairs > moe.group_pairs,
        "cooldown": run.optim.cooldown_steps > run.train.steps - len(results) + 1,
    }
    for result, kind in zip(results, case.given, strict=True):
        blocks = result.forward.blocks.values()
        facts |= {
            kind: True,
            "clipped" if result.grad_norm > run.optim.clip_norm else "not clipped": True,
            "dropped tokens": facts.get("dropped tokens", False)
            or any((block.kept_E2.sum(1) < block.routed_E2.sum(1)).any() for block in blocks),
            "idle experts": facts.get("idle experts", False)
            or any((block.routed_E2.sum(1) == 0).any() for block in blocks),
        }
    return {name for name, met in facts.items() if met}


def starting_weights(case: Case) -> dict[str, np.ndarray]:
    return perturbed(product.initial_weights(case.run), case.seed)


def drawn(examples: int) -> settings:
    """A failing case is printed as it is: shrinking it would train hundreds of others first."""
    return settings(max_examples=examples, phases=(Phase.generate,))


@drawn(30)
@given(case=cases())
def test_a_forward_pass_is_that_of_the_paper(case: Case) -> None:
    run, weights = case.run, starting_weights(case)
    for step, batch in enumerate(case.batches()):
        noise = product.noise(run, batch, step)
        for training in (True, False):
            uniform = product.uniform(run, batch, step, training=training)
            output, routes = product.passed(run, weights, batch, training=training, step=step)
            wanted = forward(run, weights, batch, training=training, noise=noise, uniform=uniform)
            for name in ("image_BP", "text_BP", "image_BD", "text_BD"):
                got, expected = getattr(output, name), getattr(wanted, name)
                assert (got is None) == (expected is None), name
                if got is not None:
                    close(got, expected, name)
            assert list(output.records) == list(wanted.blocks) == list(run.moe.blocks)
            for block, record in wanted.blocks.items():
                compare_blocks(output.records[block], routes[block], record, training=training)


def compare_blocks(found: Any, route: Any, wanted: Any, *, training: bool) -> None:
    """The record and the routing decisions of one MoE block."""
    assert np.array_equal(route.expert_GSK.reshape(wanted.expert_GSK.shape), wanted.expert_GSK)
    assert np.array_equal(route.kept_GSK.reshape(wanted.kept_GSK.shape), wanted.kept_GSK)
    assert np.array_equal(route.order_GS.reshape(wanted.order_GS.shape), wanted.order_GS)
    for name in ("routed_E2", "kept_E2", "entropy_2", "tokens_2"):
        close(getattr(found, name), getattr(wanted, name), name)
    if training:
        assert set(found.losses) == set(wanted.losses)
        for name, loss in wanted.losses.items():
            close(found.losses[name], loss, name)


@drawn(30)
@given(case=cases())
def compare_any(case: Case, facts: Counter[str]) -> None:
    weights = starting_weights(case)
    ranks = [product.trained(case.run.model_dump_json(), weights, case.batches())]
    facts.update(facts_of(case, compare_training(case, weights, ranks)))


def test_three_steps_of_one_process_are_those_of_the_oracle() -> None:
    facts: Counter[str] = Counter()
    compare_any(facts=facts)
    wanted = {"pairs", "images", "texts", "clipped", "not clipped", "dropped tokens", "idle experts"}
    assert wanted - set(facts) == set()


@pytest.mark.parametrize("focus", FOCI)
@drawn(4)
@given(data=st.data())
def test_three_steps_of_rarer_cases_are_those_of_the_oracle(focus: str, data: st.DataObject) -> None:
    case = data.draw(cases(focus=focus))
    weights = starting_weights(case)
    ranks = [product.trained(case.run.model_dump_json(), weights, case.batches())]
    assert focus in facts_of(case, compare_training(case, weights, ranks))


@drawn(6)
@given(data=st.data())
def compare_on_ranks(pool: RanksPool, data: st.DataObject) -> None:
    case = data.draw(cases(ranks=4, focus=data.draw(st.sampled_from(["", "", *FOCI]))))
    weights = starting_weights(case)
    compare_training(case, weights, pool.run(product.trained, case.run.model_dump_json(), weights, case.batches()))


def test_three_steps_of_four_ranks_are_those_of_the_oracle(ranks4: RanksPool) -> None:
    compare_on_ranks(pool=ranks4)


def compare_training(case: Case, weights: dict[str, np.ndarray], ranks: list[product.Trained]) -> list[StepResult]:
    trainer, results = Trainer(case.run, weights), []
    uncertain = {name: np.zeros_like(weight, dtype=bool) for name, weight in weights.items()}
    for number, batch in enumerate(case.batches()):
        noise, uniform = product.noise(case.run, batch, number), product.uniform(case.run, batch, number)
        results.append(trainer.step(batch, noise=noise, uniform=uniform))
        compare_steps([rank.steps[number] for rank in ranks], results[-1], uncertain)
    for rank in ranks:
        compare_lines(rank.line, log_line(case.run, results, results[-1].weights))
    return results


def compare_steps(ranks: list[product.Step], wanted: StepResult, uncertain: dict[str, np.ndarray]) -> None:
    """uncertain: elements of weights whose gradient was rounding alone in a step so far; this step's are added."""
    close(sum(rank.contrastive for rank in ranks), wanted.contrastive, "contrastive loss")
    close(sum(rank.aux for rank in ranks), wanted.aux, "auxiliary loss")
    close(sum(rank.correct_2 for rank in ranks), wanted.correct_2, "pairs found")
    for rank in ranks:
        close(rank.guard_loss, wanted.contrastive + wanted.aux, "loss that the guard sees")
        close(rank.guard_norm, wanted.grad_norm, "norm that the guard sees", GRADIENT)
        close(rank.grad_norm, wanted.grad_norm, "gradient norm", GRADIENT)
        close(rank.rate, wanted.rate, "learning rate", 1e-14)
    gradients = product.whole([rank.gradients for rank in ranks])
    masters = product.whole([rank.masters for rank in ranks])
    parameters = product.whole([rank.weights for rank in ranks])
    assert set(gradients) == set(masters) == set(parameters) == set(wanted.gradients)
    largest = max(np.abs(gradient).max() for gradient in wanted.gradients.values())
    for name, gradient in wanted.gradients.items():
        scale = max(np.abs(gradient).max(), NOISE * largest, 1e-300)
        close(gradients[name] / scale, gradient / scale, f"gradient of {name}", GRADIENT)
        tiny = np.abs(gradient) < NOISE * largest
        uncertain[name] |= tiny & ((gradient != 0) | (gradients[name] != 0))
        certain = ~uncertain[name]
        close(masters[name][certain], wanted.weights[name][certain], f"{name} after the step", UPDATED)
        assert np.array_equal(masters[name], parameters[name]), f"{name}: the model has not the optimizer's weights"


def compare_lines(found: dict[str, Any], wanted: dict[str, Any], place: str = "") -> None:
    """Every number of a line of metrics but its clocks."""
    assert set(found) - UNTIMED == set(wanted), f"{place}: keys"
    for name, value in wanted.items():
        if isinstance(value, dict):
            compare_lines(found[name], value, f"{place}{name}/")
        elif value is None:
            assert found[name] is None, f"{place}{name}"
        else:
            close(found[name], value, f"{place}{name}", GRADIENT if name == "grad_norm" else CLOSE)
