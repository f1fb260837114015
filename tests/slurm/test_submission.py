"""What `limoe submit` refuses on a real cluster, with Slurm's own reason; and chains of jobs."""

from __future__ import annotations

from tests.slurm.harness import lines_of, one_line_error
from tests.slurm.runs import SMALL, STEPS, attempts, saved_step
from tests.slurm.stage import Stage, shape


def test_a_partition_that_is_not_there_is_refused_with_slurms_reason(stage: Stage):
    run = stage.run_left_at(0)
    words = ("tiny", "--data", str(stage.undisturbed.manifest), "--out", str(run), *SMALL, "--partition", "nowhere")
    done = stage.cluster.limoe("submit", *words, *SHAPE, "--yes")
    one_line_error(done, status=2, says=["sbatch", "invalid partition specified: nowhere"])
    assert not run.exists()


def test_more_hosts_than_there_are_are_refused_with_slurms_reason(stage: Stage):
    run = stage.run_left_at(STEPS - 40)
    before = sorted(path.name for path in run.iterdir())
    words = shape(nodes=16, ranks_per_node=1, time="10")
    done = stage.cluster.limoe("submit", "--resume", str(run), "--parallel.ep", "1", *words, "--yes")
    assert done.status == 2
    assert "limoe: error:" in done.stderr
    assert "Traceback" not in done.printed
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_run_that_is_in_use_is_not_submitted_twice(stage: Stage):
    run = stage.run_left_at(STEPS - 60)
    # Held back, then running: a job in the queue counts, and so does one that trains.
    job = stage.resume(run, "--sbatch", "hold")
    again = ("submit", "--resume", str(run), *SHAPE, "--yes")
    one_line_error(stage.cluster.limoe(*again), status=2, says=[job])
    stage.cluster.run("scontrol", "release", job).expect(0)
    stage.trains_beyond(run, STEPS - 60)
    one_line_error(stage.cluster.limoe(*again), status=2, says=[str(run)])
    stage.cluster.wait(job, "COMPLETED")
    assert len(lines_of(run / "slurm" / "submissions.jsonl")) == 1
    stage.is_the_undisturbed_run(run)


def test_a_chain_goes_on_where_the_time_limit_of_one_job_ends(stage: Stage):
    run = stage.run_left_at(20)
    stage.resume(run, "--chain", "5", "--signal-before", "90", time="3")
    jobs = lines_of(run / "slurm" / "submissions.jsonl")[-1]["jobs"]
    stage.jobs += jobs
    for job in jobs:
        stage.cluster.wait(job, "COMPLETED", "FAILED")
    begins, ends = attempts(run, "begin"), attempts(run, "end")
    used = [line["job"] for line in begins]
    assert used == jobs[: len(used)]
    assert [line["status"] for line in ends] == [75] * (len(used) - 1) + [0]
    assert [line["step"] for line in begins[1:]] == [line["step"] for line in ends[:-1]]
    # Jobs that were not needed find the run done, and end well.
    states = [stage.cluster.state(job) for job in jobs[len(used) - 1 :]]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * len(states)
    assert saved_step(run) == STEPS
    stage.is_the_undisturbed_run(run)


SHAPE = shape(nodes=2, ranks_per_node=2, time="10")
