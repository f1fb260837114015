"""`limoe status`: the state of a run from its files, and from Slurm where it is there."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import status, status_state
from launch.status_facts import gather, last_line
from launch.status_state import judge, remaining, slow_host, warnings
from launch.status_tables import duration, since
from limoe_dist.config.errors import UserError
from slurm import attempts as book
from slurm import scheduler
from slurm.scheduler import Past, Queued

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Slurm answers; empty: it is not there."""
    answers: dict[str, Any] = {}

    def queue(jobs: list[str]) -> dict[str, Queued]:
        if "queue" not in answers:
            raise UserError("there is no squeue on PATH")
        return {job: answers["queue"][job] for job in jobs if job in answers["queue"]}

    monkeypatch.setattr(scheduler, "queue", queue)
    monkeypatch.setattr(scheduler, "history", lambda jobs: answers.get("history", []))
    return answers


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    (run_dir / "slurm").mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"train": {"steps": 100}}))
    return run_dir


def line(run: Path, name: str, **content: Any) -> None:
    book.append(run / name, content)


def beat(run: Path, *, age: float = 1.0, phase: str = "train", job: str | None = "7", **more: Any) -> None:
    content = {
        "time": NOW - age,
        "step": 40,
        "steps": 100,
        "phase": phase,
        "seconds_per_step": 2.0,
        "ranks": 4,
        "hosts": ["n1", "n1", "n2", "n2"],
        "busy_s": [0.1, 0.1, 0.1, 0.1],
        "job": job,
        "restart": 0,
    }
    (run / "heartbeat.json").write_text(json.dumps(content | more))


def ended(run: Path, step: int, status: int, **more: Any) -> None:
    (run / "ended.json").write_text(json.dumps({"step": step, "signal": 0, "status": status} | more))


def began(run: Path, job: str = "7", restart: int = 0, *, at: float = NOW - 600, step: int = 0) -> None:
    nodes = ["n1", "n2"]
    line(run, book.ATTEMPTS, event="begin", time=at, job=job, restart=restart, nodes=nodes, step=step, mark=None)


def closed(run: Path, job: str = "7", restart: int = 0, *, at: float, status: int, action: str, step: int = 0) -> None:
    given = {"job": job, "restart": restart, "status": status, "action": action, "step": step}
    line(run, book.ATTEMPTS, event="end", time=at, **given)


def queued(job: str = "7", state: str = "RUNNING", **more: Any) -> dict[str, Queued]:
    given = {"reason": "", "start": None, "end": None, "left_s": 90.0, "nodes": "n[1-2]"} | more
    return {job: Queued(job=job, state=state, **given)}


def state(run: Path) -> tuple[str, int]:
    verdict = judge(gather(run, lambda: NOW))
    return verdict.state, verdict.exit_status


def test_a_run_that_trains_tells_its_phase(run: Path) -> None:
    for phase, name in (("start", "starting"), ("train", "training"), ("evaluate", "evaluating"), ("save", "saving")):
        beat(run, phase=phase)
        assert state(run) == (name, 0)


@pytest.mark.parametrize(
    ("age", "phase", "per_step", "name"),
    [
        (119, "train", 1.0, "training"),
        (121, "train", 1.0, "looks dead"),
        # A step of 30 s may bring a heartbeat as rarely.
        (500, "train", 30.0, "training"),
        (800, "save", 1.0, "saving"),
        (901, "save", 1.0, "looks dead"),
    ],
)
def test_a_run_without_a_heartbeat_for_long_looks_dead(
    run: Path, age: float, phase: str, per_step: float, name: str
) -> None:
    beat(run, age=age, phase=phase, seconds_per_step=per_step)
    assert state(run)[0] == name
    assert state(run)[1] == (1 if name == "looks dead" else 0)


@pytest.mark.parametrize(
    ("step", "status", "name", "exit_status"),
    [
        (100, 0, "done", 0),
        (50, 0, "stopped", 0),
        (50, 75, "stopped", 0),
        (50, 143, "stopped", 0),
        (50, 130, "stopped", 0),
        (50, 3, "guarded", 3),
        (50, 2, "failed", 1),
        (50, 1, "failed", 1),
    ],
)
def test_a_run_that_ended_says_how(run: Path, step: int, status: int, name: str, exit_status: int) -> None:
    beat(run, age=30)
    ended(run, step, status, reason="optim.lr=-1 must be above 0\nmore")
    assert state(run) == (name, exit_status)
    if status in (1, 2):
        assert judge(gather(run, lambda: NOW)).text.endswith("optim.lr=-1 must be above 0")


def test_a_job_that_waits_is_told_with_slurms_reason(
    run: Path, cluster: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    line(run, book.SUBMISSIONS, jobs=["7", "8"])
    cluster["queue"] = queued("8", "PENDING", reason="Dependency", left_s=None, nodes="")
    cluster["queue"] |= queued("7", "PENDING", reason="Resources", start=NOW + 60, left_s=None, nodes="")
    assert state(run) == ("queued", 0)
    assert judge(gather(run, lambda: NOW)).text == "job 7 waits (Resources)"
    assert status.main([str(run)]) == 0
    told = capsys.readouterr().out
    assert "job 7  PENDING, Resources, expected to start " in told
    assert "job 8  PENDING, Dependency\n" in told


def test_a_job_that_runs_is_starting_until_its_own_heartbeat(run: Path, cluster: dict[str, Any]) -> None:
    cluster["queue"] = queued()
    beat(run)
    began(run)
    closed(run, at=NOW - 500, status=75, action="requeue")
    began(run, restart=1)
    assert state(run) == ("starting", 0)
    beat(run, restart=1)
    assert state(run) == ("training", 0)
    beat(run, restart=1, age=1000)
    assert state(run) == ("looks dead", 1)
    assert "though job 7 is RUNNING" in judge(gather(run, lambda: NOW)).text


def test_a_fresh_heartbeat_of_a_job_that_slurm_does_not_have_is_no_life(run: Path, cluster: dict[str, Any]) -> None:
    cluster |= {"queue": {}, "history": [Past("7", "NODE_FAIL", "0:0", 1.0, 2.0, "n[1-2]")]}
    began(run)
    beat(run, age=60)
    assert state(run) == ("failed", 1)
    assert "ended without a word (node_fail)" in judge(gather(run, lambda: NOW)).text
    # Slurm may be that of another cluster.
    beat(run, age=6)
    assert state(run) == ("training", 0)


def test_the_lock_tells_that_somebody_trains(run: Path) -> None:
    with (run / "lock").open("w") as file:
        file.write("process 5 on n1, 0123")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert state(run) == ("starting", 0)
        beat(run, job=None)
        assert state(run) == ("training", 0)
    (run / "heartbeat.json").unlink()
    assert state(run)[0] == "stopped"


def test_a_job_that_was_requeued_is_taken_to_wait_where_slurm_cannot_tell(run: Path, cluster: dict[str, Any]) -> None:
    began(run)
    ended(run, 50, 75)
    closed(run, at=NOW, status=75, action="requeue")
    assert state(run) == ("queued", 0)
    # Whether Slurm obeyed is not to be seen.
    assert "time was up, wanted to be requeued; Slurm is not here" in judge(gather(run, lambda: NOW)).text
    cluster["queue"] = {}
    assert state(run) == ("stopped", 0)
    assert told_of(run) == ["time was up, wanted to be requeued"]
    cluster["queue"] = queued(state="PENDING")
    assert told_of(run) == ["time was up, requeued"]
    cluster.clear()
    began(run, restart=1)
    assert told_of(run) == ["time was up, requeued", "not known"]


def told_of(run: Path) -> list[str]:
    facts = gather(run, lambda: NOW)
    return [status_state.how(facts, attempt) for attempt in facts.attempts]


@pytest.mark.parametrize("event", ["end", "skip"])
def test_a_job_in_whose_place_none_came_is_a_failure(run: Path, cluster: dict[str, Any], event: str) -> None:
    cluster["queue"] = {}
    began(run)
    ended(run, 50, 75)
    line(run, book.ATTEMPTS, event=event, time=NOW, job="7", restart=0, status=1, action="resubmit", why="n2 failed")
    assert state(run) == ("failed", 1)
    assert "(n2 failed), but no job came in its place" in judge(gather(run, lambda: NOW)).text
    line(run, book.SUBMISSIONS, jobs=["8"], after="7")
    assert state(run) == ("failed", 1)
    assert "followed by job 8, which has left the queue" in judge(gather(run, lambda: NOW)).text
    cluster["queue"] = queued("8", "PENDING", reason="Resources")
    assert state(run) == ("queued", 0)


def test_an_attempt_that_was_preempted_says_so(run: Path, cluster: dict[str, Any]) -> None:
    cluster["queue"] = queued(state="PENDING")
    began(run)
    closed(run, at=NOW, status=143, action="preempted")
    assert told_of(run) == ["preempted, requeued"]
    cluster["queue"] = {}
    assert state(run) == ("stopped", 0)


def test_a_job_that_was_sent_away_says_why(run: Path) -> None:
    began(run)
    closed(run, at=NOW, status=1, action="stop")
    why = "no new step between two restarts"
    line(run, book.ATTEMPTS, event="skip", time=NOW, job="7", restart=1, nodes=[], step=0, action="stop", why=why)
    verdict = judge(gather(run, lambda: NOW))
    assert (verdict.state, verdict.text) == ("failed", f"job 7 restart 1 did not train: {why}")


def test_a_heartbeat_of_the_future_is_told_and_its_age_taken_from_the_file(run: Path) -> None:
    beat(run, age=-3600)
    os.utime(run / "heartbeat.json", (NOW - 7, NOW - 7))
    facts = gather(run, lambda: NOW)
    assert facts.heartbeat is not None
    assert (facts.heartbeat.age_s, facts.heartbeat.ahead_s) == (7.0, 3600.0)
    assert judge(facts).state == "training"
    assert any("3600 s in the future" in told for told in warnings(facts))
    os.utime(run / "heartbeat.json", (NOW - 700, NOW - 700))
    assert judge(gather(run, lambda: NOW)).state == "looks dead"
    assert since(NOW, NOW + 300) == "5 min in the future"


def test_what_is_left_counts_the_pauses_between_attempts(run: Path) -> None:
    beat(run, restart=1)
    # 300 s of training, 100 s of waiting, then the attempt that runs.
    began(run, at=NOW - 500)
    closed(run, at=NOW - 200, status=75, action="requeue", step=30)
    began(run, restart=1, at=NOW - 100, step=30)
    rest = remaining(gather(run, lambda: NOW))
    # 60 steps of 2 s; a quarter of the time went by waiting: 120 / 0.75.
    assert (rest.training_s, rest.waiting_frac, rest.wall_s) == (120.0, 0.25, 160.0)


def test_a_clock_that_was_set_back_makes_no_negative_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(run)
    began(run, at=NOW)
    closed(run, at=NOW - 5000, status=75, action="requeue")
    began(run, restart=1, at=NOW - 9000)
    rest = remaining(gather(run, lambda: NOW))
    assert rest.waiting_frac is None
    status.main([str(run)])
    assert " -" not in capsys.readouterr().out.replace("--", "")


def test_the_page_tells_all_there_is(run: Path, cluster: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    cluster["queue"] = queued("7")
    now = time.time()
    beat(run, age=NOW - now, busy_s=[0.1, 0.1, 0.4, 0.1], restart=1)
    began(run, at=now - 600)
    line(run, book.ATTEMPTS, event="lost", time=now - 300, job="7", restart=0, hosts=["n2"], step=30)
    began(run, restart=1, at=now - 200, step=30)
    line(run, "metrics.jsonl", step=39, loss=2.5, pairs_per_s=1234.5)
    line(run, "faults.jsonl", time=1, kind="hang", ranks=[2], hosts=["n2"], text="rank 2 hangs\nstack", job="7")
    line(run, "guard.jsonl", step=12, kind="spike", action="skip", text="loss 9 [z 12]")
    (run / "slurm/exclude").write_text("n2\n")
    folder = run / "checkpoints/step-00000030"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "verified").touch()
    assert status.main([str(run)]) == 0
    told = capsys.readouterr().out
    for words in (
        ": training: 4 ranks of job 7, heartbeat 0 s ago",
        "40 of 100 (40.0 %)",
        "loss 2.5000, 1,234.5 pairs/s (step 39)",
        "2 min of training; done ",
        "step 30, 0 s ago, verified",
        "RUNNING, on n[1-2], 90 s to its time limit",
        "lost n2",
        "30 to 40",
        "faults of n2: 1 hang, 1 lost",
        "last fault: rank 2 hangs\n",
        "guard: 1 spike (skip)",
        "last guard event, step 12: loss 9 [z 12]",
        "slow: rank 2 (host n2) works 0.4 s a step",
        "warning: n2 failed 2 times: excluded",
    ):
        assert words in told, f"{words}\n{told}"
    assert all(row == row.rstrip() for row in told.splitlines())


def test_json_holds_the_same(run: Path, cluster: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    cluster["queue"] = queued("7")
    began(run)
    beat(run, age=NOW - time.time())
    assert status.main([str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["step"], told["steps"], told["training_left_s"]) == ("training", 40, 100, 120.0)
    assert told["queue"][0]["job"] == "7"
    assert told["attempts"][0]["how"] == "runs"
    assert told["slurm"] is True


def test_watch_ends_when_nothing_more_comes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beat(run, age=NOW - time.time())
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            ended(run, 100, 0)

    monkeypatch.setattr(status.time, "sleep", wait)
    assert status.main([str(run), "--watch", "--every", "3"]) == 0
    assert waits == [3.0, 3.0]
    told = capsys.readouterr().out
    assert [word in told for word in (": training", ": done")] == [True, True]


def test_a_terminal_of_80_columns_holds_the_page(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    began(run)
    closed(run, at=NOW, status=1, action="end")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.chdir(run.parent)
    assert status.main([run.name]) == 1
    told = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "how it ended" in told
    assert max(map(len, told.splitlines())) <= 80


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither run\.json"):
        status.main([str(tmp_path)])
    with pytest.raises(UserError, match="at least 1 second"):
        status.main([str(tmp_path), "--every", "0"])
    assert status.main([]) == 2


def test_a_directory_that_cannot_be_looked_into_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="xx: cannot be read: File name too long"):
        status.main(["x" * 300])
    (run / "file").touch()
    for name in (run / "file", run / "nothing"):
        with pytest.raises(UserError, match=r"neither run\.json"):
            status.main([str(name)])

    def denied(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("launch.status_facts.os.listdir", denied)
    with pytest.raises(UserError, match="run: cannot be read: Permission denied"):
        status.main([str(run)])


@pytest.mark.parametrize("odd", ["null", "[]", '"x"', "NaN", "1e999", "-1e999", "-1", "1" + "0" * 400])
def test_odd_values_are_no_traceback(run: Path, capsys: pytest.CaptureFixture[str], odd: str) -> None:
    def write(name: str, *fields: str, **fixed: Any) -> None:
        given = json.dumps(dict.fromkeys(fields, "@") | fixed).replace('"@"', odd)
        (run / name).write_text(given + "\n")

    beat(run)
    began(run)
    closed(run, at=NOW, status=75, action="requeue", step=30)
    for number in range(3):
        if number == 1:
            write(
                "heartbeat.json",
                "step",
                "steps",
                "seconds_per_step",
                "restart",
                time=NOW,
                phase="train",
                busy_s=["@", 0.1],
            )
        if number == 2:
            write("heartbeat.json", "time", "step", "steps", "phase", "job", "hosts", "busy_s")
            write("slurm/attempts.jsonl", "time", "restart", "nodes", "step", event="begin", job="7")
            write("ended.json", "step", "status")
            write("run.json", train={"steps": "@"})
        write("metrics.jsonl", "step", "loss", "pairs_per_s", "seconds_per_step")
        for words in ([], ["--json"]):
            assert status.main([str(run), *words]) in (0, 1)
    assert "Infinity" not in capsys.readouterr().out


def test_json_has_null_for_a_loss_that_is_no_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beat(run, age=NOW - time.time())
    (run / "metrics.jsonl").write_text('{"step": 5, "loss": NaN, "pairs_per_s": Infinity}\n')
    line(run, "guard.jsonl", step=5, kind="non_finite", loss=float("nan"), text="loss nan")
    assert status.main([str(run), "--json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (told["loss"], told["pairs_per_s"], told["guard"]["last"]["loss"]) == (None, None, None)
    assert status.main([str(run)]) == 0
    assert "loss nan" in capsys.readouterr().out


def test_files_that_are_broken_are_no_traceback(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run.json", "heartbeat.json", "ended.json", "metrics.jsonl", "faults.jsonl", "guard.jsonl"):
        (run / name).write_bytes(b'\xff{"step": [1, ')
    (run / "slurm/attempts.jsonl").write_text('{"event": "begin", "nodes": 5, "step": "x", "slurmd": []}\n[]\n{}\n')
    (run / "slurm/submissions.jsonl").write_text('{"jobs": 3}\n')
    assert status.main([str(run)]) in (0, 1)
    assert ": " in capsys.readouterr().out


def test_the_last_whole_line_is_found_without_reading_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "blocks": "x" * 200}) + "\n" for step in range(50)) + '{"step": 5'
    )
    assert last_line(path, window=64)["step"] == 49
    assert last_line(path)["step"] == 49
    path.write_text('{"step"')
    assert last_line(path, window=4) == {}


def test_the_slow_rank_is_the_one_that_works_long(run: Path) -> None:
    beat(run, busy_s=[0.1, 0.2, 0.1, 0.1])
    assert slow_host(gather(run, lambda: NOW).heartbeat) == {"rank": 1, "host": "n1", "busy_s": 0.2, "median_s": 0.1}
    beat(run, busy_s=[0.1, 0.14, 0.1, 0.1])
    assert slow_host(gather(run, lambda: NOW).heartbeat) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (40, "40 s"),
        (600, "10 min"),
        (12000, "3 h 20 min"),
        (180000, "2 days 2 h"),
        (-5, "0 s"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_login_node_needs_no_torch(run: Path) -> None:
    program = (
        "import sys; from launch.cli import main; run = sys.argv[1]; "
        "print([main(words) for words in (['job', 'begin', run], ['status', run], "
        "['job', 'end', run, '--status', '1'])]); "
        "print([name for name in ('torch', 'nvidia') if name in sys.modules])"
    )
    environ = os.environ | {"PATH": "", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)],
        cwd=Path(__file__).parents[2],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-2:] == ["[0, 0, 1]", "[]"], done.stderr


def test_every_state_has_an_exit_status_in_the_help() -> None:
    told = str(status.Options.__doc__)
    assert [name for name in status_state.State.__args__ if name not in told] == []
