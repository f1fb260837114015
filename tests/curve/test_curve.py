"""The loss curve of `tiny` is the frozen one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from tests.curve.curve import CURVES, STEPS, Curve, curves, differences, frozen, problems
from tests.support.ranks import RanksPool


@pytest.fixture(scope="module")
def trained(ranks2: RanksPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    return curves(ranks2, Path(tmp_path_factory.mktemp("curve")))


def test_no_number_of_the_log_has_moved(trained: dict[str, Curve]) -> None:
    assert problems(trained, frozen()) == []


def test_two_ranks_compute_what_one_computes(trained: dict[str, Curve]) -> None:
    errors = differences(trained["2 ranks with ep=2, fp64"], trained["1 rank, fp64"])
    assert max(max(values) for values in errors.values()) < 1e-9


def test_the_frozen_curves_are_whole_and_learn() -> None:
    kept = frozen()
    assert list(kept) == list(CURVES)
    for curve in kept.values():
        assert {len(values) for values in curve.values()} == {STEPS}
        assert curve["contrastive"][-1] < curve["contrastive"][0] - 0.1


def test_a_number_that_moves_is_named_with_its_step() -> None:
    kept = frozen()
    moved = copy.deepcopy(kept)
    largest = max(kept["1 rank, fp64"]["lr"])
    moved["1 rank, fp64"]["lr"][6] += 2e-7 * largest
    (line,) = problems(moved, kept)
    assert line.startswith("1 rank, fp64: lr differs by up to 2.0e-07, ")
    assert line.endswith("more than 1e-07 from step 7")
