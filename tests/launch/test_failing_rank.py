"""One rank of `limoe train` fails in the middle of training: what a user sees first, whoever started the ranks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_train_command import SMALL
from tests.support.shards import write_shards

# Python imports a module of this name at its start. The third backward pass of rank 1 fails as TEST_FAULT says.
FAULT = """
import os, signal
if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    import torch
    original, passes = torch.autograd.backward, []
    def backward(*positional, **named):
        passes.append(1)
        if len(passes) == 3:
            if os.environ["TEST_FAULT"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("planted")
        return original(*positional, **named)
    torch.autograd.backward = backward
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), rows=64)


def beside_python(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"the environment has no {name}: pip install -r requirements.txt"
    return found


def train(launcher: str, data: Path, folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(FAULT)
    module = ["-m", "limoe_dist", "train", "tiny", "--data", str(data), "--out", str(folder / "run")]
    module += [*SMALL, "--train.steps", "1000", "--parallel.ep", "2"]
    limoe = [sys.executable, *module]
    command = {
        "--ranks": [*limoe, "--ranks", "2"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *module],
        "mpirun": [beside_python("mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", *limoe],
    }[launcher]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMIX", "RANK", "WORLD_SIZE"))}
    environ |= {"PYTHONPATH": str(folder), "TEST_FAULT": fault, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)


@pytest.mark.parametrize("launcher", ["--ranks", "torchrun", "mpirun"])
def test_the_failing_ranks_traceback_comes_first_and_all_ranks_end(launcher: str, tmp_path: Path, data: Path) -> None:
    done = train(launcher, data, tmp_path, "raises")
    assert done.returncode == 1, done.stderr
    host = socket.gethostname()
    failed = done.stderr.index(f"limoe: rank 1 (host {host}) failed:\nTraceback (most recent call last):\n")
    # torchrun warns about threads before any rank is started.
    assert "Traceback" not in done.stderr[:failed]
    assert "limoe: " not in done.stderr[:failed]
    planted = done.stderr.index("KeyError: 'planted'")
    assert "in training_step" in done.stderr[failed:planted]
    # A launcher that is quick ends rank 0 before it can say why it ends.
    lines = [line for line in done.stderr[planted:].splitlines() if line.startswith("limoe: ")]
    assert lines in ([], [f"limoe: rank 0 (host {host}) ends because rank 1 (host {host}) failed with KeyError"])
    # torchrun shows where it failed itself, after that.
    assert done.stderr.count("Traceback") == (2 if launcher == "torchrun" else 1)


def test_a_killed_rank_is_named_by_the_launcher_too(tmp_path: Path, data: Path) -> None:
    done = train("--ranks", data, tmp_path, "killed")
    assert done.returncode == 1, done.stderr
    assert "limoe: error: rank 1 was ended by signal 9 (SIGKILL)" in done.stderr
    assert "train.stop_grace_s" not in done.stderr
