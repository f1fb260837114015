"""What `limoe verify` lets pass: for every kind of check a difference just below its tolerance and one just above.

The tolerances stand here as docs/verify.md has them, apart from the product's own table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from limoe_dist.model.moe_layer import MoeRecord
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.parity import checks, compare, facts
from limoe_dist.train.parity.along import Followed, Stage
from limoe_dist.train.parity.case import Case
from limoe_dist.train.parity.checks import TOLERANCES, Check, checks_of
from limoe_dist.train.parity.compare import Comparison, blame
from limoe_dist.train.parity.facts import Facts, facts_of, lacking
from limoe_dist.train.parity.routes import Decision, Flips, judge
from limoe_dist.train.parity.trial import Trial, run_trial
from tests.support.cases import small_run

CPU = torch.device("cpu")
LIMITS = {
    "fp64": {"outputs": 1e-9, "gradients": 1e-9, "losses": 1e-9, "state": 2e-9, "weights": 1e-7, "margin": 1e-6},
    "fp32": {"outputs": 1e-5, "gradients": 1e-5, "losses": 1e-5, "state": 2e-5, "weights": 1e-3, "margin": 1e-6},
    "bf16": {"outputs": 5e-2, "gradients": 5e-2, "losses": 2e-2, "state": 0.1, "weights": 0.5, "margin": 5e-2},
}
DETERMINED = {"fp64": 0.01, "fp32": 0.01, "bf16": 0.1}
BATCHES = ("pairs", "texts")


@pytest.fixture(scope="module")
def honest() -> tuple[Case, Trial]:
    run = small_run("fp64")
    run = run.model_copy(
        update={
            "model": run.model.model_copy(update={"depth": 2, "width": 16, "mlp_dim": 16}),
            "moe": run.moe.model_copy(update={"blocks": (1,), "aux_weight": 1.0}),
            "train": run.train.model_copy(update={"batch_pairs": 8}),
        }
    )
    case = Case(run, skew=1.0)
    return case, run_trial(case, BATCHES, mesh=Mesh.single(), device=CPU)


Change = Callable[[Trial], object]


def copied(trial: Trial) -> Trial:
    """The trial with tensors of its own, so far as they are compared."""

    def shards(given: dict[str, Shard]) -> dict[str, Shard]:
        return {name: dataclasses.replace(shard, tensor=shard.tensor.clone()) for name, shard in given.items()}

    passes = [
        dataclasses.replace(
            one,
            losses={**one.losses},
            outputs={name: (images.clone(), texts.clone()) for name, (images, texts) in one.outputs.items()},
            gradients=shards(one.gradients),
            weights=shards(one.weights),
            state=shards(one.state),
        )
        for one in trial.passes
    ]
    return Trial(shards(trial.start), passes)


def compared(
    honest: tuple[Case, Trial],
    change: Change,
    *,
    precision: str = "fp64",
    reference: Change = lambda trial: None,
    flips: dict[tuple[int, int], Flips] | None = None,
    steps: int = 1,
) -> dict[str, Check]:
    """The checks that failed, by what and step, of a trial with a change against the reference."""
    case, wanted = honest[0], copied(Trial(honest[1].start, honest[1].passes[:steps]))
    reference(wanted)
    found = copied(wanted)
    change(found)
    train = case.run.train.model_copy(update={"dtype": precision})
    stage = Stage(Case(case.run.model_copy(update={"train": train})), BATCHES[:steps], wanted, Mesh.single(), CPU)
    made = checks_of(stage, Followed(found, flips or {}), TOLERANCES[precision])
    assert len(made) == 1 + 8 * steps
    return {f"{check.what}, {check.step}": check for check in made if not check.passed}


def test_equal_trials_pass_everything(honest: tuple[Case, Trial]) -> None:
    for precision in LIMITS:
        assert compared(honest, lambda trial: None, precision=precision, steps=2) == {}


@pytest.fixture(params=[*LIMITS])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check_limit(
    honest: tuple[Case, Trial], precision: str, what: str, plant: Callable[[Trial, float], object], **given: Any
) -> None:
    """Nothing fails at 0.98 times the limit; at 1.02 times this check does, and no other."""
    step = given.pop("step", "step 1: pairs")
    place = given.pop("place", None)
    given["steps"] = int(step.split()[1][0])
    assert compared(honest, lambda trial: plant(trial, 0.98), precision=precision, **given) == {}
    failed = compared(honest, lambda trial: plant(trial, 1.02), precision=precision, **given)
    assert [*failed] == [f"{what}, {step}"]
    if place is not None:
        assert next(iter(failed.values())).failed == (place,)


def test_weights_at_the_start_must_be_equal_to_the_last_bit(honest: tuple[Case, Trial], precision: str) -> None:
    def plant(trial: Trial) -> None:
        tensor = trial.start["model/norm.bias"].tensor
        tensor[3] = math.nextafter(tensor[3].item(), 10)

    assert [*compared(honest, plant, precision=precision)] == ["weights at the start, step 1: pairs"]


@pytest.mark.parametrize("part", [0, 1], ids=["image tokens", "text tokens"])
def test_outputs_are_compared_with_the_largest_of_their_module(
    honest: tuple[Case, Trial], precision: str, part: int
) -> None:
    name, limit = "blocks.1.moe", LIMITS[precision]["outputs"]
    largest = max(tokens.abs().max().item() for tokens in honest[1].passes[0].outputs[name])

    def plant(trial: Trial, times: float) -> None:
        tokens = trial.passes[0].outputs[name][part]
        tokens[tokens.abs().argmin()] += times * limit * largest

    check_limit(honest, precision, "outputs of modules", plant, place=name)


def test_losses_above_one_are_compared_relatively_and_others_in_nats(
    honest: tuple[Case, Trial], precision: str
) -> None:
    limit, losses = LIMITS[precision]["losses"], honest[1].passes[0].losses
    assert losses["contrastive"] > 1.5

    def planted(name: str) -> Callable[[Trial, float], None]:
        def plant(trial: Trial, times: float) -> None:
            trial.passes[0].losses[name] += times * limit * max(1.0, losses[name])

        return plant

    check_limit(honest, precision, "contrastive loss", planted("contrastive"))
    small = min((name for name in losses if "moe" in name), key=lambda name: abs(losses[name]))
    large = max(losses, key=lambda name: losses[name] if "moe" in name else 0)
    assert losses[small] < 0.5
    assert losses[large] > 1.5
    for name in (small, large, "weighted sum"):
        check_limit(honest, precision, "auxiliary losses", planted(name), place=name)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_norm_is_compared_relatively_whatever_its_size(
    honest: tuple[Case, Trial], precision: str, size: float
) -> None:
    def set_norm(trial: Trial, norm: float) -> None:
        trial.passes[0] = dataclasses.replace(trial.passes[0], norm=norm)

    def plant(trial: Trial, times: float) -> None:
        set_norm(trial, size * (1 + times * LIMITS[precision]["losses"]))

    check_limit(honest, precision, "gradient norm", plant, reference=lambda trial: set_norm(trial, size))


def largest_of(shards: dict[str, Shard], *names: str) -> float:
    return max(shards[name].tensor.abs().max().item() for name in names)


def smallest(tensor: Tensor) -> Tensor:
    """A view of the entry that is nearest to zero."""
    return tensor.view(-1)[tensor.abs().argmin() : tensor.abs().argmin() + 1]


def test_gradients_are_compared_with_the_largest_of_their_class(honest: tuple[Case, Trial], precision: str) -> None:
    # The same parameter of both blocks: its class is the name without the number.
    names = ("blocks.0.norm1.weight", "blocks.1.norm1.weight")
    largest = largest_of(honest[1].passes[0].gradients, *names)
    for name in names:

        def plant(trial: Trial, times: float, name: str = name) -> None:
            tensor = trial.passes[0].gradients[name].tensor
            smallest(tensor).add_(times * LIMITS[precision]["gradients"] * largest)

        check_limit(honest, precision, "gradients", plant, place=name)


def test_gradients_of_key_biases_and_of_what_has_only_zeros_are_compared_absolutely(
    honest: tuple[Case, Trial], precision: str
) -> None:
    limit = LIMITS[precision]["gradients"]
    bias = "blocks.1.attention.qkv_bias"

    def plant_keys(trial: Trial, times: float) -> None:
        trial.passes[0].gradients[bias].tensor[1].view(-1)[0] = times * limit

    def no_keys(trial: Trial) -> None:
        trial.passes[0].gradients[bias].tensor[1].zero_()

    check_limit(honest, precision, "gradients", plant_keys, place=f"{bias} (keys)", reference=no_keys)

    # Pictures have no gradient in a batch of captions.
    def plant_zeros(trial: Trial, times: float) -> None:
        tensor = trial.passes[1].gradients["image_projection"].tensor
        assert (tensor == 0).all()
        tensor[0, 0] = times * limit

    check_limit(honest, precision, "gradients", plant_zeros, step="step 2: texts", place="image_projection")


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_moments_may_differ_twice_as_much(honest: tuple[Case, Trial], precision: str, moment: str) -> None:
    name = f"adamw/{moment}/norm.weight"
    largest = largest_of(honest[1].passes[0].state, name)

    def plant(trial: Trial, times: float) -> None:
        smallest(trial.passes[0].state[name].tensor).add_(times * LIMITS[precision]["state"] * largest)

    check_limit(honest, precision, "optimizer state", plant, place=name)


@pytest.mark.parametrize("step", [0, 1])
def test_masters_are_compared_with_the_largest_update_of_their_class(
    honest: tuple[Case, Trial], precision: str, step: int
) -> None:
    name, trial = "text_projection", honest[1]
    before = (trial.passes[0].state if step else trial.start)[f"model/{name}"].tensor
    update = (trial.passes[step].state[f"model/{name}"].tensor - before).abs().max().item()
    gradient = torch.stack([one.gradients[name].tensor.abs() for one in trial.passes[: step + 1]]).amax(0)

    def plant(trial: Trial, times: float) -> None:
        # Where the gradient was the largest, the update is determined in every precision.
        tensor = trial.passes[step].state[f"model/{name}"].tensor
        tensor.view(-1)[gradient.argmax()] += times * LIMITS[precision]["weights"] * update

    label = ("step 1: pairs", "step 2: texts")[step]
    check_limit(honest, precision, "weights", plant, place=f"{name} (master)", step=label)


def test_every_ranks_own_weights_are_compared_too_but_not_where_they_are_rounded_to_bf16(
    honest: tuple[Case, Trial],
) -> None:
    def plant(trial: Trial) -> None:
        tensor = trial.passes[0].weights["model/text_projection"].tensor
        tensor.view(-1)[honest[1].passes[0].gradients["text_projection"].tensor.abs().argmax()] += 1.0

    for precision in ("fp64", "fp32"):
        failed = compared(honest, plant, precision=precision)
        assert [check.failed for check in failed.values()] == [("text_projection",)]
    assert compared(honest, plant, precision="bf16") == {}


def test_weights_are_compared_where_a_gradient_was_at_least_a_hundredth_of_the_largest(
    honest: tuple[Case, Trial], precision: str
) -> None:
    share = DETERMINED[precision]

    def gradients(trial: Trial) -> None:
        tensor = trial.passes[0].gradients["norm.weight"].tensor
        tensor.fill_(8.0)
        tensor[2], tensor[3], tensor[4] = 8.0 * share * 0.999, -8.0 * share * 1.001, 8.0 * share

    def planted(place: int) -> Change:
        def plant(trial: Trial) -> None:
            trial.passes[0].state["model/norm.weight"].tensor[place] += 10.0

        return plant

    found = {place: compared(honest, planted(place), precision=precision, reference=gradients) for place in (2, 3, 4)}
    assert found[2] == {}
    for place in (3, 4):
        assert [*found[place]] == ["weights, step 1: pairs"]


def test_a_weight_is_compared_where_a_gradient_of_any_step_so_far_was_large(honest: tuple[Case, Trial]) -> None:
    # Place 2 has a large gradient in step 2 alone, place 3 in step 1 alone, place 4 in neither.
    def gradients(trial: Trial) -> None:
        for one, large in zip(trial.passes, (3, 2), strict=True):
            tensor = one.gradients["norm.weight"].tensor
            tensor.fill_(8.0)
            tensor[2:5] = 1e-6
            tensor[large] = 8.0

    def planted(step: int, place: int) -> Change:
        def plant(trial: Trial) -> None:
            trial.passes[step].state["model/norm.weight"].tensor[place] += 10.0

        return plant

    for step, seen in ((0, [3]), (1, [2, 3])):
        found = [place for place in (2, 3, 4) if compared(honest, planted(step, place), reference=gradients, steps=2)]
        assert found == seen


def test_a_margin_of_a_flip_is_compared_with_its_limit(honest: tuple[Case, Trial], precision: str) -> None:
    for times, failed in ((0.98, []), (1.02, ["routing decisions, step 2: texts"])):
        flips = {(1, 1): Flips(choices=1, slots=0, margin=times * LIMITS[precision]["margin"])}
        assert [*compared(honest, lambda trial: None, precision=precision, flips=flips, steps=2)] == failed


def test_a_choice_that_moved_passes_only_across_a_smaller_margin(precision: str) -> None:
    for times in (0.98, 1.02):
        margin = times * LIMITS[precision]["margin"]
        gates_GSE = torch.tensor([[[0.4 + margin, 0.4, 0.2 - margin]]], dtype=torch.float64)
        wanted, found = (
            Decision(torch.tensor([[[expert]]]), torch.ones(1, 1, 1, dtype=torch.bool)) for expert in (0, 1)
        )
        flips = judge(found, wanted, gates_GSE, None, by="max", limit=TOLERANCES[precision].margin)
        assert flips.margin == pytest.approx(margin, rel=1e-6)
        assert (flips.margin <= TOLERANCES[precision].margin) == (times < 1)


def test_what_is_not_a_number_fails_every_check(honest: tuple[Case, Trial]) -> None:
    def losses(trial: Trial) -> None:
        trial.passes[0].losses.update({"contrastive": math.nan, "weighted sum": math.nan})
        trial.passes[0] = dataclasses.replace(trial.passes[0], norm=math.nan)

    def tensors(trial: Trial) -> None:
        trial.start["model/norm.bias"].tensor[0] = math.nan
        trial.passes[0].outputs["norm"][1][0] = math.nan
        trial.passes[0].gradients["norm.bias"].tensor[0] = math.nan
        trial.passes[0].state["adamw/exp_avg/norm.bias"].tensor[0] = math.nan
        trial.passes[0].state["model/norm.bias"].tensor[0] = math.nan

    assert {check.what for check in compared(honest, losses).values()} == {
        "contrastive loss",
        "auxiliary losses",
        "gradient norm",
    }
    assert {check.what for check in compared(honest, tensors).values()} >= {
        "weights at the start",
        "outputs of modules",
        "gradients",
        "optimizer state",
    }


def test_a_check_passes_at_its_tolerance_and_never_with_what_is_not_a_number() -> None:
    limit = 1e-9
    errors = {"a": 0.0, "at": limit, "above": math.nextafter(limit, 1), "nan": math.nan, "inf": math.inf}
    assert Check.of("gradients", "step 1: pairs", errors, limit).failed == ("above", "nan", "inf")
    assert Check.of("gradients", "step 1: pairs", {"a": 0.0, "at": limit}, limit).passed


def test_the_first_gradient_to_fail_is_the_first_of_the_backward_pass(honest: tuple[Case, Trial]) -> None:
    names = ["blocks.0.norm1.weight", "blocks.1.norm1.weight", "log_scale", "norm.weight", "text_projection"]

    def plant(trial: Trial) -> None:
        for name in names:
            trial.passes[0].gradients[name].tensor.add_(100.0)

    (check,) = compared(honest, plant).values()
    assert {*check.failed[:2]} == {"text_projection", "log_scale"}
    assert check.failed[2:] == ("norm.weight", "blocks.1.norm1.weight", "blocks.0.norm1.weight")


def test_the_checks_are_told_in_the_order_in_which_a_defect_spreads() -> None:
    assert checks.CHECKS == (
        "weights at the start",
        "routing decisions",
        "outputs of modules",
        "contrastive loss",
        "auxiliary losses",
        "gradients",
        "gradient norm",
        "optimizer state",
        "weights",
    )


STEP1, STEP2 = "step 1: pairs", "step 2: images"
WHOLE = Facts(dropped_frac=0.2, idle={1: [5]}, groups={}, norms=[2.0])


def comparison(failed: list[tuple[str, str]], precision: str = "fp64") -> Comparison:
    """Every check of two steps, in the order of a comparison; those that are named have failed."""
    made = []
    for what in checks.CHECKS:
        for step in (STEP1, STEP2) if what != "weights at the start" else (STEP1,):
            error = 1.0 if (what, step) in failed else 0.0
            made.append(Check.of(what, step, {"blocks.0.mlp": error, "other": 0.0}, 1e-9))
    return Comparison(precision, tuple(made), WHOLE, (), ("blocks.0.mlp", "other"))


def test_the_first_step_is_to_blame_and_in_it_the_first_check() -> None:
    order = list(checks.CHECKS)
    for number, what in enumerate(order):
        if what == "weights at the start":
            failed = [(later, STEP1) for later in order]
        else:
            # Everything later fails too, and everything in the next step.
            failed = [(later, STEP1) for later in order[number:]] + [(one, STEP2) for one in order[1:]]
        found = blame([comparison([]), comparison(failed, "fp32"), comparison([("weights", STEP1)], "bf16")])
        assert found is not None
        assert (found.precision, found.check.what, found.check.step) == ("fp32", what, STEP1)
        assert found.parameter == ("blocks.0.mlp" if number <= order.index("gradients") else "")


def passes_of(routed: list[list[float]], kept: list[list[float]], *, norm: float = 3.0) -> Trial:
    record = MoeRecord({}, torch.tensor(routed), torch.tensor(kept), torch.zeros(2), torch.zeros(2))
    one = SimpleNamespace(records={1: record}, norm=norm, outputs={"norm": (torch.ones(3), torch.ones(2))})
    return SimpleNamespace(passes=[one])  # type: ignore[return-value]


def test_the_facts_are_counts_of_both_modalities() -> None:
    run = small_run("fp64")
    # 20 chosen, 19 kept: 5 %. Expert 1 serves texts alone, expert 2 nobody.
    (one,) = passes_of([[12, 4], [0, 4], [0, 0]], [[12, 3], [0, 4], [0, 0]]).passes
    empty = torch.ones(0)
    images = SimpleNamespace(outputs={"norm": (torch.ones(3), empty)}, norm=0.5)
    texts = SimpleNamespace(outputs={"norm": (empty, torch.ones(2)), "text_embed": (empty, torch.ones(2))}, norm=0.25)
    found = facts_of(run, [one, images, texts, one], Mesh.single())  # type: ignore[list-item]
    assert found.dropped_frac == pytest.approx(0.05)
    assert found.idle == {1: [2]}
    # 16 pairs in groups of 2.
    assert found.groups == {"pictures and captions": 16, "pictures alone": 8, "captions alone": 8}
    assert found.norms == [3.0, 0.5, 0.25, 3.0]
    (busy,) = passes_of([[12, 4], [0, 4], [1, 0]], [[12, 3], [0, 4], [1, 0]]).passes
    assert facts_of(run, [busy, images, texts, busy], Mesh.single()).idle == {}  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"dropped_frac": 0.05}, None),
        ({"dropped_frac": 0.0499}, "of the tokens were dropped"),
        ({"dropped_frac": 0.0}, "of the tokens were dropped"),
        ({"idle": {}}, "none is idle"),
        ({"groups": {"pictures and captions": 0, "pictures alone": 1, "captions alone": 1}}, "pictures and captions"),
        ({"groups": {"pictures and captions": 1, "pictures alone": 0, "captions alone": 1}}, "pictures alone"),
        ({"groups": {"pictures and captions": 1, "pictures alone": 1, "captions alone": 0}}, "captions alone"),
        ({"norms": [1.0, 5.0, 5.0]}, "not clipped"),
        ({"norms": [1.0001, 0.0, 0.0]}, None),
    ],
)
def test_each_fact_is_required(change: dict[str, Any], problem: str | None) -> None:
    groups = {"pictures and captions": 1, "pictures alone": 1, "captions alone": 1}
    enough = Facts(dropped_frac=0.2, idle={1: [5]}, groups=groups, norms=[2.0, 1.0, 1.0])
    run = small_run("fp64")
    found = lacking(dataclasses.replace(enough, **change), run)
    assert len(found) == (problem is not None)
    if problem is not None:
        assert problem in found[0]
    # And a comparison that lacks something has not passed, whatever its checks say.
    made = dataclasses.replace(comparison([]), lacking=tuple(found))
    assert made.passed == (problem is None)
    assert not comparison([("gradients", STEP2)]).passed
    everybody = run.model_copy(update={"moe": run.moe.model_copy(update={"top_k": 8})})
    assert lacking(dataclasses.replace(enough, idle={}), everybody) == []


@pytest.mark.parametrize(("norm", "clip"), [(3.0, 1.0), (1.5, 0.75)])
def test_the_case_is_made_hard_until_a_twentieth_is_dropped_and_the_gradient_is_clipped(
    monkeypatch: pytest.MonkeyPatch, norm: float, clip: float
) -> None:
    kept = {0.0: 1000.0, 0.5: 960.0, 1.0: 951.0, 2.0: 950.0, 4.0: 100.0, 8.0: 0.0}
    tried = []

    def one_process(case: Case, batches: tuple[str, ...], mesh: Mesh, device: torch.device) -> Trial:
        tried.append((case.skew, batches))
        return passes_of([[1000.0, 0.0]], [[kept[case.skew], 0.0]], norm=norm)

    monkeypatch.setattr(compare, "_one_process", one_process)
    case = compare.prepare(small_run("fp64"), mesh=Mesh.single(), device=CPU)
    assert tried == [(skew, ("pairs",)) for skew in (0.0, 0.5, 1.0, 2.0)]
    # The smaller of the setting, 1, and half of the norm.
    assert (case.skew, case.run.optim.clip_norm) == (2.0, clip)
    assert facts.MIN_DROPPED_FRAC == 0.05


@pytest.mark.parametrize(("precision", "pairs"), [("fp64", 0), ("fp32", 8), ("bf16", 8)])
def test_the_reference_takes_the_whole_batch_at_once_in_fp64_and_a_ranks_pairs_elsewhere(
    monkeypatch: pytest.MonkeyPatch, precision: str, pairs: int
) -> None:
    seen: list[tuple[Case, tuple[str, ...], Mesh]] = []
    monkeypatch.setattr(compare, "run_trial", lambda case, batches, *, mesh, device: seen.append((case, batches, mesh)))
    # 16 pairs on two ranks.
    two: Any = SimpleNamespace(rank=0, world=SimpleNamespace(size=2))
    compare._one_process(Case(small_run(precision)), ("pairs", "texts"), two, CPU)
    ((case, batches, mesh),) = seen
    assert (case.run.train.microbatch_pairs, batches, mesh.world.size) == (pairs, ("pairs", "texts"), 1)


def test_a_comparison_takes_the_tolerance_of_its_precision_and_all_four_batches(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: dict[str, Any] = {}
    made = [Check.of(what, STEP1, {"a": 0.0}, 0.0) for what in reversed(checks.CHECKS)]

    def one_process(case: Case, batches: tuple[str, ...], mesh: Mesh, device: torch.device) -> Trial:
        seen["batches"] = batches
        return passes_of([[1.0, 0.0]], [[1.0, 0.0]])

    def follow(stage: Stage, planted: Any, *, limit: float) -> Followed:
        seen["limit"] = limit
        return Followed(passes_of([[1.0, 0.0]], [[1.0, 0.0]]), {})

    def all_checks(stage: Stage, followed: Followed, tolerance: Any) -> list[Check]:
        seen["tolerance"] = dataclasses.asdict(tolerance)
        return made

    monkeypatch.setattr(compare, "_one_process", one_process)
    monkeypatch.setattr(compare, "follow_reference", follow)
    monkeypatch.setattr(compare, "checks_of", all_checks)
    found = compare.compare(Case(small_run(precision)), mesh=Mesh.single(), device=CPU)
    limits = LIMITS[precision]
    assert seen == {
        "batches": ("pairs", "images", "texts", "pairs"),
        "limit": limits["margin"],
        "tolerance": {
            "gradient": limits["gradients"],
            "loss": limits["losses"],
            "margin": limits["margin"],
            "weights": limits["weights"],
            "determined": DETERMINED[precision],
        },
    }
    assert tuple(check.what for check in found.checks) == checks.CHECKS
    # No expert idles, nothing is dropped: that alone makes it fail.
    assert found.lacking
    assert not found.passed
