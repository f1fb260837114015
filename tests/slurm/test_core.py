"""What every push runs: a job to its end, over its time limit, over a power cut, over a preemption."""

from __future__ import annotations

import pytest

from tests.slurm.harness import LIMIT_S
from tests.slurm.runs import EVERY, SMALL, STEPS, attempts, saved_step
from tests.slurm.stage import Stage


@pytest.mark.core
def test_a_submitted_run_finishes_on_two_hosts(stage: Stage):
    run = stage.run_left_at(0)
    words = ("tiny", "--data", str(stage.undisturbed.manifest), "--out", str(run), *SMALL)
    job = stage.submit(run, *words)
    state = stage.cluster.wait(job, "COMPLETED")
    assert (state["NumNodes"], state["Restarts"]) == ("2", "0")
    assert [line["status"] for line in attempts(run, "end")] == [0]
    # The same layout on one machine gave the same bits.
    stage.is_the_undisturbed_run(run)


@pytest.mark.parametrize(
    "place", [pytest.param(0, id="of_the_batch_host", marks=pytest.mark.core), pytest.param(1, id="of_another_host")]
)
def test_a_run_goes_on_after_the_power_cut(stage: Stage, place: int):
    run = stage.run_left_at(200)
    job = stage.resume(run, "--requeue")
    stage.trains_beyond(run, 200 + EVERY)
    node = stage.cluster.nodes(job)[place]
    stage.power_cut(node)
    # Slurm itself finds the host gone, and starts the job anew on hosts that are left.
    state = stage.cluster.wait(job, "COMPLETED")
    assert int(state["Restarts"]) == 1
    assert node not in stage.cluster.nodes(job)
    assert [line["hosts"] for line in attempts(run, "lost")] == [[node]]
    assert attempts(run, "begin")[1]["step"] >= 200 + EVERY
    stage.is_the_undisturbed_run(run)


@pytest.mark.core
def test_a_job_at_its_time_limit_saves_requeues_itself_and_finishes(stage: Stage):
    """Slurm looks at time limits every 30 s: the signal comes 60 to 90 s after the start.

    In that time no machine does the 380 steps that are left, and a loaded one does some.
    """
    run = stage.run_left_at(20)
    job = stage.resume(run, "--requeue", "--signal-before", "90", time="3")
    state = stage.cluster.wait(job, "COMPLETED", seconds=2 * LIMIT_S)
    assert int(state["Restarts"]) >= 1
    begins, ends = attempts(run, "begin"), attempts(run, "end")
    assert [line["status"] for line in ends] == [75] * (len(ends) - 1) + [0]
    # Each attempt saved when it was told to, so the next one did no step again.
    assert [line["step"] for line in begins[1:]] == [line["step"] for line in ends[:-1]]
    assert all(before["step"] < after["step"] for before, after in zip(begins, ends, strict=True))
    stage.is_the_undisturbed_run(run)


@pytest.mark.parametrize(
    "partition",
    [pytest.param("low", id="at_once", marks=pytest.mark.core), pytest.param("lowg", id="with_grace")],
)
def test_a_preempted_run_goes_on(stage: Stage, partition: str):
    run = stage.run_left_at(200)
    job = stage.resume(run, "--requeue", "--partition", partition)
    step = stage.trains_beyond(run, 200 + EVERY)
    node = stage.cluster.nodes(job)[0]
    # A job of a partition that goes first wants one of its hosts, whole.
    rival = ("--partition=main", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 20")
    stage.jobs.append(stage.cluster.run("sbatch", "--parsable", *rival).expect(0).stdout.strip())
    state = stage.cluster.wait(job, "COMPLETED")
    assert int(state["Restarts"]) == 1
    if partition == "lowg":
        # The ranks alone got SIGTERM, 20 s before the job is put back: they saved, and the job did not wait for that.
        first = attempts(run, "end")[0]
        assert (first["status"], first["action"]) == (143, "preempted")
    assert step - EVERY <= attempts(run, "begin")[1]["step"] < STEPS
    # The host is not to blame.
    assert [line["hosts"] for line in attempts(run, "lost")] in ([], [[]])
    assert saved_step(run) == STEPS
    stage.is_the_undisturbed_run(run)
