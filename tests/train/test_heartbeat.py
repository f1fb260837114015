"""Seconds of work by a clock that the test turns, and the file that tells that a run lives."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.traffic import Traffic
from limoe_dist.train.heartbeat import EVERY_S, Heartbeat, Meter
from tests.support.ranks import RanksPool

CPU = torch.device("cpu")
SLURM = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1", "SLURMD_NODENAME": "n1"}


class Clock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def heart(out: Path, clock: Clock, wall: Clock, *, step: int = 0) -> Heartbeat:
    return Heartbeat(
        out,
        mesh=Mesh.single(),
        device=CPU,
        step=step,
        steps=90,
        straggler_factor=1.5,
        environ=SLURM,
        clock=clock,
        wall=wall,
    )


def beat(out: Path) -> dict[str, Any]:
    return json.loads((out / "heartbeat.json").read_text())


def test_work_is_a_step_without_what_it_waited_and_without_what_lies_between_steps() -> None:
    clock = Clock()
    traffic = Traffic(clock=clock)
    axis = Axis("world", 2, 0, None, traffic)
    meter = Meter(traffic, clock)
    for work, wait in ((2.0, 1.0), (4.0, 3.0)):
        clock.now += work
        with traffic.call("all_reduce", axis, 8):
            clock.now += wait
        meter.step()
        # A save, whose votes are waited for too.
        clock.now += 50
        with traffic.call("all_reduce", axis, 8):
            clock.now += 7
        meter.restart()
    # (2 + 4) / 2 of work, ((2 + 1) + (4 + 3)) / 2 in all.
    assert meter.take() == (3.0, 5.0)
    assert meter.take() == (0.0, 0.0)


def test_the_file_holds_where_a_run_is_and_is_replaced_at_most_every_five_seconds(tmp_path: Path) -> None:
    clock, wall = Clock(), Clock(5000.0)
    heartbeat = heart(tmp_path, clock, wall, step=30)
    assert beat(tmp_path) == {
        "time": 5000.0,
        "step": 30,
        "steps": 90,
        "phase": "start",
        "seconds_per_step": None,
        "ranks": 1,
        "hosts": ["n1"],
        "busy_s": [],
        "job": "17",
        "restart": 1,
    }
    heartbeat.phase("train")
    clock.now += EVERY_S - 1
    heartbeat.step(31)
    assert (beat(tmp_path)["step"], beat(tmp_path)["phase"]) == (30, "train")
    assert heartbeat.pace().figures == {"busy_s": {"median": 4.0, "max": 4.0, "rank": 0, "host": "n1"}}
    clock.now += 1
    heartbeat.step(32)
    found = beat(tmp_path)
    assert (found["step"], found["seconds_per_step"], found["busy_s"]) == (32, 4.0, [4.0])
    heartbeat.phase("save")
    assert beat(tmp_path)["phase"] == "save"
    wall.now += 30
    clock.now += 30
    heartbeat.beat()
    assert beat(tmp_path)["time"] == 5030.0
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def test_a_wall_clock_that_jumps_back_neither_stops_the_beats_nor_changes_a_figure(tmp_path: Path) -> None:
    clock, wall = Clock(), Clock(5000.0)
    heartbeat = heart(tmp_path, clock, wall)
    for step in range(1, 4):
        clock.now += EVERY_S
        wall.now -= 3600
        heartbeat.step(step)
        assert beat(tmp_path)["step"] == step
    assert heartbeat.pace().figures["busy_s"]["max"] == EVERY_S


def test_a_file_that_cannot_be_written_is_warned_about_once_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    # A directory in its place: root may write everywhere else.
    (tmp_path / "heartbeat.json").mkdir()
    heartbeat = heart(tmp_path, clock, clock)
    for step in range(1, 4):
        clock.now += EVERY_S
        heartbeat.step(step)
    said = capsys.readouterr().err
    assert said.count("limoe: warning: ") == 1
    assert f"{tmp_path / 'heartbeat.json'}: cannot be written: Is a directory" in said
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]


def one_works_longer(folder: Path) -> tuple[list[dict[str, Any]], list[str | None]]:
    mesh = Mesh.build(tp=1, ep=1)
    heartbeat = Heartbeat(
        folder,
        mesh=mesh,
        device=CPU,
        step=0,
        steps=9,
        straggler_factor=1.5,
        environ={"SLURMD_NODENAME": f"n{mesh.rank}"},
    )
    heartbeat.phase("train")
    figures, told = [], []
    for step in range(1, 4):
        time.sleep(0.5 if mesh.rank == 1 else 0.02)
        sum_over(torch.ones(3), mesh.world)
        heartbeat.step(step)
        pace = heartbeat.pace()
        figures.append(pace.figures["busy_s"])
        told.append(pace.told)
    return figures, told


def test_of_two_real_ranks_the_slow_one_is_named_though_both_steps_take_as_long(
    ranks2: RanksPool, tmp_path: Path
) -> None:
    found = ranks2.run(one_works_longer, tmp_path)
    assert found[0] == found[1]
    figures, told = found[0]
    for line in figures:
        assert (line["rank"], line["host"]) == (1, "n1")
        assert line["max"] >= 0.5
        assert line["median"] < 0.3
    assert told[:2] == [None, None]
    assert told[2] is not None
    assert told[2].startswith("slow: rank 1 (host n1): up to ")
    content = beat(tmp_path)
    assert (content["ranks"], content["hosts"], content["phase"]) == (2, ["n0", "n1"], "train")
