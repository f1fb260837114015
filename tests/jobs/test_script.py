"""The rendered scripts: what Slurm is asked for, and what bash does with them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
from slurm.options import Array, Job
from slurm.script import Preparation, Training, render_preparation, render_training
from slurm.submissions import read

JOB = Job(time="1-12", nodes=2, gpus_per_node=0, ranks_per_node=2)
VARIANTS = {
    "once": {},
    "requeue": {"requeue": True, "exclude": "n[3-4],n9", "env": ("GREETING=a b'c",), "modules": ("cuda/12.4",)},
    "chain": {"chain": 3, "mem": "10G", "sbatch": ("reservation=on friday", "exclusive")},
    "gpus": {"gpus_per_node": 4, "ranks_per_node": 0, "signal": "TERM"},
    "pyxis": {"container": "pyxis", "container_image": "limoe.sqsh", "mounts": ("/data", "/a:/b")},
    "apptainer": {"container": "apptainer", "container_image": "limoe.sif", "gpus_per_node": 2, "ranks_per_node": 2},
}


def training(run: Path) -> Training:
    return Training(
        run=run,
        script=run / "slurm" / "001.sbatch",
        start=("tiny", "--data", "shards, all/manifest.json", "--eval.templates", "a {}", "$(date)"),
        go_on=("--stop-after", "7"),
        threads=3,
        cpus_per_rank=4,
        before_s=180,
        wait_s=120,
        folder=Path("/somewhere"),
        mounts=(str(run.parent),),
    )


def script(run: Path, **changes: object) -> str:
    return render_training(replace(JOB, **changes), training(run))


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def array_scripts(notes: Path) -> tuple[str, str]:
    array = Array(time="30", tasks=4, concurrent=2, cpus=3, env=("A=1",), partition="cpu")
    again = "limoe submit-prep --tasks 4 --indices INDICES -- pack --out 'a b'"
    words = ("pack", "--source", "x y", "--out", "a b")
    return render_preparation(array, Preparation(words, notes.with_suffix(".sbatch"), notes, Path("/from here"), again))


@pytest.mark.parametrize("name", VARIANTS)
def test_bash_can_read_every_script(name, tmp_path):
    text = script(tmp_path / "my run", **VARIANTS[name])
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_can_read_the_scripts_of_an_array(tmp_path):
    for text in array_scripts(tmp_path / "001"):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_slurm_is_asked_for_a_task_for_each_rank_and_a_signal_to_them():
    lines = directives(script(Path("/runs/first"), gpus_per_node=4, ranks_per_node=0))
    assert lines == [
        "--job-name=limoe-first",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=4",
        "--time=1-12:00:00",
        "--chdir=/somewhere",
        "--output=/runs/first/slurm/job-%j.log",
        "--open-mode=append",
        "--signal=USR2@180",
        "--no-requeue",
    ]


def test_options_stand_in_the_script_and_blanks_are_quoted():
    lines = directives(script(Path("/runs/my run"), **VARIANTS["chain"]))
    assert {"--mem=10G", '--reservation="on friday"', "--exclusive", '--job-name="limoe-my run"'} <= set(lines)
    assert '--output="/runs/my run/slurm/job-%j.log"' in lines
    assert "--requeue" in directives(script(Path("/runs/first"), requeue=True))


def test_no_directive_comes_after_the_first_command():
    for changes in VARIANTS.values():
        lines = script(Path("/runs/first"), **changes).splitlines()
        last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
        assert all(line.startswith("#") or not line for line in lines[: last + 1])


def test_a_path_that_sbatch_would_change_is_refused():
    with pytest.raises(UserError, match="holds '%'"):
        script(Path("/runs/100%"))


FAKE_SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
FAKE_LIMOE = """#!/bin/bash
printf '%s\\n' "$*" >>"$SEEN"
case "$1 $2" in
    "job begin") exit "${BEGIN:-0}" ;;
    "job end") exit "${END:-0}" ;;
esac
[[ -v TERM_PARENT ]] && kill -TERM "$PARENT"
exit "${TRAIN:-0}"
"""


def carried_out(tmp_path: Path, text: str, **environ: str) -> tuple[int, list[str]]:
    """Runs a script with stand-ins for limoe and Slurm; its status, and what they were called with, in order."""
    tools = tmp_path / "bin"
    tools.mkdir()
    seen = tmp_path / "seen"
    fakes = {"srun": FAKE_SRUN, "limoe": FAKE_LIMOE}
    for name in ("sbatch", "scontrol"):
        fakes[name] = f'#!/bin/bash\nprintf "{name} %s\\n" "$*" >>"$SEEN"\necho 78\n'
    for name, content in fakes.items():
        (tools / name).write_text(content)
        (tools / name).chmod(0o755)
    lines = [f"limoe=({tools / 'limoe'})" if line.startswith("limoe=(") else line for line in text.splitlines()]
    given = {"PATH": f"{tools}:{os.environ['PATH']}", "SEEN": str(seen), "SLURM_JOB_ID": "77"} | environ
    body = "export PARENT=$$\n" + "\n".join(lines)
    done = subprocess.run(["bash"], input=body, text=True, capture_output=True, env=given)
    assert "unbound variable" not in done.stderr
    return done.returncode, seen.read_text().splitlines()


def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "my run"
    (run / "slurm").mkdir(parents=True)
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
    assert seen[2:] == [f"job end {run} --status 143 --cancelled --requeue"]


def test_a_job_on_a_bad_host_is_submitted_anew_without_it(tmp_path):
    run = run_folder(tmp_path)
    (run / "slurm" / "exclude").write_text("n1,n2\n")
    status, seen = carried_out(tmp_path, script(run, exclude="n[8-9]"), BEGIN="11", SLURM_RESTART_COUNT="4")
    assert status == 75
    assert seen[1:] == [f"sbatch --parsable --exclude=n1,n2,n[8-9] {run / 'slurm/001.sbatch'}"]
    (noted,) = read(run)
    assert (noted.jobs, noted.after, noted.nodes, noted.ranks) == (("78",), "77", 2, 4)
    assert noted.exclude == ("n1,n2,n[8-9]",)


def test_in_a_chain_the_jobs_that_are_left_get_other_hosts(tmp_path):
    run = run_folder(tmp_path)
    (run / "slurm" / "exclude").write_text("n1\n")
    (run / "slurm" / "001.jobs").write_text("76\n77\n78\n79\n")
    status, seen = carried_out(tmp_path, script(run, chain=4), TRAIN="1", END="11")
    assert status == 75
    assert seen[3:] == [f"scontrol update JobId={job} ExcNodeList=n1" for job in (78, 79)]


def test_a_container_is_entered_by_srun_or_by_apptainer():
    inside = script(Path("/runs/first"), **VARIANTS["pyxis"])
    assert "--container-image=limoe.sqsh '--container-mounts=/runs:/runs,/data:/data,/a:/b'" in inside
    assert '"${ranks_limoe[@]}" "${train[@]}"' in inside
    assert "apptainer exec --nv --bind /runs limoe.sif limoe" in script(Path("/runs/first"), **VARIANTS["apptainer"])


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [("0", "", False), ("7", "", True), ("7", "1", True), ("7", "2", False), ("2", "", False)],
)
def test_an_index_that_fails_is_tried_twice_more_unless_a_person_has_to_mend_it(status, restarts, again, tmp_path):
    notes = tmp_path / "001"
    notes.mkdir()
    environ = {"SLURM_ARRAY_TASK_ID": "3", "TRAIN": status} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    ended, seen = carried_out(tmp_path, array_scripts(notes)[0], **environ)
    assert ended == int(status)
    assert seen == ["prep pack --source x y --out a b --unit 3/4"] + ["scontrol requeue 77"] * again
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
