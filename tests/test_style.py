"""The checks that a push runs, as tests: lint, format, types; and what must not be left in the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("limoe_dist", "launch", "data_prep", "slurm", "tests")
# Spelled so that this file does not match itself.
LEFT_OVER = re.compile(r"\bTO[D]O\b|\bFIX[M]E\b|\bXX[X]\b|/(?:home|root|Users|work)/\w")


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_code_passes(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_no_file_holds_a_reminder_or_the_path_of_somebodys_machine():
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert Path(__file__) in files
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if LEFT_OVER.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("line", ["# TO" + "DO later", "open('/ho" + "me/somebody/x')"])
def test_a_left_over_is_seen(line):
    assert LEFT_OVER.search(line)
