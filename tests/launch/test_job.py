"""What `limoe job begin` and `limoe job end` tell a job script, from the files of the run and Slurm's answers."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.job import BeginOptions, EndOptions, begin, end, main
from launch.job_case import look, newest_step
from limoe_dist.config.errors import UserError
from slurm import losses, scheduler
from slurm.attempts import attempts, lines
from slurm.scheduler import Node, Past, Queued

BOTH = "n[1-2]"


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Slurm answers; a test changes it. An absent part is a command that is not there."""
    answers: dict[str, Any] = {}

    def answer(part: str) -> Any:
        if part not in answers:
            raise UserError("there is no squeue on PATH")
        return answers[part]

    monkeypatch.setattr(scheduler, "queue", lambda jobs: {j: q for j, q in answer("queue").items() if j in jobs})
    monkeypatch.setattr(scheduler, "history", lambda jobs: [past for past in answer("history") if past.job in jobs])
    monkeypatch.setattr(scheduler, "nodes", lambda names: answer("nodes"))
    monkeypatch.setattr(scheduler, "is_preempted", lambda job: job in answer("preempted"))
    return answers


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    (run_dir / "slurm").mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"train": {"steps": 100}}))
    return run_dir


def saved(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def ended(run: Path, step: int, status: int, **more: Any) -> None:
    path = run / "ended.json"
    # As training does it: another file, under the same name.
    path.with_suffix(".new").write_text(json.dumps({"step": step, "signal": 0, "status": status} | more))
    path.with_suffix(".new").replace(path)


def case(run: Path, job: str = "7", restart: int = 0, nodes: str = BOTH):
    variables = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart), "SLURM_JOB_NODELIST": nodes}
    return look(run, variables)


def started(run: Path, job: str = "7", restart: int = 0, nodes: str = BOTH, **options: Any) -> int:
    return begin(case(run, job, restart, nodes), BeginOptions(str(run), **({"wait": 0.0} | options))).status


def stopped(run: Path, job: str = "7", restart: int = 0, nodes: str = BOTH, *, status: int, **options: Any) -> int:
    given = {"requeue": True} | options
    return end(case(run, job, restart, nodes), EndOptions(str(run), status=status, **given)).status


def would_end(run: Path, restart: int, status: int) -> tuple[str, int]:
    """What would be noted and said at the end, without noting it."""
    here = case(run, restart=restart)
    here.note = lambda event, **facts: None  # type: ignore[method-assign]
    verdict = end(here, EndOptions(str(run), status=status, requeue=True, idle_restarts=0))
    return verdict.action, verdict.status


def submitted(run: Path, *jobs: str, **more: Any) -> None:
    with (run / "slurm/submissions.jsonl").open("a") as file:
        file.write(json.dumps({"jobs": jobs} | more) + "\n")


def fault(run: Path, *hosts: str, job: str = "7", restart: int = 0) -> None:
    with (run / "faults.jsonl").open("a") as file:
        line = {"kind": "absent", "hosts": hosts, "job": job, "restart": restart, "text": "did not come"}
        file.write(json.dumps(line) + "\n")


def test_an_attempt_is_noted_from_its_begin_to_its_end(run: Path) -> None:
    saved(run, 10)
    assert started(run) == 0
    saved(run, 20)
    ended(run, 20, 75)
    assert stopped(run, status=75) == 12
    first, last = lines(run / "slurm/attempts.jsonl")
    assert {name: first[name] for name in ("event", "job", "restart", "nodes", "step")} == {
        "event": "begin",
        "job": "7",
        "restart": 0,
        "nodes": ["n1", "n2"],
        "step": 10,
    }
    assert (last["event"], last["status"], last["step"], last["action"]) == ("end", 75, 20, "requeue")


def test_a_run_that_is_done_is_not_trained_again(run: Path) -> None:
    ended(run, 99, 0)
    assert started(run) == 0
    ended(run, 100, 0)
    assert started(run, restart=1) == 10


@pytest.mark.parametrize(
    ("srun", "written", "status"),
    [
        (0, 0, 0),
        (75, 75, 12),
        (1, None, 12),
        (137, None, 12),
        # One rank left with 75 and srun terminated the others: what the run wrote is true.
        (143, 75, 12),
        (134, 0, 0),
        # Nobody saved: one rank failed, and srun terminated the others.
        (143, None, 12),
        (143, 143, 143),
        (130, 130, 130),
        (2, None, 2),
        (143, 2, 2),
        (3, 3, 3),
        (1, 3, 3),
    ],
)
def test_what_follows_from_how_training_ended(run: Path, srun: int, written: int | None, status: int) -> None:
    # Of the attempt before: it says nothing about this one.
    ended(run, 5, 75)
    assert started(run) == 0
    if written is not None:
        ended(run, 10, written)
    assert stopped(run, status=srun) == status


def test_without_requeue_the_status_of_training_is_that_of_the_job(run: Path) -> None:
    assert started(run) == 0
    assert stopped(run, status=143, requeue=False) == 1
    assert started(run, "8") == 0
    ended(run, 3, 75)
    assert stopped(run, "8", status=75, requeue=False) == 75


def test_a_cancelled_job_is_not_requeued(run: Path) -> None:
    assert started(run) == 0
    ended(run, 4, 143)
    assert stopped(run, status=143, cancelled=True) == 143
    assert attempts(run)[-1].action == "cancelled"


@pytest.mark.parametrize("status", [143, 75, 1])
def test_what_slurm_preempts_is_requeued_whatever_it_saved_with(
    run: Path, cluster: dict[str, Any], status: int
) -> None:
    for restart in range(3):
        assert started(run, restart=restart) == 0
        # Not of this job: a person's signal.
        cluster["preempted"] = ["6"]
        ended(run, 4, status)
        assert would_end(run, restart, status)[1] == (143 if status == 143 else 12)
        cluster["preempted"] = ["7"]
        # No new step in three starts: nobody's fault.
        assert would_end(run, restart, status) == ("preempted", 12)
        verdict = stopped(run, restart=restart, status=143)
        assert (verdict, attempts(run)[-1].action) == (12, "preempted")
    assert stopped(run, restart=2, status=143, requeue=False) == status


def test_what_ended_for_good_under_a_preemption_is_not_requeued(run: Path, cluster: dict[str, Any]) -> None:
    cluster["preempted"] = ["7"]
    for restart, status in enumerate((0, 2, 3)):
        assert started(run, restart=restart) == 0
        ended(run, 50, status)
        assert stopped(run, restart=restart, status=143) == status
        (run / "slurm/attempts.jsonl").unlink()


def test_the_next_job_of_a_chain_goes_on_after_a_preemption_and_not_after_a_persons_signal(
    run: Path, cluster: dict[str, Any]
) -> None:
    submitted(run, "7", "8", "9")
    cluster["preempted"] = ["7"]
    for job in ("7", "8"):
        assert started(run, job) == 0
        ended(run, 4, 143)
        assert stopped(run, job, status=143, requeue=False) == 143
    with pytest.raises(UserError, match=r"job 8 was stopped by a person's signal at step 0: to go on, submit again"):
        started(run, "9")
    submitted(run, "10")
    assert started(run, "10") == 0


def test_two_starts_without_a_new_step_are_enough(run: Path) -> None:
    saved(run, 40)
    assert started(run) == 0
    fault(run)
    assert stopped(run, status=1) == 12
    assert started(run, restart=1) == 0
    # Not asked for a third time, and should somebody requeue it, refused.
    assert stopped(run, restart=1, status=1) == 1
    assert attempts(run)[-1].action == "stop"
    with pytest.raises(UserError) as caught:
        started(run, restart=2)
    told = str(caught.value)
    assert "no new step between two restarts" in told
    assert "job 7, job 7 restart 1; on n1, n2" in told
    assert "step 40; the last fault: did not come" in told
    assert started(run, restart=2, idle_restarts=0) == 0


def test_a_new_step_clears_the_count(run: Path) -> None:
    for restart in range(4):
        assert started(run, restart=restart) == 0
        saved(run, 10 + restart)
        assert stopped(run, restart=restart, status=1) == 12


def test_cancelled_starts_stop_a_run_only_when_they_are_many(run: Path) -> None:
    for restart in range(10):
        assert started(run, restart=restart) == 0
        stopped(run, restart=restart, status=143, cancelled=True)
    with pytest.raises(UserError, match="the last 10 starts, whatever ended them"):
        started(run, restart=10)


def test_a_person_may_try_again_what_was_stopped(run: Path) -> None:
    submitted(run, "7")
    for restart in range(2):
        started(run, restart=restart)
        stopped(run, restart=restart, status=1)
    submitted(run, "8")
    assert started(run, "8") == 0
    ended(run, 3, 3)
    assert stopped(run, "8", status=3) == 3
    with pytest.raises(UserError, match=r"job 8 was stopped by a guard.*see .*guard\.jsonl"):
        started(run, "8", 1)
    submitted(run, "9")
    assert started(run, "9") == 0


def test_a_chain_stops_where_one_of_it_ended_with_a_setting_to_mend(run: Path) -> None:
    submitted(run, "7", "8")
    assert started(run, "7") == 0
    ended(run, 3, 2, reason="train.batch_pairs=7 must be even: use 8")
    assert stopped(run, "7", status=2, requeue=False) == 2
    with pytest.raises(UserError, match=r"job 7 ended with a setting or file to mend.*use 8"):
        started(run, "8")


def test_a_host_that_failed_twice_is_left_out_by_a_new_submission(run: Path) -> None:
    assert started(run) == 0
    fault(run, "n2")
    assert stopped(run, status=1) == 12
    assert not (run / "slurm/exclude").exists()
    assert started(run, restart=1) == 0
    fault(run, "n2", restart=1)
    assert stopped(run, restart=1, status=1) == 11
    assert (run / "slurm/exclude").read_text() == "n2\n"
    # The starts that failed by n2 do not count against a job that does not have it.
    submitted(run, "8", after="7")
    assert started(run, "8", nodes="n[1,3]") == 0


def test_a_job_that_gets_a_bad_host_is_submitted_anew_once(run: Path) -> None:
    for job in ("5", "6"):
        started(run, job)
        fault(run, "n2", job=job)
        stopped(run, job, status=1, requeue=False)
    submitted(run, "7")
    assert started(run, "7") == 11
    # Where that did not help there is no end of it otherwise.
    submitted(run, "8", after="7")
    assert started(run, "8") == 0


def test_a_chain_goes_on_without_a_bad_host_and_its_last_job_with_it(run: Path) -> None:
    submitted(run, "5", "6", "7")
    for job in ("5", "6"):
        assert started(run, job) == 0
        fault(run, "n2", job=job)
        assert stopped(run, job, status=1, requeue=False) == (1 if job == "5" else 11)
    (run / "checkpoints").mkdir()
    saved(run, 5)
    assert started(run, "7") == 0


def test_where_most_nodes_failed_it_is_not_the_nodes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in ("5", "6"):
        assert started(run, job, nodes="n1") == 0
        fault(run, "n1", job=job)
        assert stopped(run, job, nodes="n1", status=1, requeue=False) == 1
    assert started(run, nodes="n1") == 0
    assert "more than half of the nodes" in capsys.readouterr().err
    assert not (run / "slurm/exclude").exists()


def node(name: str, *states: str, since: float = 50.0) -> Node:
    return Node(name, frozenset(states or ("IDLE",)), since)


def test_nodes_that_a_power_cut_took_are_found_by_the_next_start(run: Path, cluster: dict[str, Any]) -> None:
    cluster["nodes"] = {"n1": node("n1"), "n2": node("n2")}
    assert started(run) == 0
    cluster["nodes"] = {"n1": node("n1"), "n2": node("n2", "DOWN", "NOT_RESPONDING")}
    assert started(run, restart=1, nodes="n[1,3]") == 0
    assert attempts(run)[0].lost == ("n2",)
    # n1 is there, but its daemon is a new one.
    cluster["nodes"] = {"n1": node("n1", since=90.0), "n3": node("n3")}
    assert started(run, restart=2) == 0
    assert attempts(run)[1].lost == ("n1",)


def test_a_node_that_is_lost_under_a_job_is_noted_at_its_end(run: Path, cluster: dict[str, Any]) -> None:
    cluster["nodes"] = {"n1": node("n1"), "n2": node("n2")}
    assert started(run) == 0
    cluster["nodes"]["n2"] = node("n2", "DOWN")
    assert stopped(run, status=143, cancelled=True) == 1
    assert (attempts(run)[0].action, attempts(run)[0].lost) == ("cancelled", ("n2",))


def test_a_preempted_job_blames_no_node(run: Path, cluster: dict[str, Any]) -> None:
    cluster |= {"nodes": {"n1": node("n1")}, "history": [Past("7", "PREEMPTED", "0:0", 1.0, 2.0, BOTH)]}
    assert started(run) == 0
    cluster["nodes"] = {"n1": node("n1", "DOWN")}
    assert started(run, restart=1) == 0
    assert (attempts(run)[0].action, attempts(run)[0].lost, attempts(run)[0].why) == ("lost", (), "preempted")


def test_daemons_that_are_all_started_again_blame_no_node(run: Path, cluster: dict[str, Any]) -> None:
    names = ["n1", "n2", "n3", "n4"]
    for restart in range(3):
        cluster["nodes"] = {name: node(name, since=50.0 + 50 * restart) for name in names}
        assert started(run, restart=restart, nodes="n[1-4]") == 0
    assert [attempt.lost for attempt in attempts(run)] == [(), (), ()]
    assert not (run / "slurm/exclude").exists()


def test_a_node_that_booted_is_lost_and_one_that_is_drained_is_not(run: Path, cluster: dict[str, Any]) -> None:
    cluster["nodes"] = {name: Node(name, frozenset({"IDLE"}), 50.0, 40.0) for name in ("n1", "n2", "n3")}
    assert started(run, nodes="n[1-3]") == 0
    # All daemons are new, and Slurm reckons the time of a boot a second later than before.
    cluster["nodes"] = {name: Node(name, frozenset({"IDLE", "DRAIN"}), 900.0, 41.0) for name in ("n1", "n2", "n3")}
    cluster["nodes"]["n3"] = Node("n3", frozenset({"IDLE"}), 900.0, 800.0)
    assert started(run, restart=1, nodes="n[1-3]") == 0
    assert attempts(run)[0].lost == ("n3",)


def test_of_several_nodes_that_are_lost_after_an_end_none_is_blamed(run: Path, cluster: dict[str, Any]) -> None:
    cluster["nodes"] = {"n1": node("n1"), "n2": node("n2")}
    assert started(run) == 0
    assert started(run, "8") == 0
    cluster["nodes"] = {"n1": node("n1", "DOWN"), "n2": node("n2", "DOWN")}
    assert stopped(run, "8", status=143, cancelled=True) == 1
    assert started(run, "8", 1) == 0
    assert started(run, "8", 2) == 0
    assert [attempt.lost for attempt in attempts(run)] == [(), (), (), ()]
    assert "n1, n2 were lost since" in attempts(run)[2].why
    # The accounting says that it was them.
    cluster["history"] = [Past("8", "NODE_FAIL", "0:0", 1.0, 2.0, BOTH)] * 3
    assert started(run, "8", 3) == 0
    assert attempts(run)[3].lost == ("n1", "n2")


def test_a_cancelled_job_that_slurm_preempted_blames_no_node(run: Path, cluster: dict[str, Any]) -> None:
    cluster |= {"nodes": {"n1": node("n1")}, "preempted": ["7"]}
    assert started(run) == 0
    cluster["nodes"]["n1"] = node("n1", "DOWN")
    assert stopped(run, status=143, cancelled=True) == 1
    assert started(run, restart=1) == 0
    assert [(attempt.action, attempt.lost) for attempt in attempts(run)] == [("preempted", ()), ("", ())]


def test_odd_values_in_the_files_of_a_run_keep_no_job_from_being_requeued(run: Path) -> None:
    fields = {"time": 1e400, "job": "7", "restart": -1, "step": 10**400, "status": 10**400, "nodes": 5, "hosts": 5}
    for name in ("slurm/attempts.jsonl", "faults.jsonl", "slurm/submissions.jsonl"):
        text = "".join(json.dumps(fields | {"event": event}) + "\n" for event in ("begin", "lost", "end"))
        (run / name).write_text(text)
    (run / "ended.json").write_text('{"step": 1e999, "status": 1e999}')
    (run / "run.json").write_text('{"train": {"steps": 1e999}}')
    assert started(run) == 0
    assert stopped(run, status=75) == 12


def test_without_slurms_commands_an_attempt_is_closed_all_the_same(run: Path) -> None:
    assert started(run) == 0
    assert started(run, restart=1) == 0
    assert attempts(run)[0].action == "lost"
    assert losses.lost_hosts(attempts(run)[0]) is None


def test_another_job_that_runs_there_is_not_disturbed(run: Path, cluster: dict[str, Any]) -> None:
    assert started(run, "5") == 0
    cluster["queue"] = {"5": Queued("5", "RUNNING", "", 1.0, 2.0, 3.0, BOTH)}
    with pytest.raises(UserError, match=r"in use: job 5 \(RUNNING\) trains there"):
        started(run, "7")
    cluster["queue"] = {"5": Queued("5", "PENDING", "Resources", None, None, None, "")}
    assert started(run, "8") == 0


def test_a_lock_is_waited_for_and_then_respected(run: Path) -> None:
    with (run / "lock").open("w") as file:
        file.write("process 5 on n1, 0123")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use: it is being trained by process 5 on n1"):
            started(run, wait=0.2)
    assert started(run, wait=0.2) == 0


def test_a_clock_that_was_set_back_changes_nothing(run: Path) -> None:
    for restart, now in enumerate((2e9, 1e9)):
        here = replace(case(run, restart=restart), clock=lambda now=now: now)
        assert begin(here, BeginOptions(str(run), wait=0.0)).status == 0
        here = replace(case(run, restart=restart), clock=lambda now=now: now - 5e8)
        verdict = end(here, EndOptions(str(run), status=1, requeue=True))
        assert verdict.status == (12 if restart == 0 else 1)


def test_a_directory_that_cannot_be_written_keeps_nobody_from_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "slurm").write_text("a file")
    assert started(run) == 0
    assert stopped(run, status=1) == 12
    assert stopped(run, status=0) == 0
    told = capsys.readouterr().err
    assert "slurm/attempts.jsonl: cannot be written: " in told
    assert "Traceback" not in told


def test_the_newest_step_is_that_of_a_checkpoint_with_a_manifest(run: Path) -> None:
    assert newest_step(run) == 0
    saved(run, 10)
    (run / "checkpoints/step-00000020").mkdir()
    assert newest_step(run) == 10


def test_the_command_reads_the_variables_of_the_job(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[07-08]")
    assert main(["begin", str(run)]) == 0
    assert main(["end", str(run), "--status", "1", "--requeue"]) == 12
    assert "job 42: training ended with status 1; requeueing from step 0" in capsys.readouterr().out
    assert attempts(run)[0].nodes == ("gpu07", "gpu08")
    assert attempts(run)[0].key == ("42", 3)
    assert main([]) == 2
    assert main(["end", str(run)]) == 2
