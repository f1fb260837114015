"""What the guard finds in losses, norms and metrics, and what it does about it; by hand, without a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from limoe_dist.config import schema
from limoe_dist.train import ledger
from limoe_dist.train.guard import Guard, Judged
from limoe_dist.train.ledger import Event
from limoe_dist.train.votes import NOBODY, Ballot

CPU = torch.device("cpu")


def judged(guard: Guard, loss: float, *, norm: float = 1.0, ballot: Ballot = NOBODY) -> Judged:
    votes = torch.tensor([*ballot.numbers(), loss], dtype=torch.float64)
    verdict = guard.judge(votes, torch.tensor(norm, dtype=torch.float64))
    found = guard.read(verdict)
    assert bool(verdict.keep.item()) == found.kept
    return found


def after_calm(**settings: object) -> Guard:
    """A guard that has seen 1.0, 1.1, ... 1.7 and again: the median is 1.3, the median distance from it 0.2."""
    guard = Guard(schema.Guard(spike_window=16, **settings), CPU)
    for number in range(16):
        assert judged(guard, 1 + number % 8 / 10).kind == ""
    return guard


def test_a_leap_is_told_by_its_distance_in_robust_standard_deviations() -> None:
    guard = after_calm(spike="skip", spike_z=8.0)
    # torch's median of an even count is the lower one: of 1.0 to 1.7, each twice, 1.3; of the distances 0.2.
    found = judged(guard, 1.3 + 1.4826 * 0.2 * 8.01)
    assert (found.kind, found.kept) == ("spike", False)
    assert found.z == pytest.approx(8.01)
    assert judged(guard, 1.3 + 1.4826 * 0.2 * 7.99).kept


def test_what_was_left_out_is_not_compared_with() -> None:
    guard = after_calm(spike="skip")
    before = guard.watched().losses
    assert len(before) == 16
    judged(guard, 100.0)
    judged(guard, math.nan)
    assert guard.watched().losses == before
    judged(guard, 1.25)
    assert guard.watched().losses == (*before[1:], 1.25)


def test_a_noted_leap_counts_as_a_loss_like_others() -> None:
    guard = after_calm(spike="note")
    found = judged(guard, 100.0)
    assert (found.kind, found.kept) == ("spike", True)
    assert guard.watched().losses[-1] == 100.0
    assert judged(after_calm(spike="off"), 100.0).kind == ""


def test_too_few_losses_tell_nothing() -> None:
    guard = Guard(schema.Guard(spike="stop", spike_window=32), CPU)
    for number in range(8):
        assert judged(guard, 1 + number / 10).kept
        early = Guard(schema.Guard(spike="stop", spike_window=32), CPU)
        early.remember(guard.watched())
        assert judged(early, 1e6).kept == (number < 7)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_never_reaches_the_weights(loss: float, norm: float) -> None:
    for action in ("skip", "rollback", "stop"):
        guard = Guard(schema.Guard(non_finite=action, max_skips=2), CPU)
        found = judged(guard, loss, norm=norm)
        assert (found.kind, found.kept) == ("non_finite", False)
        event = guard.decide(found, step=5)
        assert event is not None
        assert (event.action, event.step, event.kind) == (action, 5, "non_finite")
        assert f"the {'loss' if norm == 1.0 else 'gradient'} is not finite" in event.text
        assert "NaN" not in event.line()
        assert "Infinity" not in event.line()


def test_a_rank_whose_share_is_not_finite_is_heard_where_the_sum_hides_it() -> None:
    guard = Guard(schema.Guard(), CPU)
    one_of_four = Ballot(non_finite=True, signal=0, clock=False, saving=(0, 0))
    assert not judged(guard, 1.0, ballot=one_of_four).kept


def test_skips_in_a_row_come_to_an_end_and_a_good_step_begins_the_count_again() -> None:
    guard = Guard(schema.Guard(max_skips=3), CPU)
    actions = []
    for loss in (math.nan, math.nan, 1.0, math.nan, math.nan, math.nan):
        event = guard.decide(judged(guard, loss), step=1)
        actions.append(event.action if event else "")
    assert actions == ["skip", "skip", "", "skip", "skip", "stop"]


def test_going_back_to_one_checkpoint_comes_to_an_end() -> None:
    guard = Guard(schema.Guard(max_rollbacks=2), CPU)
    assert [guard.goes_back(to_step=4), guard.goes_back(to_step=4), guard.goes_back(to_step=6)] == ["", "", ""]
    assert "guard.max_rollbacks=2" in guard.goes_back(to_step=4)


def figures(*, text: float = 1.0, dead: int = 0) -> dict[str, Any]:
    kept = [[0.0, 0.0]] * dead + [[3.0, 1.0]] * (8 - dead)
    return {"blocks": {"1": {"success_image": 0.9, "success_text": text, "kept": kept}}}


def test_a_collapse_is_told_once_and_only_when_it_lasts() -> None:
    guard = Guard(schema.Guard(collapse="stop", collapse_lines=3), CPU)
    told = [guard.look(figures(text=rate), step=n) for n, rate in enumerate([0.2, 0.2, 0.9, 0.2, 0.2, 0.2, 0.2])]
    assert [event is not None for event in told] == [False] * 5 + [True, False]
    event = told[5]
    assert event is not None
    assert (event.kind, event.action) == ("collapse", "stop")
    assert "20% of the text tokens got a slot in some block (guard.min_success=0.3)" in event.text
    dying = Guard(schema.Guard(collapse_lines=1, max_dead_frac=0.5), CPU)
    assert dying.look(figures(dead=4), step=1) is None
    found = dying.look(figures(dead=5), step=2)
    assert found is not None
    assert "5 of 8 experts of block 1 got no token" in found.text
    assert Guard(schema.Guard(collapse="off", collapse_lines=1), CPU).look(figures(dead=8), step=1) is None


def test_a_window_of_another_length_goes_on_with_the_newest_losses() -> None:
    watched = after_calm().watched()
    shorter = Guard(schema.Guard(spike_window=8), CPU)
    shorter.remember(watched)
    assert shorter.watched().losses == watched.losses[-8:]


@pytest.mark.parametrize(
    "ballot",
    [
        Ballot(non_finite=False, signal=15, clock=True, saving=(1, 0)),
        Ballot(non_finite=True, signal=12, clock=False, saving=(0, 2)),
        Ballot(non_finite=False, signal=2, clock=False, saving=(0, 1)),
    ],
)
def test_sums_of_votes_say_what_the_largest_would(ballot: Ballot) -> None:
    several = zip(*(one.numbers() for one in (NOBODY, ballot, NOBODY, ballot)), strict=True)
    assert Ballot.counted([sum(column) for column in several]) == ballot


def test_of_two_signals_all_act_on_the_larger_and_of_two_failures_on_the_worse() -> None:
    one = Ballot(non_finite=False, signal=10, clock=False, saving=(0, 2))
    other = Ballot(non_finite=False, signal=15, clock=False, saving=(1, 1))
    counted = Ballot.counted([a + b for a, b in zip(one.numbers(), other.numbers(), strict=True)])
    assert (counted.signal, counted.saving) == (15, (1, 2))


def test_the_ledger_survives_a_line_that_a_crash_cut_off(tmp_path: Path) -> None:
    event = Event("spike", "rollback", 7, "leapt").passing(64, 96)
    ledger.append(tmp_path, event)
    with (tmp_path / ledger.NAME).open("a") as file:
        file.write('{"time": 1.0, "st')
    ledger.append(tmp_path, Event("non_finite", "skip", 9, "nan").passing(128, 144))
    assert [line["step"] for line in ledger.read(tmp_path)] == [7, 9]
    assert ledger.passed_over(tmp_path, position=0) == ((64, 96), (128, 144))
    # A checkpoint behind the first range knows it already.
    assert ledger.passed_over(tmp_path, position=96) == ((128, 144),)
    assert ledger.read(tmp_path / "elsewhere") == []
