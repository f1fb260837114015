"""The guard's numbers, worked out by hand: median, spread, z, thresholds, ring buffer, counters and collapse rules."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from limoe_dist.config import schema
from limoe_dist.train import ledger
from limoe_dist.train.guard import Guard, Judged
from limoe_dist.train.ledger import Event
from limoe_dist.train.votes import NOBODY, Ballot
from tests.pipeline.plain_guard import PlainGuard

CPU = torch.device("cpu")
SCRAMBLED = [5.0, 1.0, 8.0, 3.0, 2.0, 7.0, 4.0, 6.0]
"""Lower median 4; distances 1 3 4 1 2 3 0 2, whose lower median is 2: one robust deviation is 2 * 1.4826 = 2.9652."""


def guard_after(losses: list[float], **settings: Any) -> Guard:
    guard = Guard(schema.Guard(**({"spike_window": 8, "spike": "skip"} | settings)), CPU)
    for loss in losses:
        assert judge(guard, loss).kept
    return guard


def judge(guard: Guard, loss: float, *, norm: float = 1.0, ballot: Ballot = NOBODY) -> Judged:
    votes = torch.tensor([*ballot.numbers(), loss], dtype=torch.float64)
    verdict = guard.judge(votes, torch.tensor(norm, dtype=torch.float64))
    assert verdict.keep.shape == ()
    assert verdict.keep.item() in (0.0, 1.0)
    judged = guard.read(verdict)
    assert judged.kept == (verdict.keep.item() == 1.0)
    return judged


def test_z_is_the_distance_from_the_median_in_scaled_median_distances() -> None:
    # 4 + 2.9652 * 2.5 = 11.413.
    judged = judge(guard_after(SCRAMBLED), 11.413, norm=3.5)
    assert judged.z == pytest.approx(2.5, rel=1e-12)
    assert (judged.loss, judged.grad_norm, judged.kind, judged.kept) == (11.413, 3.5, "", True)
    # Below the median z is negative, and no loss is too small.
    judged = judge(guard_after(SCRAMBLED), 4 - 2.9652 * 50)
    assert judged.z == pytest.approx(-50, rel=1e-12)
    assert judged.kept


def test_a_loss_at_the_limit_is_a_spike_and_one_below_is_not() -> None:
    z = (30.0 - 4.0) / (1.4826 * 2.0)
    at = judge(guard_after(SCRAMBLED, spike_z=z), 30.0)
    assert (at.kind, at.kept) == ("spike", False)
    below = judge(guard_after(SCRAMBLED, spike_z=math.nextafter(z, math.inf)), 30.0)
    assert (below.kind, below.kept) == ("", True)


@pytest.mark.parametrize("median", [2.0, -2.0])
def test_the_spread_is_at_least_a_thousandth_of_the_median(median: float) -> None:
    # Equal losses: the scale is 0.002, and 0.012 above the median is z = 6.
    assert judge(guard_after([median] * 8), median + 0.012).z == pytest.approx(6.0, rel=1e-9)
    # 0.001 * 1.4826 is less than 0.002; 0.002 * 1.4826 is more.
    close = [median - 0.001, median + 0.001] * 4
    assert judge(guard_after(close), median - 0.001 + 0.003998).z == pytest.approx(
        0.003998 / (0.001 * abs(median - 0.001)), rel=1e-9
    )
    wide = [median, median, median, median, median + 0.01, median + 0.01, median - 0.01, median - 0.01]
    # Lower median `median`; distances 0 0 0 0 .01 .01 .01 .01: lower median 0.
    assert judge(guard_after(wide), median + 0.02).z == pytest.approx(10.0, rel=1e-9)
    wider = [*wide[:3], median - 0.01, *wide[4:]]
    # Sorted: three below, three equal, two above: lower median `median`; distances 0 0 0 .01 ...: lower median 0.01.
    assert judge(guard_after(wider), median + 0.14826).z == pytest.approx(10.0, rel=1e-9)


@pytest.mark.parametrize(
    ("window", "enough"), [(8, 8), (31, 8), (32, 8), (35, 8), (36, 9), (64, 16), (128, 32), (200, 50)]
)
def test_losses_are_compared_from_a_quarter_of_the_window_and_at_least_eight(window: int, enough: int) -> None:
    guard = guard_after([1.0] * (enough - 1), spike_window=window)
    # Skipped losses do not count.
    judge(guard, math.nan)
    found = judge(guard, 1e6)
    assert math.isnan(found.z)
    assert found.kept
    guard = guard_after([1.0] * enough, spike_window=window)
    found = judge(guard, 1e6)
    assert found.z == pytest.approx((1e6 - 1) / 1e-3)
    assert not found.kept


def test_losses_leave_the_window_in_the_order_in_which_they_came() -> None:
    guard = guard_after([], spike="off")
    for number in range(1, 30):
        judge(guard, float(number))
        oldest = max(1, number - 7)
        assert guard.watched().losses == tuple(float(n) for n in range(oldest, number + 1))


@pytest.mark.parametrize("spike", ["off", "note", "skip", "rollback", "stop"])
@pytest.mark.parametrize("window", [8, 11])
def test_every_judgement_of_a_long_run_is_the_plain_one(window: int, spike: str) -> None:
    draw = random.Random(window)
    guard = Guard(schema.Guard(spike_window=window, spike=spike, spike_z=3.0), CPU)
    plain = PlainGuard(window=window, limit=3.0, leaves_out=spike in ("skip", "rollback", "stop"))
    kinds = []
    for step in range(60):
        loss = draw.choice([draw.gauss(3, 0.2)] * 7 + [draw.gauss(6, 0.2), math.nan, -math.inf])
        norm = math.inf if draw.random() < 0.05 else 1.0
        kind, kept, z = plain.judge(loss, norm)
        found = judge(guard, loss, norm=norm)
        kinds.append(kind)
        assert (found.kind, found.kept) == ("" if spike == "off" and kind == "spike" else kind, kept), step
        assert found.z == pytest.approx(z, rel=1e-12, nan_ok=True), step
        assert guard.watched().losses == tuple(plain.losses)
        if step % 7 == 0:
            # A new guard that is filled from the checkpoint judges on as this one would.
            watched, guard = guard.watched(), Guard(guard.settings, CPU)
            guard.remember(watched)
    assert kinds.count("spike") > 3
    assert kinds.count("non_finite") > 3


def test_one_rank_that_reports_a_non_finite_loss_is_enough_and_other_votes_leave_the_step_alone() -> None:
    guard = guard_after(SCRAMBLED)
    votes = torch.tensor([*NOBODY.numbers(), 4.0], dtype=torch.float64)
    votes[0] = 1.0
    verdict = guard.judge(votes, torch.tensor(1.0, dtype=torch.float64))
    found = guard.read(verdict)
    assert (found.kind, found.kept, found.ballot.non_finite) == ("non_finite", False, True)
    assert guard.watched().losses == tuple(SCRAMBLED)
    busy = Ballot(non_finite=False, signal=15, clock=True, saving=(1, 2))
    found = judge(guard, 4.0, ballot=busy)
    assert (found.kind, found.kept, found.ballot) == ("", True, busy)


def test_a_gradient_that_is_not_finite_is_no_spike_however_large_the_loss() -> None:
    found = judge(guard_after(SCRAMBLED), 1e9, norm=math.inf)
    assert (found.kind, found.kept) == ("non_finite", False)
    found = judge(guard_after(SCRAMBLED, spike="note"), 1e9, norm=math.nan)
    assert (found.kind, found.kept) == ("non_finite", False)


@pytest.mark.parametrize("spike", ["note", "skip", "rollback", "stop"])
def test_the_setting_of_spikes_decides_about_spikes_and_that_of_non_finite_about_non_finite(spike: str) -> None:
    guard = guard_after(SCRAMBLED, spike=spike, non_finite="rollback")
    found = judge(guard, 1000.0)
    event = guard.decide(found, step=9)
    assert event is not None
    assert (event.kind, event.action, event.step, event.loss) == ("spike", spike, 9, 1000.0)
    assert event.z == pytest.approx(996 / 2.9652)
    event = guard.decide(judge(guard, math.nan, norm=2.0), step=10)
    assert event is not None
    assert (event.kind, event.action, event.loss, event.grad_norm) == ("non_finite", "rollback", None, 2.0)


def test_batches_in_a_row_are_counted_whatever_is_wrong_with_them_and_any_kept_step_ends_the_row() -> None:
    def actions(losses: list[float], **settings: Any) -> list[str]:
        guard = guard_after(SCRAMBLED, **settings)
        events = [guard.decide(judge(guard, loss), step=9) for loss in losses]
        return [event.action if event else "" for event in events]

    nan, leap, calm = math.nan, 1e4, 4.0
    assert actions([nan, leap, nan], max_skips=3) == ["skip", "skip", "stop"]
    assert actions([nan, leap, calm, leap, nan, leap], max_skips=3) == ["skip", "skip", "", "skip", "skip", "stop"]
    # A noted leap is trained on, so it ends the row; a batch that causes a rollback is none that is skipped.
    assert actions([nan, leap, nan], max_skips=2, spike="note") == ["skip", "note", "skip"]
    assert actions([nan, leap, nan], max_skips=3, spike="rollback") == ["skip", "rollback", "skip"]
    assert actions([nan], max_skips=1) == ["stop"]


def test_rollbacks_are_counted_for_each_checkpoint_apart() -> None:
    guard = Guard(schema.Guard(max_rollbacks=1), CPU)
    refused = [bool(guard.goes_back(to_step=step)) for step in (5, 10, 10, 15, 5)]
    assert refused == [False, False, True, False, True]


def line(image: list[float | None], text: list[float | None], kept: list[list[float]] | None = None) -> dict[str, Any]:
    """Figures of as many blocks as there are rates."""
    kept = kept or [[1.0, 1.0]] * 8
    return {
        "blocks": {
            str(block): {"success_image": one, "success_text": other, "kept": kept}
            for block, (one, other) in enumerate(zip(image, text, strict=True))
        }
    }


GOOD, BAD = line([1.0], [1.0]), line([1.0], [0.0])


@pytest.mark.parametrize(
    ("figures", "collapsed"),
    [
        (line([0.25], [0.25]), False),
        (line([0.2499], [1.0]), True),
        (line([1.0], [0.2499]), True),
        # One block is enough, whichever.
        (line([1.0, 0.2], [1.0, 1.0]), True),
        (line([1.0, 1.0, 1.0], [0.2, 1.0, 1.0]), True),
        # A modality that is absent has not collapsed.
        (line([None], [1.0]), False),
        # 6 of 8 are 0.75, no more; an expert that serves one modality is alive.
        (line([1.0], [1.0], [[0.0, 0.0]] * 6 + [[1.0, 0.0], [0.0, 1.0]]), False),
        (line([1.0], [1.0], [[0.0, 0.0]] * 7 + [[1.0, 0.0]]), True),
        (line([1.0], [1.0], [[0.0, 1.0]] * 7 + [[1.0, 0.0]]), False),
        (line([1.0], [1.0], [[1.0, 0.0]] * 7 + [[0.0, 0.0]]), False),
    ],
)
def test_collapse_begins_below_the_least_success_and_above_the_largest_share_of_dead_experts(
    figures: dict[str, Any], collapsed: bool
) -> None:
    guard = Guard(schema.Guard(collapse="stop", collapse_lines=1, min_success=0.25, max_dead_frac=0.75), CPU)
    assert (guard.look(figures, step=1) is not None) == collapsed
    never = Guard(schema.Guard(collapse="stop", collapse_lines=1, min_success=0.0, max_dead_frac=1.0), CPU)
    assert never.look(figures, step=1) is None


@pytest.mark.parametrize(
    ("action", "lines_with_event"),
    [
        # A note once, until it was well in between.
        ("note", [0, 1, 0, 0, 0, 0, 0, 1, 0]),
        ("rollback", [0, 1, 0, 1, 0, 0, 0, 1, 0]),
        ("stop", [0, 1, 0, 1, 0, 0, 0, 1, 0]),
    ],
)
def test_a_collapse_is_an_event_after_so_many_lines_in_a_row(action: str, lines_with_event: list[int]) -> None:
    lines = [BAD, BAD, BAD, BAD, BAD, GOOD, BAD, BAD, BAD]
    guard = Guard(schema.Guard(collapse=action, collapse_lines=2), CPU)
    found = []
    for number, figures in enumerate(lines):
        event = guard.look(figures, step=number + 1)
        found.append(int(event is not None))
        if event is not None:
            assert (event.kind, event.action, event.step) == ("collapse", action, number + 1)
        # A restart at any line changes nothing.
        watched, guard = guard.watched(), Guard(guard.settings, CPU)
        guard.remember(watched)
    assert found == lines_with_event


def test_going_back_begins_the_count_of_bad_lines_again() -> None:
    guard = Guard(schema.Guard(collapse="stop", collapse_lines=3), CPU)
    guard.look(BAD, step=1)
    guard.look(BAD, step=2)
    assert guard.watched().bad_lines == 2
    guard.goes_back(to_step=0)
    assert guard.watched().bad_lines == 0
    assert [guard.look(BAD, step=step) is not None for step in (1, 2, 3)] == [False, False, True]


def test_the_ledger_tells_ranges_from_a_position_on_and_no_others(tmp_path: Path) -> None:
    for first, end in ((10, 20), (40, 50), (20, 24), (60, 61)):
        ledger.append(tmp_path, Event("spike", "skip", 1, "leap").passing(first, end))
    # An empty range and events without one tell nothing.
    ledger.append(tmp_path, Event("spike", "skip", 1, "leap").passing(70, 70))
    ledger.append(tmp_path, Event("spike", "note", 1, "leap"))
    found = {position: ledger.passed_over(tmp_path, position=position) for position in (0, 10, 11, 20, 40, 41, 61)}
    assert found == {
        0: ((10, 24), (40, 50), (60, 61)),
        10: ((10, 24), (40, 50), (60, 61)),
        11: ((20, 24), (40, 50), (60, 61)),
        20: ((20, 24), (40, 50), (60, 61)),
        40: ((40, 50), (60, 61)),
        41: ((60, 61),),
        61: (),
    }
