"""RUN/slurm: numbers of scripts, notes of submissions, and what is taken away again."""

from __future__ import annotations

from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
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
