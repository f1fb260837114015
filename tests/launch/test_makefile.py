"""`make setup` names what a machine lacks; a whole set-up is what `make test` itself ran in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _setup(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    """`make setup` in a folder without .venv."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=folder, capture_output=True, text=True)


def _python(folder: Path, fails_at: str) -> str:
    """A python that ends with 1 where the code it is given names `fails_at`, and calls itself 3.11."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\ncase "$2" in *{fails_at}*) exit 1;; *print*) echo python3.11-venv;; esac\n')
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("fails_at", "said"),
    [
        (
            "sys.exit",
            "is older than Python 3.11: sudo apt install python3.11 python3.11-venv, then make PYTHON=python3.11",
        ),
        ("ensurepip", "cannot make environments: sudo apt install python3.11-venv"),
    ],
)
def test_a_python_that_will_not_do_is_named_with_its_cure(tmp_path: Path, fails_at: str, said: str) -> None:
    done = _setup(tmp_path, _python(tmp_path, fails_at))
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_missing_python_is_named_with_its_cure(tmp_path: Path) -> None:
    done = _setup(tmp_path, "python-that-is-not-there")
    assert done.returncode == 2
    assert "python-that-is-not-there was not found: sudo apt install python3 python3-venv" in done.stderr


def test_a_finished_set_up_is_done_again_only_for_other_requirements_or_another_place(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / ".venv").mkdir(parents=True)
    python = _python(tmp_path, "ensurepip")
    _setup(folder, python)
    (folder / ".venv" / ".installed").write_text(f"{folder}\n")
    again = ["make", "setup", f"PYTHON={python}"]
    assert subprocess.run(again, cwd=folder, capture_output=True).returncode == 0
    moved = folder.rename(tmp_path / "moved")
    assert subprocess.run(again, cwd=moved, capture_output=True).returncode == 2
    (moved / ".venv" / ".installed").write_text(f"{moved}\n")
    assert subprocess.run(again, cwd=moved, capture_output=True).returncode == 0
    # A clock tick may not pass between the two files: the later time is set, not waited for.
    later = (moved / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(moved / "requirements.txt", (later, later))
    assert subprocess.run(again, cwd=moved, capture_output=True).returncode == 2
