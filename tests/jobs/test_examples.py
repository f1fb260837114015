"""The plain scripts in slurm/: they name real commands and options, and bash can read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data_prep.cli import COMMANDS as PREP
from launch.cli import COMMANDS
from tests.jobs.stand_ins import carried_out

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


TRAIN = (Path(__file__).parents[2] / "slurm" / "train.sbatch").read_text()


def trained(tmp_path: Path, **environ: str) -> tuple[int, list[str]]:
    names = {"LIMOE": str(tmp_path / "bin/limoe"), "RUN": "run", "DATA": "data", "SLURM_CPUS_PER_TASK": "2"}
    return carried_out(tmp_path, TRAIN, **names, **environ)


def test_training_that_failed_twice_on_a_host_goes_on_there(tmp_path):
    status, seen = trained(tmp_path, TRAIN="1", END="11")
    assert (status, seen[-1]) == (0, "scontrol requeue 77")
    (tmp_path / "again").mkdir()
    status, seen = trained(tmp_path / "again", BEGIN="11")
    assert status == 0
    assert seen == ["job begin run"] * 2 + ["train b16 --data data --out run", "job end run --status 0 --requeue"]


def test_training_is_requeued_when_the_controller_is_back(tmp_path):
    status, seen = trained(tmp_path, TRAIN="75", END="12", SCONTROL_REFUSED="Unable to contact slurm", TIMES="1")
    assert (status, seen[3:]) == (0, ["scontrol requeue 77", "sleep 10", "scontrol requeue 77"])


def test_training_that_was_cancelled_is_not_requeued(tmp_path):
    status, seen = trained(tmp_path, TRAIN="75", END="12", SCONTROL_REFUSED="Unable to contact", TERM_IN_SLURM="1")
    assert (status, seen.count("scontrol requeue 77")) == (75, 1)
