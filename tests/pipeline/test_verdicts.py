"""What a step's flags and a comparison's checks add up to."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch

from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.parity import case, routes
from limoe_dist.train.parity.boxes import errors_of_boxes
from limoe_dist.train.parity.checks import CHECKS, TOLERANCES, Check
from limoe_dist.train.parity.compare import Comparison
from limoe_dist.train.parity.facts import Facts
from limoe_dist.train.votes import NOBODY, Ballot

CPU = torch.device("cpu")


def summed(*ballots: Ballot) -> Ballot:
    """What all ranks read after these ranks have voted."""
    return Ballot.counted(torch.tensor([ballot.numbers() for ballot in ballots]).sum(0).tolist())


def test_the_largest_signal_and_the_worst_save_of_any_rank_count() -> None:
    small, large = sorted((int(signal.SIGINT), int(signal.SIGTERM)))
    mild, bad = replace(NOBODY, saving=(0, 1)), replace(NOBODY, saving=(1, 2))
    for order in ((small, large), (large, small)):
        assert summed(*(replace(NOBODY, signal=number) for number in order)).signal == large
    assert summed(mild, NOBODY).saving == (0, 1)
    assert summed(mild, bad).saving == summed(bad, mild).saving == (1, 2)
    assert summed(NOBODY, NOBODY) == NOBODY
    assert summed(NOBODY, replace(NOBODY, clock=True)) == replace(NOBODY, clock=True)


@pytest.mark.parametrize("what", CHECKS)
def test_a_single_check_that_fails_fails_the_comparison(what: str) -> None:
    facts = Facts(dropped_frac=0.2, idle={1: [5]}, groups={}, norms=[2.0])
    made = [Check.of(each, "step 1: pairs", {"norm": float(each == what)}, 1e-9) for each in CHECKS]
    assert not Comparison("fp64", tuple(made), facts, (), ("norm",)).passed
    fine = tuple(Check.of(each, "step 1: pairs", {"norm": 0.0}, 1e-9) for each in CHECKS)
    assert Comparison("fp64", fine, facts, (), ("norm",)).passed
    assert not Comparison("fp64", fine, facts, ("no token was dropped",), ("norm",)).passed


def test_a_change_without_an_explanation_is_beyond_every_margin_and_an_unwanted_logit_is_far_below_others() -> None:
    assert routes.UNEXPLAINED == 1.0
    assert max(tolerance.margin for tolerance in TOLERANCES.values()) < routes.UNEXPLAINED
    # exp(-12) is 6e-6: no expert with a logit near 0 loses a token to it.
    assert case.UNWANTED == -12.0


@pytest.mark.parametrize("error", [0.25, -0.25])
def test_numbers_that_are_too_small_differ_as_much_as_those_that_are_too_large(error: float) -> None:
    wanted = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = {"norm.weight": Shard(wanted + torch.tensor([0.0, error, 0.0]), (3,), (0,), writes=True)}
    errors = errors_of_boxes(found, {"norm.weight": wanted}, mesh=Mesh.single(), device=CPU)
    # Relative to the largest number of the class.
    assert errors == {"norm.weight": pytest.approx(0.25 / 2)}
