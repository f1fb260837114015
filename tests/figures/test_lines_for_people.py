"""Numbers of the lines that a person watches: the progress of training, an evaluation, and `limoe status`."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launch import status
from launch.status_facts import gather
from launch.status_state import judge, remaining, slow_host
from launch.status_tables import duration, show
from limoe_dist.config.errors import UserError
from limoe_dist.train import display
from limoe_dist.train.display import Display
from limoe_dist.train.evaluation import Evaluation
from slurm import scheduler

FIGURES: dict[str, Any] = {
    **{"step": 30, "loss": 5.4326, "contrastive": 5.1, "aux": 0.3326, "pairs_per_s": 1234.56, "seconds_per_step": 0.5},
    **{"accuracy_image_to_text": 0.126, "accuracy_text_to_image": 0.236},
    "blocks": {
        "1": {"success_image": 0.916, "success_text": None},
        "3": {"success_image": 0.956, "success_text": 0.714},
        "5": {"success_image": 0.936, "success_text": 0.834},
    },
}


class Clock:
    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("first", "seconds", "left"),
    [
        # 20 steps in 100 s: 5 s each for the 2,970 that are left: 14,850 s.
        (10, 100.0, "4:07:30"),
        # 30 steps in 90 s: 8,910 s.
        (0, 90.0, "2:28:30"),
        # 1 step in 0.5 s: 1,485 s.
        (29, 0.5, "0:24:45"),
        # The run began after this step: nothing is known.
        (30, 9.0, "0:00:00"),
    ],
)
def test_a_line_of_training_tells_what_is_left_by_the_steps_of_this_start(
    first: int, seconds: float, left: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(display.time, "perf_counter", clock)
    shown = Display(steps=3000, first_step=first, shows=True)
    clock.now += seconds
    shown.figures(FIGURES)
    # Success rates: the lowest of the blocks.
    assert capsys.readouterr().out == (
        f"step 30/3000  loss 5.433  accuracy 0.13  1235 pairs/s  success image 0.92 text 0.71  ETA {left}\n"
    )


def test_a_dense_run_has_no_success_rates_and_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    Display(steps=30, first_step=0, shows=True).figures(FIGURES | {"blocks": {}})
    told = capsys.readouterr().out
    assert "1235 pairs/s  ETA 0:00:00" in told
    Display(steps=30, first_step=0, shows=False).figures(FIGURES)
    assert capsys.readouterr().out == ""


class Of:
    """A result with these figures."""

    def __init__(self, **figures: Any) -> None:
        vars(self).update(figures)


def test_a_line_of_an_evaluation_has_every_task_beside_its_chance() -> None:
    found = Evaluation(
        zeroshot=Of(top1=0.111, top5=0.222, chance_top1=0.0333, chance_top5=0.0444),  # type: ignore[arg-type]
        retrieval=Of(  # type: ignore[arg-type]
            image_to_text=Of(at1=0.511, at5=0.522, at10=0.533), text_to_image=Of(at1=0.611, at5=0.622, at10=0.633)
        ),
        contrastive=Of(accuracy=0.755, image_to_text=0.7, text_to_image=0.81, minibatch=16, asked=20, rows=48),  # type: ignore[arg-type]
    )
    assert found.line() == (
        "validation: zero-shot top-1 11.1% top-5 22.2% (chance 3.33%, 4.44%); "
        "retrieval R@1 image to text 51.1%, text to image 61.1%; contrastive accuracy 75.5% in 16 pairs"
    )


NOW = 1_800_000_000.0
HEARTBEAT = {
    **{"time": NOW - 7, "step": 250, "steps": 1000, "phase": "train", "seconds_per_step": 2.5, "ranks": 5},
    **{"hosts": ["n1", "n1", "n2", "n2", "n3"], "busy_s": [0.5, 0.75, 0.25, 1.5, 1.0], "job": "7", "restart": 1},
}
LINE = {"step": 240, "loss": 2.71828, "contrastive": 2.5, "pairs_per_s": 1234.56, "seconds_per_step": 3.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run at step 250 of 1,000, in its second attempt of a job; Slurm is not there."""

    def absent(jobs: list[str]) -> dict[str, Any]:
        raise UserError("there is no squeue on PATH")

    monkeypatch.setattr(scheduler, "queue", absent)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"train": {"steps": 1000}}))
    (tmp_path / "heartbeat.json").write_text(json.dumps(HEARTBEAT))
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(LINE | {"step": 230, "loss": 9.0}) + "\n" + json.dumps(LINE) + "\n"
    )
    # 900 s of training, 300 s of waiting, and now another 400 s: waiting is a quarter of what is known.
    begin = {"event": "begin", "job": "7", "nodes": ["n1"], "mark": None}
    end = {"event": "end", "job": "7", "status": 75, "action": "requeue"}
    attempts = [
        begin | {"time": NOW - 1600, "restart": 0, "step": 0},
        end | {"time": NOW - 700, "restart": 0, "step": 120},
        begin | {"time": NOW - 400, "restart": 1, "step": 120},
    ]
    (tmp_path / "slurm" / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in attempts))
    guard = [{"kind": "spike", "action": action, "step": 7, "text": "it leaps"} for action in ("skip", "skip", "note")]
    (tmp_path / "guard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in guard))
    return tmp_path


def test_status_works_out_what_is_left(run: Path) -> None:
    rest = remaining(gather(run, lambda: NOW))
    # 750 steps of 2.5 s; of the time a quarter is waiting: 1,875 / 0.75.
    assert (rest.training_s, rest.waiting_frac, rest.wall_s) == (1875.0, 0.25, 2500.0)
    # Without a pace of the heartbeat, that of the last line of metrics: 3 s.
    (run / "heartbeat.json").write_text(json.dumps(HEARTBEAT | {"seconds_per_step": None}))
    assert remaining(gather(run, lambda: NOW)).training_s == 2250.0


def test_status_shows_the_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = gather(run, lambda: NOW)
    show(facts, judge(facts))
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["step"] == "250 of 1,000 (25.0 %)"
    assert rows["last line"] == "loss 2.7183, 1,234.6 pairs/s (step 240)"
    # 1,875 s = 31 min 15 s; 2,500 s = 41 min 40 s.
    done = datetime.fromtimestamp(NOW + 2500).strftime("%m-%d %H:%M:%S")
    assert rows["left"] == f"31 min of training; 41 min with pauses as so far (25 % of the time); done {done}"


def test_status_counts_events_and_names_the_slow_rank(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = gather(run, lambda: NOW)
    show(facts, judge(facts))
    told = capsys.readouterr().out.splitlines()
    assert "guard: 2 spike (skip), 1 spike (note)" in told
    # Work by rank, sorted: 0.25, 0.5, 0.75, 1 and 1.5 s.
    assert "slow: rank 3 (host n2) works 1.5 s a step outside of collectives, the median rank 0.75 s" in told


@pytest.mark.parametrize(
    ("busy_s", "slow"),
    # Half as much again is slow. Of four ranks the lower middle one is the median: 0.5.
    [
        ((0.25, 0.5, 1.0, 0.75), True),
        ((0.25, 0.5, 1.0, 0.7), True),
        ((0.5, 1.0, 1.5, 1.0), True),
        ((0.5, 1.0, 1.49, 1.0), False),
    ],
)
def test_status_calls_a_rank_slow_from_half_as_much_again(run: Path, busy_s: tuple[float, ...], slow: bool) -> None:
    beat = HEARTBEAT | {"hosts": ["n1", "n2", "n3", "n4"], "busy_s": busy_s, "ranks": 4}
    (run / "heartbeat.json").write_text(json.dumps(beat))
    found = slow_host(gather(run, lambda: NOW).heartbeat)
    wanted = {"rank": 2, "host": "n3", "busy_s": busy_s[2], "median_s": sorted(busy_s)[1]}
    assert found == (wanted if slow else None)


def test_status_as_json_has_the_same_figures(run: Path) -> None:
    facts = gather(run, lambda: NOW)
    found = status.as_json(facts, judge(facts))
    assert {name: found[name] for name in ("time", "step", "steps", "loss", "pairs_per_s")} == {
        **{"time": NOW, "step": 250, "steps": 1000},
        **{"loss": 2.71828, "pairs_per_s": 1234.56},
    }
    left = [found[name] for name in ("training_left_s", "wall_left_s", "waiting_frac")]
    assert left == [1875.0, 2500.0, 0.25]
    assert found["heartbeat"] == {"age_s": 7.0, "ahead_s": 0.0, "step": 250, "phase": "train"}
    assert [(one["from_step"], one["to_step"], one["began"], one["ended"]) for one in found["attempts"]] == [
        (0, 120, NOW - 1600, NOW - 700),
        (120, None, NOW - 400, None),
    ]
    assert found["guard"] == {"events": 3, "last": {"kind": "spike", "action": "note", "step": 7, "text": "it leaps"}}
    assert found["slow"] == {"rank": 3, "host": "n2", "busy_s": 1.5, "median_s": 0.75}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (119.4, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        # 2 h 59 min 59 s.
        (10_799, "2 h 59 min"),
        # 2 days, 3 h and 59 min.
        (187_140, "2 days 3 h"),
    ],
)
def test_durations_of_status(seconds: float, text: str) -> None:
    assert duration(seconds) == text
