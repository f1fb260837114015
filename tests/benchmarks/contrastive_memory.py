"""Memory of the contrastive loss and its backward, with and without chunks of columns, and what chunks cost in time.

python -m tests.benchmarks.contrastive_memory --out docs/measured/contrastive_memory.json

Memory: every case runs in a process of its own on one thread. Its peak is the most memory that was resident (VmHWM of
Linux) less what was resident (VmRSS) when the embeddings stood ready: gradients count, embeddings do not. Time: loss
and backward at one size where both ways fit, in turns, so that a slow moment of the machine meets both; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limoe_dist.equations.contrastive import Contrastive, contrastive_loss, normalize

WIDTH = 64
CHUNK = 1024
REPEATS = 9
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Case:
    local: int
    """Pairs b of this rank."""
    batch: int
    """Pairs B of all ranks: columns of the logits."""
    chunk: int


# 21,504 pairs are 128 ranks of 168.
MEMORY_CASES = {
    "all pairs on one rank, in chunks": Case(local=21_504, batch=21_504, chunk=CHUNK),
    "168 pairs of 21,504, all columns at once": Case(local=168, batch=21_504, chunk=0),
    "168 pairs of 21,504, in chunks": Case(local=168, batch=21_504, chunk=CHUNK),
}
TIME_CASE = Case(local=2_048, batch=4_096, chunk=CHUNK)


def embeddings(case: Case) -> list[Tensor]:
    """Local images and texts (b, P), all images and texts (B, P), and scale: float32 leaves."""
    random = torch.Generator().manual_seed(0)
    all_BP = [normalize(torch.randn(case.batch, WIDTH, generator=random)) for _ in range(2)]
    leaves = [*(rows_BP[: case.local].clone() for rows_BP in all_BP), *all_BP, torch.tensor(10.0)]
    return [leaf.requires_grad_() for leaf in leaves]


def loss_and_backward(leaves: list[Tensor], chunk: int) -> Contrastive:
    result = contrastive_loss(*leaves[:4], first=0, scale=leaves[4], chunk=chunk)
    result.loss.backward()
    return result


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since the process began) of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024


def peak_bytes(case: Case) -> int:
    """What loss and backward add to this process, gradients of the embeddings included."""
    # Threads and buffers of the matrix library come with its first use and are nobody's logits.
    loss_and_backward(embeddings(Case(local=64, batch=64, chunk=case.chunk)), case.chunk)
    leaves = embeddings(case)
    before = resident_bytes("VmRSS")
    loss_and_backward(leaves, case.chunk)
    return resident_bytes("VmHWM") - before


def memory_figures(name: str) -> dict[str, Any]:
    """The peak of a case, from a new process, against its matrices and its gradients."""
    case = MEMORY_CASES[name]
    command = [sys.executable, "-m", "tests.benchmarks.contrastive_memory", "--case", name]
    # Each larger tensor in a mapping of its own: otherwise what earlier tensors left with glibc would serve uncounted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
    columns = min(case.chunk or case.batch, case.batch)
    return {
        **asdict(case),
        "peak_bytes": peak,
        "matrix_in_memory_bytes": case.local * columns * FLOAT_BYTES,
        "gradients_bytes": 2 * (case.local + case.batch) * WIDTH * FLOAT_BYTES,
        "whole_matrix_bytes": case.batch * case.batch * FLOAT_BYTES,
        "peak_over_whole_matrix": round(peak / case.batch**2 / FLOAT_BYTES, 4),
    }


@dataclass(frozen=True)
class Turn:
    wall_s: float
    user_s: float
    system_s: float
    """Of the kernel, which mostly clears the pages of new tensors."""
    loss: float


def turn(leaves: list[Tensor], chunk: int) -> Turn:
    """One loss and backward."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    loss = loss_and_backward(leaves, chunk).loss.item()
    wall_s, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return Turn(wall_s, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, loss)


def medians(turns: list[Turn]) -> dict[str, float]:
    return {
        name: round(statistics.median(getattr(turn, name) for turn in turns), 4)
        for name in ("wall_s", "user_s", "system_s")
    }


def time_figures() -> dict[str, Any]:
    """Medians of both ways, in turns, after one turn that does not count."""
    leaves = embeddings(TIME_CASE)
    pairs = [(turn(leaves, TIME_CASE.chunk), turn(leaves, 0)) for _ in range(REPEATS + 1)][1:]
    chunked, whole = (medians([pair[way] for pair in pairs]) for way in (0, 1))
    ratios = [in_chunks.wall_s / at_once.wall_s for in_chunks, at_once in pairs]
    return {
        **asdict(TIME_CASE),
        "turns": REPEATS,
        "in_chunks": chunked,
        "all_at_once": whole,
        "chunked_over_whole": round(chunked["wall_s"] / whole["wall_s"], 3),
        "lowest_and_highest_ratio_of_a_turn": [round(min(ratios), 3), round(max(ratios), 3)],
        "chunked_over_whole_user": round(chunked["user_s"] / whole["user_s"], 3),
        "difference_of_losses": abs(pairs[0][0].loss - pairs[0][1].loss),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path)
    what.add_argument("--case", choices=MEMORY_CASES, help="print the peak bytes of this process for one case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        print(peak_bytes(MEMORY_CASES[options.case]))
        return 0
    found: dict[str, Any] = {
        "command": "python -m tests.benchmarks.contrastive_memory " + " ".join(sys.argv[1:]),
        "dtype": "float32",
        "width": WIDTH,
        "threads": 1,
        "memory": {name: memory_figures(name) for name in MEMORY_CASES},
        "time": time_figures(),
    }
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    for name, figures in found["memory"].items():
        print(
            f"{name}: {figures['peak_bytes'] / 1e6:.0f} MB, whole matrix {figures['whole_matrix_bytes'] / 1e6:.0f} MB"
        )
    ratio, user_ratio = (found["time"][name] for name in ("chunked_over_whole", "chunked_over_whole_user"))
    print(f"time: {ratio} of all columns at once, {user_ratio} without the kernel's share")
    chunked = found["memory"]["all pairs on one rank, in chunks"]
    return 0 if chunked["peak_bytes"] < chunked["whole_matrix_bytes"] else 1


if __name__ == "__main__":
    sys.exit(main())
