"""A person ends a job: what is saved, what Slurm says, and that nothing starts it again by itself."""

from __future__ import annotations

import json

from tests.slurm.harness import until
from tests.slurm.runs import attempts, saved_step
from tests.slurm.stage import Stage

BEGIN = 320


def test_scancel_with_term_saves_and_ends_the_job(stage: Stage):
    run = stage.run_left_at(BEGIN)
    job = stage.resume(run, "--requeue")
    step = stage.trains_beyond(run, BEGIN + 5)
    stage.cluster.run("scancel", "--signal=TERM", job).expect(0)
    state = stage.cluster.wait(job, "FAILED")
    # 143: saved after SIGTERM. A wish to end is not undone by --requeue.
    assert (state["ExitCode"], state["Restarts"]) == ("143:0", "0")
    ended = json.loads((run / "ended.json").read_text())
    assert (ended["status"], ended["step"]) == (143, saved_step(run))
    assert ended["step"] >= step
    assert [line["status"] for line in attempts(run, "end")] == [143]
    _finishes(stage, run)


def test_plain_scancel_saves_within_slurms_patience(stage: Stage):
    """KillWait is 5 s here, 30 s on most clusters: this run saves in less."""
    run = stage.run_left_at(BEGIN)
    job = stage.resume(run, "--requeue")
    step = stage.trains_beyond(run, BEGIN + 5)
    stage.cluster.run("scancel", job).expect(0)
    state = stage.cluster.wait(job, "CANCELLED")
    assert state["Restarts"] == "0"
    until("a checkpoint of the step at which it was cancelled", lambda: saved_step(run) >= step, seconds=30)
    until("the ranks are gone", lambda: (run / "ended.json").exists(), seconds=30)
    assert json.loads((run / "ended.json").read_text())["status"] == 143
    _finishes(stage, run)


def _finishes(stage: Stage, run) -> None:
    """What a person submits later goes on where it was."""
    step = saved_step(run)
    job = stage.resume(run, "--requeue")
    stage.cluster.wait(job, "COMPLETED")
    assert attempts(run, "begin")[-1]["step"] == step
    stage.is_the_undisturbed_run(run)
