"""Hosts and ranks that die in the middle of a save, hang, are cut off, or are bad from the start."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.slurm.harness import lines_of, until
from tests.slurm.runs import EVERY, attempts, newest_step, saved_step
from tests.slurm.stage import Stage

BEGIN = 300
TIMEOUT_S = 30
"""parallel.timeout_s of runs whose ranks hang: a loaded machine has steps of 10 s."""
PATIENCE_S = 20
"""For ranks that a loaded machine lets wait; the watch itself asks a silent rank for 4 s."""
TRIES = 3
"""A save takes a tenth of a second: to be in the middle of one takes a few attempts at times."""


def test_a_power_cut_in_the_middle_of_a_save_loses_nothing_that_was_saved(stage: Stage):
    run = stage.run_left_at(BEGIN)
    job = stage.resume(run, "--requeue")
    for cuts in range(1, TRIES + 1):
        stage.trains_beyond(run, saved_step(run))
        # The host of rank 0, without which no checkpoint gets its name.
        node = stage.cluster.nodes(job)[0]
        cut = stage.prepared_power_cut(node)
        unfinished = until("a save that goes on", lambda: _saving(run), every=0.001)
        cut()
        time.sleep(1.0)
        if left := [folder for folder in unfinished if folder.exists()]:
            break
        stage.cluster.wait(job, "RUNNING", restarts=cuts)
    else:
        pytest.fail(f"none of {TRIES} power cuts met a save")
    step = saved_step(run)
    stage.cluster.wait(job, "COMPLETED")
    # What was being saved is no checkpoint, and is cleared away by the next save.
    assert attempts(run, "begin")[-1]["step"] == step
    assert not any(folder.exists() for folder in left)
    stage.is_the_undisturbed_run(run)


def _saving(run: Path) -> list[Path]:
    return [folder for folder in (run / "checkpoints").iterdir() if folder.name.startswith(".saving-")]


@pytest.mark.parametrize("place", [0, 1], ids=["of_the_batch_host", "of_another_host"])
def test_a_run_goes_on_after_a_cable_was_pulled(stage: Stage, place: int):
    """What is cut off lives on for a while: two starts of one run must not write into one directory."""
    run = stage.run_left_at(BEGIN)
    job = stage.resume(run, "--requeue", "--parallel.timeout-s", str(TIMEOUT_S))
    stage.trains_beyond(run, BEGIN + EVERY)
    stage.unplug(stage.cluster.nodes(job)[place])
    state = stage.cluster.wait(job, "COMPLETED")
    assert int(state["Restarts"]) >= 1
    assert attempts(run, "begin")[1]["step"] >= BEGIN + EVERY
    stage.is_the_undisturbed_run(run)


def test_a_rank_that_hangs_is_named_ended_and_the_job_goes_on(stage: Stage):
    run = stage.run_left_at(BEGIN)
    job = stage.resume(run, "--requeue", "--parallel.timeout-s", str(TIMEOUT_S))
    stage.trains_beyond(run, BEGIN + EVERY)
    node = stage.cluster.nodes(job)[1]
    rank, pid = max(stage.cluster.ranks(run, node).items())
    stage.cluster.signal("STOP", pid, on=node)
    stopped = time.monotonic()
    until("the fault is noted", lambda: lines_of(run / "faults.jsonl"))
    named_after_s = time.monotonic() - stopped
    assert named_after_s < TIMEOUT_S + PATIENCE_S
    state = stage.cluster.wait(job, "COMPLETED")
    assert int(state["Restarts"]) >= 1
    fault = lines_of(run / "faults.jsonl")[0]
    assert (fault["kind"], fault["ranks"], fault["hosts"]) == ("hang", [rank], [node])
    # The log has the stacks of the ranks that could still tell.
    assert re.search(r"Stack of the main thread of .*ranks 0-1", stage.log(run))
    stage.is_the_undisturbed_run(run, timeout_s=TIMEOUT_S, named_after_s=round(named_after_s, 1))


def test_a_host_on_which_ranks_failed_twice_is_left_out(stage: Stage):
    """On one host of three the directory of the data does not answer, as a mount whose server has gone."""
    cluster, run = stage.cluster, stage.run_left_at(BEGIN)
    hosts = stage.partition("trio", 3)
    with cluster.frozen_file(stage.undisturbed.manifest, hosts[1]):
        job = stage.resume(run, "--requeue", "--partition", "trio", "--parallel.start-timeout-s", "30")
        until("a new submission without the host", lambda: len(_submitted(run)) == 2)
        after = _submitted(run)[-1]
        stage.jobs += after["jobs"]
        cluster.wait(after["jobs"][0], "COMPLETED")
    faults = lines_of(run / "faults.jsonl")
    assert [(fault["kind"], fault["hosts"]) for fault in faults] == [("absent", [hosts[1]])] * 2
    assert hosts[1] in stage.log(run)
    assert (run / "slurm" / "exclude").read_text().split() == [hosts[1]]
    assert after["exclude"] == [hosts[1]]
    assert int(cluster.state(job)["Restarts"]) == 1
    assert cluster.nodes(after["jobs"][0]) == [hosts[0], hosts[2]]
    stage.is_the_undisturbed_run(run)


def _submitted(run: Path) -> list[dict]:
    return lines_of(run / "slurm" / "submissions.jsonl")


def test_a_run_that_brings_no_new_step_stops_and_says_so(stage: Stage):
    """Every start is killed before its first save, as by a host that runs out of memory at the same step."""
    run = stage.run_left_at(BEGIN)
    job = stage.resume(run, "--requeue")
    for starts in (1, 2):
        until("a start", lambda starts=starts: len(attempts(run, "begin")) == starts)
        stage.trains_beyond_again(run, BEGIN, starts)
        node = stage.cluster.nodes(job)[1]
        stage.cluster.signal("KILL", max(stage.cluster.ranks(run, node).values()), on=node)
        until("its end", lambda starts=starts: len(attempts(run, "end")) == starts)
    state = stage.cluster.wait(job, "FAILED")
    assert int(state["Restarts"]) == 1
    assert "no new step between two restarts" in stage.log(run)
    assert saved_step(run) == BEGIN
    # Nothing is lost: a person who submits again goes on.
    job = stage.resume(run, "--requeue")
    stage.cluster.wait(job, "COMPLETED")
    assert newest_step(run) > BEGIN
    stage.is_the_undisturbed_run(run)
