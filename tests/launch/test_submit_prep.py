"""`limoe submit-prep`: an array of units of work, and the job that reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from tests.launch.test_submit import calls, refused  # noqa: F401

ARRAY = ["submit-prep", "--time", "30", "--tasks", "8"]
PACK = ["--", "pack", "--source", "demo/train", "--out", "shards/web"]


def test_a_dry_run_prints_an_array_with_a_unit_for_each_index(calls, capsys):  # noqa: F811
    assert main([*ARRAY, "--concurrent", "3", "--cpus", "2", "--dry-run", *PACK]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-7%3\n" in out
    assert "#SBATCH --cpus-per-task=2\n" in out
    assert 'prep pack --source demo/train --out shards/web --unit "$SLURM_ARRAY_TASK_ID/8"' in out
    assert not Path("shards").exists()


def test_an_array_is_submitted_with_a_job_that_reports_behind_it(calls, capsys):  # noqa: F811
    assert main([*ARRAY, "--indices", "3,5", "--yes", *PACK]) == 0
    _, array, report = calls.read_text().splitlines()
    notes = Path("shards/web.slurm").absolute()
    assert array == f"--parsable {notes}/001.sbatch"
    assert report == f"--parsable --dependency=afterany:101 {notes}/001/report.sbatch"
    assert "#SBATCH --array=3,5\n" in (notes / "001.sbatch").read_text()
    text = (notes / "001/report.sbatch").read_text()
    assert "for index in 3 5; do" in text
    assert "--tasks 8 --yes --indices INDICES -- pack" in text


def test_what_slurm_refuses_leaves_nothing(calls, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("REFUSE", "sbatch: error: Invalid job array specification")
    monkeypatch.setenv("AFTER", "1")
    assert "Invalid job array specification" in refused(capsys, [*ARRAY, "--yes", *PACK])
    assert not Path("shards").exists()


def test_an_array_without_a_report_is_submitted_all_the_same(calls, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("REFUSE", "sbatch: error: QOSMaxSubmitJobPerUserLimit")
    monkeypatch.setenv("AFTER", "2")
    assert main([*ARRAY, "--yes", *PACK]) == 0
    out, err = capsys.readouterr()
    assert "submitted array 101" in out
    assert "squeue --jobs 101" in out
    assert out.endswith("scancel 101\n")
    assert "limoe: warning: no job will tell which indices failed: sbatch: QOSMaxSubmitJobPerUserLimit" in err
    report = Path("shards/web.slurm/001/report.sbatch").absolute()
    assert f"bash {report}\n" in err
    assert report.exists()


def test_a_dry_run_logs_where_there_is_a_folder(calls, capsys):  # noqa: F811
    assert main([*ARRAY, "--dry-run", *PACK]) == 0
    assert f"#SBATCH --output={Path('web.slurm-001-%a.log').absolute()}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([*ARRAY, "pack"], "comes after `--`"),
        ([*ARRAY, "--task", "3", *PACK], 'unknown option --task; did you mean "--tasks"?'),
        ([*ARRAY, "--", "dedup", "--out", "x"], "only download, pack, retry-failed can be cut"),
        ([*ARRAY, *PACK, "--unit", "0/8"], "leave it out"),
        ([*ARRAY, "--indices", "8", *PACK], "from 0 to 7"),
        ([*ARRAY, "--notes", "x" * 300, *PACK], "File name too long"),
        ([*ARRAY, *PACK, "--captions", "b\udcff"], "is no UTF-8"),
        (["submit-prep", "--time", "30", *PACK], "--tasks is missing"),
        ([*ARRAY, "--", "retry-failed", "folder"], "--notes is missing"),
        ([*ARRAY, "--", "pack", "--source", "s3://me:word@host/x", "--out", "x"], "a password in a URL"),
    ],
)
def test_what_cannot_work_is_refused(argv, reason, calls, capsys):  # noqa: F811
    assert reason in refused(capsys, argv)
    assert not calls.exists()
