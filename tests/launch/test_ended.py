"""`limoe ended RUN`: the status of a run whose launcher made another one of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from limoe_dist.config.exit_codes import DONE, FAILED, GO_ON, GUARDED, MEND
from limoe_dist.train.folder import Claim, Ended, note_end


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("ended", "line"),
    [
        (Ended(step=9, signal=0, status=DONE), "ended at step 9, as asked for (status 0)"),
        (Ended(step=7, signal=12, status=GO_ON), "ended at step 7, after signal 12 (status 75)"),
        (Ended(step=5, signal=0, status=GUARDED, reason="3 spikes"), "ended at step 5, 3 spikes (status 3)"),
    ],
)
def test_the_status_is_that_of_the_run(ended: Ended, line: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note_end(run, ended)
    assert main(["ended", str(run)]) == ended.status
    assert capsys.readouterr().out == line + "\n"


def test_a_run_that_was_killed_has_failed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ended", str(run)]) == FAILED
    assert "its ranks were killed or failed before the run had ended" in capsys.readouterr().err


def test_a_run_that_still_trains_has_not_ended(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Claim(run / "lock"):
        assert main(["ended", str(run)]) == FAILED
    assert "is being trained by process" in capsys.readouterr().err


def test_another_folder_is_told_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ended", str(tmp_path)]) == MEND
    assert "there is no run.json" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import sys, launch.ended, launch.supervisor, launch.launchers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
