"""What bash does with the rendered scripts: which commands run in which order, and what the job ends with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slurm.submissions import read
from tests.jobs.stand_ins import carried_out
from tests.jobs.test_script import array_scripts, script


def run_folder(tmp_path: Path, *, bad: str = "") -> Path:
    """bad: hosts that failed twice."""
    run = tmp_path / "my run"
    (run / "slurm").mkdir(parents=True)
    if bad:
        (run / "slurm" / "exclude").write_text(bad + "\n")
    return run


def test_the_words_of_training_arrive_as_they_were_given(tmp_path):
    run = run_folder(tmp_path)
    status, seen = carried_out(tmp_path, script(run))
    assert status == 0
    assert seen == [
        f"job begin {run}",
        f"train tiny --data shards, all/manifest.json --eval.templates a {{}} $(date) --out {run}",
        f"job end {run} --status 0",
    ]


def test_a_run_that_has_begun_goes_on(tmp_path):
    run = run_folder(tmp_path)
    (run / "run.json").touch()
    _, seen = carried_out(tmp_path, script(run))
    assert seen[1] == f"train --resume {run} --stop-after 7"


@pytest.mark.parametrize(("begin", "status"), [("10", 0), ("2", 2)])
def test_nothing_is_trained_where_nothing_is_to_be_gone_on_with(begin, status, tmp_path):
    run = run_folder(tmp_path)
    assert carried_out(tmp_path, script(run), BEGIN=begin) == (status, [f"job begin {run}"])


def test_the_status_of_training_is_passed_on_and_decides(tmp_path):
    run = run_folder(tmp_path)
    status, seen = carried_out(tmp_path, script(run, requeue=True), TRAIN="75", END="12")
    assert seen[2:] == [f"job end {run} --status 75 --requeue", "scontrol requeue 77"]
    assert status == 0


def test_a_cancelled_job_says_so_and_is_not_requeued_by_itself(tmp_path):
    run = run_folder(tmp_path)
    _, seen = carried_out(tmp_path, script(run, requeue=True), TRAIN="143", END="143", TERM_PARENT="1")
    assert seen[2:] == [f"job end {run} --status 143 --requeue --cancelled"]


def test_a_job_on_a_bad_host_is_submitted_anew_without_it(tmp_path):
    run = run_folder(tmp_path, bad="n1,n2")
    text = script(run, exclude="n[8-9]")
    status, seen = carried_out(tmp_path, text, BEGIN="11", SLURM_RESTART_COUNT="4", SLURM_CONF="here")
    assert status == 75
    assert seen[1:] == [f"sbatch --parsable --exclude=n[8-9],n1,n2 {tmp_path / 'slurm_script'}"]
    (noted,) = read(run)
    assert (noted.jobs, noted.after, noted.nodes, noted.ranks) == (("78",), "77", 2, 4)
    assert noted.exclude == ("n[8-9],n1,n2",)
    # A job inherits the environment; how often this one was restarted is not true of the next.
    inherited = (tmp_path / "seen.sbatch").read_text()
    assert "SLURM_CONF=here" in inherited
    assert "SLURM_RESTART_COUNT" not in inherited


def test_a_host_that_slurm_has_no_more_is_not_named_to_it(tmp_path):
    run = run_folder(tmp_path, bad="n1,n2,n3")
    _, seen = carried_out(tmp_path, script(run), BEGIN="11", GONE="n2")
    assert "--exclude=n1,n3 " in seen[1]


NO_OTHERS = "Batch job submission failed: Requested node configuration is not available"
AWAY = "Unable to contact slurm controller (connect failure)"


def test_a_job_without_other_hosts_trains_on_those_that_it_has(tmp_path):
    run = run_folder(tmp_path, bad="n2")
    status, seen = carried_out(tmp_path, script(run, requeue=True), BEGIN="11", SBATCH_REFUSED=NO_OTHERS)
    assert status == 0
    assert [line.split()[0] for line in seen] == ["job", "sbatch", "job", "train", "job"]
    assert read(run) == []


def test_a_job_without_other_hosts_is_requeued_at_its_end(tmp_path):
    run = run_folder(tmp_path, bad="n2")
    status, seen = carried_out(tmp_path, script(run, requeue=True), TRAIN="1", END="11", SBATCH_REFUSED=NO_OTHERS)
    assert (status, seen[-1]) == (0, "scontrol requeue 77")
    assert read(run) == []


def test_a_chain_without_other_hosts_is_left_as_it_is(tmp_path):
    run = run_folder(tmp_path, bad="n2")
    (run / "slurm" / "001.jobs").write_text("77\n78\n")
    status, seen = carried_out(tmp_path, script(run, chain=2), TRAIN="1", END="11", SBATCH_REFUSED=NO_OTHERS)
    assert status == 1
    assert seen[3:] == [f"sbatch --test-only --exclude=n2 {tmp_path / 'slurm_script'}"]


def test_the_last_of_a_chain_trains_on_a_bad_host(tmp_path):
    run = run_folder(tmp_path, bad="n2")
    (run / "slurm" / "001.jobs").write_text("76\n77\n")
    status, seen = carried_out(tmp_path, script(run, chain=2), BEGIN="11")
    assert status == 0
    assert any(line.startswith("train ") for line in seen)


@pytest.mark.parametrize("end", ["11", "12"])
def test_a_controller_that_is_away_is_waited_for(end, tmp_path):
    run = run_folder(tmp_path, bad="n2")
    refusals = {"SBATCH_REFUSED": AWAY, "SCONTROL_REFUSED": AWAY, "TIMES": "2"}
    status, seen = carried_out(tmp_path, script(run, requeue=True), TRAIN="75", END=end, **refusals)
    call = "scontrol requeue 77" if end == "12" else f"sbatch --parsable --exclude=n2 {tmp_path / 'slurm_script'}"
    assert seen[3:] == [call, "sleep 10", call, "sleep 10", call]
    assert status == (0 if end == "12" else 75)
    assert len(read(run)) == (end == "11")


def test_a_site_that_forbids_requeueing_is_not_asked_again(tmp_path):
    run = run_folder(tmp_path)
    forbids = "Requested operation is presently disabled for job 77"
    status, seen = carried_out(tmp_path, script(run, requeue=True), TRAIN="75", END="12", SCONTROL_REFUSED=forbids)
    assert (status, seen[3:]) == (75, ["scontrol requeue 77"])


def test_a_job_that_is_cancelled_while_it_waits_for_the_controller_is_not_requeued(tmp_path):
    run = run_folder(tmp_path)
    environ = {"TRAIN": "75", "END": "12", "SCONTROL_REFUSED": AWAY, "TERM_IN_SLURM": "1"}
    status, seen = carried_out(tmp_path, script(run, requeue=True), **environ)
    assert (status, seen.count("scontrol requeue 77")) == (75, 1)


def test_a_script_that_was_handed_in_by_hand_makes_the_folder_of_the_run_and_puts_itself_there(tmp_path):
    run = tmp_path / "run"
    status, _ = carried_out(tmp_path, script(run))
    assert status == 0
    assert (run / "slurm" / "001.sbatch").read_text() == (tmp_path / "slurm_script").read_text()
    # A script that is there is a person's, and may have been changed.
    (run / "slurm" / "001.sbatch").write_text("mine")
    again = tmp_path / "again"
    again.mkdir()
    carried_out(again, script(run))
    assert (run / "slurm" / "001.sbatch").read_text() == "mine"


def test_in_a_chain_the_jobs_that_are_left_get_other_hosts(tmp_path):
    run = run_folder(tmp_path, bad="n1")
    (run / "slurm" / "001.jobs").write_text("76\n77\n78\n79\n")
    status, seen = carried_out(tmp_path, script(run, chain=4), TRAIN="1", END="11")
    assert status == 75
    assert seen[4:] == [f"scontrol update JobId={job} ExcNodeList=n1" for job in (78, 79)]


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [("0", "", False), ("7", "", True), ("7", "1", True), ("7", "2", False), ("2", "", False)],
)
def test_an_index_that_fails_is_tried_twice_more_unless_a_person_has_to_mend_it(status, restarts, again, tmp_path):
    notes = tmp_path / "001"
    notes.mkdir()
    environ = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "70", "TRAIN": status}
    environ |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    ended, seen = carried_out(tmp_path, array_scripts(notes)[0], **environ)
    assert ended == int(status)
    assert seen == ["prep pack --source x y --out a b --unit 3/4"] + ["scontrol requeue 70_3"] * again
    assert [path.read_text() for path in notes.glob("3")] == [f"{status}\n"] * (not again)


def test_the_report_names_the_indices_that_failed_and_the_command_that_submits_them(tmp_path):
    for index, status in (("0", "0"), ("1", "2"), ("2", "0")):
        (tmp_path / index).write_text(status + "\n")
    done = subprocess.run(["bash"], input=array_scripts(tmp_path)[1], text=True, capture_output=True)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[-1] == (
        "failed: 2 of 4 indices: 1,3; again: limoe submit-prep --tasks 4 --indices 1,3 -- pack --out 'a b'"
    )
    assert "index 3: status none" in lines[1]
    for index in ("1", "3"):
        (tmp_path / index).write_text("0\n")
    done = subprocess.run(["bash"], input=array_scripts(tmp_path)[1], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "done: 4 of 4 indices\n")


def test_an_index_is_requeued_when_the_controller_is_back(tmp_path):
    notes = tmp_path / "001"
    environ = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "70", "TRAIN": "7", "SCONTROL_REFUSED": AWAY}
    ended, seen = carried_out(tmp_path, array_scripts(notes)[0], TIMES="1", **environ)
    assert (ended, seen[1:]) == (7, ["scontrol requeue 70_3", "sleep 10", "scontrol requeue 70_3"])
    # Handed in by hand, it makes the folder for what it notes; an index that comes again has not ended.
    assert list(notes.iterdir()) == []
