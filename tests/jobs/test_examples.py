"""The plain scripts in slurm/: they name real commands and options, and bash can read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data_prep.cli import COMMANDS as PREP
from launch.cli import COMMANDS

EXAMPLES = sorted((Path(__file__).parents[2] / "slurm").glob("*.sbatch"))


def test_there_is_one_for_each_kind_of_job():
    assert [path.stem for path in EXAMPLES] == ["evaluate", "prepare-array", "tokenizer", "train"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_bash_can_read_it(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_shellcheck_finds_nothing(path):
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_calls_commands_that_exist(path):
    called = re.findall(r'"\$\{limoe\[@\]\}" (\w+)(?: (\w+))?|train=\((train)', path.read_text())
    names = [(first or third, second) for first, second, third in called]
    assert names
    for command, sub in names:
        assert command in COMMANDS
        assert command != "prep" or sub in PREP
