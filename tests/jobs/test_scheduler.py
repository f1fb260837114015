"""What Slurm's commands print, recorded from Slurm 22.05.8 with two nodes, and what is made of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
from slurm import scheduler
from slurm.scheduler import Past, Queued, duration, history, known, nodes, queue, submit

SQUEUE = """\
2|PENDING|1795368169|1795368769|10:00||Resources
3|PENDING|N/A|N/A|5:00||Dependency
1|RUNNING|1795367618|1795368218|1-09:58:00|n[1-2]|None
6|PENDING|1795367857|1795367857|UNLIMITED||Nodes required for job are DOWN, DRAINED or reserved
"""
SACCT = """\
1|NODE_FAIL|0:0|1795367618|1795367642|n[1-2]
1|CANCELLED by 0|0:15|1795367644|1795367700|n[1-2]
2|PENDING|0:0|Unknown|Unknown|None assigned
"""
UP = (
    "NodeName=n1 Arch=x86_64 CoresPerSocket=64  CPUAlloc=64 CPUTot=64 Gres=gpu:h100:8 NodeAddr=n1 NodeHostName=n1 "
    "Version=22.05.8 OS=Linux 6.18.44 #1 SMP  State=ALLOCATED ThreadsPerCore=1 Partitions=main,low,lowg  "
    "BootTime=1795309855 SlurmdStartTime=1795367541 LastBusyTime=1795367617 AllocTRES=cpu=64,mem=62.50G\n"
)
DOWN = (
    "NodeName=n2 Arch=x86_64 NodeHostName=n2 State=DOWN+NOT_RESPONDING ThreadsPerCore=1 BootTime=1795309855 "
    "SlurmdStartTime=1795367541 LastBusyTime=1795367642 Reason=Not responding [root@1795367642]\n"
)
DRAINED = (
    "NodeName=n3 NodeHostName=n3 State=IDLE+DRAIN ThreadsPerCore=1 BootTime=1795309855 SlurmdStartTime=1795367541 "
    "Reason=a | b c=d State=IDLE [root@1795367626]\n"
)
REFUSALS = [
    (
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
        "invalid partition specified: nope; Batch job submission failed: Invalid partition name specified",
    ),
    (
        "sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information\n",
        "unrecognized option '--bogus'",
    ),
    (
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n",
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
    ),
    (
        "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
        "sbatch: error: fetch_config: DNS SRV lookup failed\n"
        "sbatch: fatal: Could not establish a configuration source\n",
        "Could not establish a configuration source",
    ),
]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a command that prints a recorded answer; returns the file that holds what it was called with."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(name: str, stdout: str = "", stderr: str = "", status: int = 0) -> Path:
        (tmp_path / "out").write_text(stdout)
        (tmp_path / "err").write_text(stderr)
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\necho "$*" > {tmp_path}/words\nenv > {tmp_path}/environ\n'
            f"cat {tmp_path}/out\ncat {tmp_path}/err >&2\nexit {status}\n"
        )
        script.chmod(0o755)
        return tmp_path / "words"

    return make


def test_the_queue_tells_state_reason_times_and_nodes(command):
    words = command("squeue", SQUEUE)
    found = queue(["1", "2", "3", "6", "99"])
    assert "--jobs=1,2,3,6,99" in words.read_text()
    # 1 day, 9 h 58 min: 86400 + 9 * 3600 + 58 * 60
    assert found["1"] == Queued("1", "RUNNING", "", 1795367618.0, 1795368218.0, 122280.0, "n[1-2]")
    assert found["1"].runs
    assert found["2"].waits
    assert (found["2"].reason, found["2"].start, found["2"].nodes) == ("Resources", 1795368169.0, "")
    assert (found["3"].start, found["3"].left_s) == (None, 300.0)
    assert found["6"].left_s is None
    assert found["6"].reason == "Nodes required for job are DOWN, DRAINED or reserved"
    assert "99" not in found


def test_a_job_that_the_controller_forgot_is_no_error(command):
    command("squeue", stderr="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert queue(["99"]) == {}


def test_times_and_filters_of_the_user_do_not_change_the_answers(command, monkeypatch, tmp_path):
    for name in ("SLURM_TIME_FORMAT", "SQUEUE_FORMAT", "SQUEUE_STATES", "SQUEUE_USERS"):
        monkeypatch.setenv(name, "relative")
    monkeypatch.setenv("SLURM_CONF", "a.conf")
    command("squeue", SQUEUE)
    queue(["1"])
    environ = (tmp_path / "environ").read_text()
    assert "SLURM_TIME_FORMAT=%s\n" in environ
    assert "SLURM_CONF=a.conf\n" in environ
    assert "SQUEUE_" not in environ


def test_nothing_is_asked_about_no_jobs_and_no_nodes(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert (queue([]), history([]), nodes([])) == ({}, [], {})


def test_the_accounting_has_an_entry_for_each_restart(command):
    command("sacct", SACCT)
    found = history(["1", "2"])
    assert found[0] == Past("1", "NODE_FAIL", "0:0", 1795367618.0, 1795367642.0, "n[1-2]")
    assert (found[1].state, found[1].exit) == ("CANCELLED", "0:15")
    assert (found[2].start, found[2].nodes) == (None, "")


def test_a_site_without_accounting_has_no_history(command):
    command("sacct", stderr="Slurm accounting storage is disabled\n", status=1)
    assert history(["1"]) == []


def test_a_node_is_lost_by_its_state_and_not_by_its_reason(command):
    words = command("scontrol", UP + DOWN + DRAINED)
    found = nodes(["n1", "n2", "n3"])
    assert "show node n1,n2,n3" in words.read_text()
    assert {name: node.lost for name, node in found.items()} == {"n1": False, "n2": True, "n3": False}
    assert found["n2"].states == {"DOWN", "NOT_RESPONDING"}
    assert found["n3"].states == {"IDLE", "DRAIN"}
    assert (found["n1"].slurmd_start, found["n1"].boot) == (1795367541.0, 1795309855.0)


@pytest.mark.parametrize(
    ("times", "preempted"),
    [
        ("StartTime=1795372681 EndTime=1795372788 PreemptEligibleTime=1795372681 PreemptTime=1795372768", True),
        ("StartTime=1795372780 EndTime=1795376380 PreemptEligibleTime=1795372780 PreemptTime=None", False),
        # Of the start before.
        ("StartTime=1795372780 EndTime=1795376380 PreemptTime=1795372768", False),
        ("StartTime=1795372780 EndTime=1795376380", False),
    ],
)
def test_a_preemption_is_told_by_its_time(command, times, preempted):
    words = command("scontrol", f"JobId=1 JobName=a JobState=RUNNING Reason=None {times} Partition=lowg\n")
    assert scheduler.is_preempted("1") is preempted
    assert words.read_text().split()[-3:] == ["show", "job", "1"]


def test_an_unknown_node_is_left_out_and_a_controller_that_is_off_is_an_error(command):
    command("scontrol", UP, "Node nope not found\n", status=1)
    assert list(nodes(["n1", "nope"])) == ["n1"]
    command("scontrol", "Node nope not found\n", status=1)
    assert nodes(["nope"]) == {}
    off = "slurm_load_node error: Unable to contact slurm controller (connect failure)\n"
    command("scontrol", stderr=off, status=1)
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        nodes(["n1"])
    assert known(lambda: nodes(["n1"])) is None


def test_a_submission_returns_the_number_of_the_job(command):
    words = command("sbatch", "42;cluster\n")
    assert submit(Path("a.sbatch"), dependency="afterany:41", exclude="n1,n2", options=("--nice",)) == "42"
    assert words.read_text().split() == [
        "--parsable",
        "--nice",
        "--dependency=afterany:41",
        "--exclude=n1,n2",
        "a.sbatch",
    ]


def test_a_trial_submission_returns_where_it_could_start(command):
    line = "Job 7 to start at 2026-11-22T23:04:49 using 2 processors on nodes n[1-2] in partition main"
    words = command("sbatch", stderr=f"sbatch: {line}\n")
    assert submit(Path("a.sbatch"), test_only=True) == line
    assert "--test-only" in words.read_text()


@pytest.mark.parametrize(("printed", "told"), REFUSALS)
def test_a_refusal_is_one_line_with_slurms_reason(command, printed, told):
    command("sbatch", stderr=printed, status=1)
    with pytest.raises(UserError) as caught:
        submit(Path("a.sbatch"))
    assert str(caught.value) == f"sbatch: {told}"


def test_an_answer_that_is_no_number_is_not_taken_for_one(command):
    command("sbatch", "Submitted\n")
    with pytest.raises(UserError, match="no number of a job"):
        submit(Path("a.sbatch"))


def test_a_missing_command_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch on PATH"):
        submit(Path("a.sbatch"))
    assert known(lambda: queue(["1"])) is None


def test_a_controller_that_does_not_answer_is_not_waited_for(command, tmp_path, monkeypatch):
    command("squeue")
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(scheduler, "TIMEOUT_S", 0.2)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"squeue had no answer from Slurm's controller in 0\.2 s"):
        queue(["1"])
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("text", "seconds"), [("9:58", 598), ("1:00:00", 3600), ("2-00:00:01", 172801), ("UNLIMITED", None), ("N/A", None)]
)
def test_a_duration_is_read_as_seconds(text, seconds):
    assert duration(text) == seconds
