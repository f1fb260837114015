"""A small run that any launcher starts, whose saves are slow, and which gets a signal in its third step."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# fmt: off
SMALL = [
    "--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--model.mlp-dim", "64",
    "--model.embed-dim", "16", "--image.size", "16", "--image.patch", "8", "--text.length", "8",
    "--text.vocab-size", "64", "--moe.blocks", "1", "--moe.group-pairs", "4", "--train.batch-pairs", "16",
    "--optim.warmup-steps", "2", "--optim.cooldown-steps", "2", "--log.every-steps", "1",
    "--checkpoint.every-steps", "0", "--log.no-tensorboard",
]
# fmt: on
BEFORE = ("SLURM", "OMPI", "PMIX", "PRTE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC", "LIMOE_")
"""Variables of another launcher, should the tests themselves run under one."""

# Python imports a module of this name at its start.
SITE = """
import os, sys, time
if any(name in os.environ for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")) and "limoe_dist" in sys.orig_argv:
    from limoe_dist.checkpoint import disk
    from limoe_dist.train.preemption import StopFlag
    create, on_signal = disk.create, StopFlag._on_signal
    def slow(path):
        if path.name.startswith("rank-"):
            time.sleep(float(os.environ["TEST_SAVE_SECONDS"]))
        return create(path)
    def told(self, number, frame):
        os.write(2, f"{os.getpid()} got signal {number}\\n".encode())
        on_signal(self, number, frame)
    disk.create, StopFlag._on_signal = slow, told
"""


@dataclass(frozen=True)
class Ended:
    status: int
    printed: str
    """What all processes did, in the order in which they did."""


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(BEFORE)}
    (folder / "sitecustomize.py").write_text(SITE)
    # The project's own directory too: what is imported that early does not find it by itself.
    path = os.pathsep.join([str(folder), os.getcwd()])
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TEST_SAVE_SECONDS": "0"} | more


def training(data: Path, out: Path, *words: str) -> list[str]:
    """The words of `limoe` for a run of 2 ranks."""
    return ["train", "tiny", "--data", str(data), "--out", str(out), "--parallel.ep", "2", *SMALL, *words]


def run(command: Sequence[str], environ: Mapping[str, str], *, at_step_3: Callable[[int], None] | None = None) -> Ended:
    """Runs it to its end; `at_step_3` is called once with its process number."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, start_new_session=True
    )
    assert process.stdout is not None
    seen = []
    try:
        for line in process.stdout:
            seen.append(line)
            if line.startswith("step 3/") and at_step_3 is not None:
                at_step_3(process.pid)
        return Ended(process.wait(60), "".join(seen))
    finally:
        process.kill()


def ranks_below(launcher: int) -> list[psutil.Process]:
    """The ranks among the processes that a launcher started, in the order in which it did."""
    ranks = []
    for process in psutil.Process(launcher).children(recursive=True):
        python, *words = process.cmdline() or [""]
        if Path(python).name.startswith("python") and [word for word in words if word != "-u"][:2] == [
            "-m",
            "limoe_dist",
        ]:
            ranks.append(process)
    return sorted(ranks, key=lambda rank: rank.pid)
