"""RUN/slurm: numbers of scripts, notes of submissions, and what is taken away again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
from slurm.scheduler import submit
from slurm.submissions import Draft, next_script, note, now, read


def submission(job: str, script: Path):
    return now([job], script, nodes=1, ranks=2, time_limit="1:00", requeue=False, chain=0, exclude=())


def test_scripts_are_numbered_on(tmp_path):
    assert next_script(tmp_path) == tmp_path / "slurm/001.sbatch"
    (tmp_path / "slurm").mkdir()
    for name in ("001.sbatch", "009.sbatch", "mine.sbatch"):
        (tmp_path / "slurm" / name).touch()
    assert next_script(tmp_path) == tmp_path / "slurm/010.sbatch"


def test_submissions_are_read_in_their_order_and_a_cut_line_is_passed_over(tmp_path):
    (tmp_path / "slurm").mkdir()
    script = next_script(tmp_path)
    note(tmp_path, submission("5", script))
    with (tmp_path / "slurm/submissions.jsonl").open("a") as file:
        file.write('{"time": 17, "jobs": ["')
    note(tmp_path, submission("6", script))
    assert [found.jobs for found in read(tmp_path)] == [("5",), ("6",)]


def test_nobody_submitted_where_there_is_no_file(tmp_path):
    assert read(tmp_path) == []


def test_a_draft_that_is_discarded_leaves_nothing_that_it_made(tmp_path):
    Draft(tmp_path / "runs/a/slurm/001.sbatch", "x").discard()
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_is_discarded_leaves_what_was_there_before(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.json").touch()
    Draft(tmp_path / "a/slurm/001.sbatch", "x").discard()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run.json"]


def test_two_submissions_at_once_do_not_share_a_script(tmp_path):
    script = tmp_path / "slurm/001.sbatch"
    Draft(script, "first")
    with pytest.raises(UserError, match="cannot be written"):
        Draft(script, "second")
    assert script.read_text() == "first"


@pytest.fixture
def inherited(tmp_path, monkeypatch):
    """Submits a script; returns the environment that sbatch had, and hands to the job."""

    def submitted(text: str, **environ: str) -> dict[str, str]:
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "sbatch").write_text(f"#!/bin/sh\nenv >{tmp_path}/environ\necho 5\n")
        (tools / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "a.sbatch").write_text(text)
        assert submit(tmp_path / "a.sbatch") == "5"
        lines = (tmp_path / "environ").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if line.startswith(("SLURM_", "SBATCH_", "LC_ALL")))

    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    return submitted


def test_a_job_that_is_submitted_from_a_job_is_no_step_or_restart_of_it(inherited):
    site = {"SLURM_CONF": "/etc/here", "SLURM_JWT": "t"}
    found = inherited("#!/bin/bash\n", SLURM_RESTART_COUNT="3", SLURM_STEP_NUM_TASKS="4", SLURM_JOB_ID="9", **site)
    assert found == site | {"LC_ALL": "C.UTF-8"}


def test_variables_of_sbatch_do_not_win_over_lines_that_were_shown(inherited):
    always = {f"SBATCH_{name}": "1" for name in ("TIMELIMIT", "NO_REQUEUE", "REQUEUE", "ARRAY_INX", "WAIT")}
    shown = {
        "SBATCH_SIGNAL": "B:HUP",
        "SBATCH_OPEN_MODE": "truncate",
        "SBATCH_PARTITION": "x",
        "SBATCH_MEM_PER_CPU": "1",
    }
    lines = ("signal=USR2@180", "open-mode=append", "partition=gpu", "mem=10G")
    text = "#!/bin/bash\n" + "".join(f"#SBATCH --{line}\n" for line in lines)
    assert inherited(text, **always, **shown, SBATCH_ACCOUNT="us") == {"SBATCH_ACCOUNT": "us", "LC_ALL": "C.UTF-8"}
