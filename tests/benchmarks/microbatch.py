"""Microbatches and recompute against the undivided step: gradients, peak memory, time.

python -m tests.benchmarks.microbatch --out docs/measured/microbatch.json

Gradients: the small case of the tests across ranks (dropped tokens, an idle expert) in 4 microbatches a rank, against
the whole batch in the same layout; each parameter's largest difference over its largest gradient. Key biases, whose
true gradient is zero, and gradients next to nothing are held against the largest of all.
Memory and time: a model with few weights and long images, so that activations dominate; every case in a process of its
own on one thread. The peak is the most that was resident in that whole process (VmHWM of Linux), interpreter and torch
included. Cases take turns, so that a slow moment of the machine meets all; seconds are medians over all turns.
glibc keeps freed blocks below 32 MB for later ones, in pieces; the tensors of the undivided step are larger and go back
at once, those of a microbatch are not. So every tensor of more than 1 MB gets a mapping of its own here, in all cases;
`glibc_default` has the peaks without that, from one more turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from limoe_dist.config.schema import Image, Model, Moe, Optim, Run, Text, Train
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.step import Examples, training_step
from tests.benchmarks.contrastive_memory import resident_bytes
from tests.benchmarks.machine import origin
from tests.benchmarks.parity import passes, worst_of
from tests.ranks.test_layout_parity import compare_with_whole_batch, microbatched
from tests.support.cases import BATCH, small_run
from tests.support.ranks import RanksPool

MODULE = "tests.benchmarks.microbatch"
PARTS = 4
WANTED = {"fp64": 1e-10, "fp32": 1e-5}
WANTED_SHARE = 0.4
ROUNDS = 3
TIMED_STEPS = 2
MAPPINGS = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


@dataclass(frozen=True)
class Case:
    parts: int
    recompute: bool
    passes: int
    """Forward passes of a step, a backward pass counted as two: what its arithmetic should cost."""


CASES = {
    "whole": Case(parts=1, recompute=False, passes=3),
    "4 microbatches": Case(parts=PARTS, recompute=False, passes=4),
    "recompute": Case(parts=1, recompute=True, passes=4),
    "4 microbatches, recompute": Case(parts=PARTS, recompute=True, passes=5),
}
# 24 routing groups of 4 pairs; a picture is 576 tokens.
LARGE = Run(
    model=Model(width=128, depth=4, heads=4, mlp_dim=512, embed_dim=64),
    image=Image(size=96, patch=4),
    text=Text(length=16, vocab_size=1000, pad="masked"),
    moe=Moe(blocks=(1, 3), num_experts=8, group_pairs=4, min_image_experts=5.0, min_text_experts=3.0),
    optim=Optim(warmup_steps=2, cooldown_steps=2),
    train=Train(batch_pairs=96, dtype="fp32", steps=100),
)


def gradient_errors() -> dict[str, Any]:
    """By layout and type: the worst parameter of all ranks."""
    found: dict[str, Any] = {}
    for ranks, ep in ((1, 1), (2, 2)):
        pool = RanksPool(ranks)
        try:
            layout = found[f"{ranks} rank{'s' if ranks > 1 else ''}, ep={ep}"] = {}
            for dtype, wanted in WANTED.items():
                run = microbatched(small_run(dtype), BATCH // ranks // PARTS)
                answers = [errors for (errors,) in pool.run(compare_with_whole_batch, [run], 1, ep)]
                layout[dtype] = worst_of(answers) | {"wanted": wanted}
        finally:
            pool.close()
    return found


def large_run(case: Case) -> Run:
    pairs = 0 if case.parts == 1 else LARGE.train.batch_pairs // case.parts
    changes = {"microbatch_pairs": pairs, "recompute": case.recompute}
    return LARGE.model_copy(update={"train": LARGE.train.model_copy(update=changes)})


def examples(run: Run) -> Examples:
    random = torch.Generator().manual_seed(0)
    pairs, length = run.train.batch_pairs, run.text.length
    images = torch.randn(pairs, 3, run.image.size, run.image.size, generator=random)
    tokens = torch.randint(0, run.text.vocab_size, (pairs, length), generator=random)
    lengths = torch.randint(1, length + 1, (pairs, 1), generator=random)
    return Examples(images, tokens, torch.arange(length) < lengths)


def step_figures(case: Case) -> dict[str, Any]:
    """In a new process: its peak over all steps, and the seconds of those after the first."""
    run, mesh = large_run(case), Mesh.single()
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    engine, batch = make_engine(model, run, mesh), examples(run)
    before = resident_bytes("VmRSS")
    seconds = []
    for step in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        training_step(model, engine, batch, step=step, run=run, mesh=mesh)
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "resident_before_bytes": before,
        "peak_bytes": resident_bytes("VmHWM"),
        "seconds": seconds[1:],
    }


def answer_of(name: str, environment: dict[str, str]) -> dict[str, Any]:
    """`step_figures` of a case, from a new process."""
    command = [sys.executable, "-m", MODULE, "--case", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def step_figures_of_all() -> dict[str, Any]:
    turns = [{name: answer_of(name, MAPPINGS) for name in CASES} for _ in range(ROUNDS)]
    found = {name: _figures(name, [turn[name] for turn in turns]) for name in CASES}
    whole = found["whole"]
    for figures in found.values():
        figures["peak_over_whole"] = round(figures["peak_bytes"] / whole["peak_bytes"], 3)
        figures["time_over_whole"] = round(figures["median_step_s"] / whole["median_step_s"], 3)
        figures["passes_over_whole"] = round(figures["passes"] / whole["passes"], 3)
    return found


def _figures(name: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """One case from its turns: the highest peak, the median of all timed steps."""
    return asdict(CASES[name]) | {
        "parameters": answers[0]["parameters"],
        "resident_before_bytes": max(answer["resident_before_bytes"] for answer in answers),
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "median_step_s": round(statistics.median(s for answer in answers for s in answer["seconds"]), 3),
    }


def default_peaks() -> dict[str, Any]:
    peaks = {name: answer_of(name, {})["peak_bytes"] for name in CASES}
    return {
        name: {"peak_bytes": peak, "peak_over_whole": round(peak / peaks["whole"], 3)} for name, peak in peaks.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path)
    what.add_argument("--case", choices=CASES, help="print the figures of this process for one case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        print(json.dumps(step_figures(CASES[options.case])))
        return 0
    found = origin(MODULE) | {
        "gradients": gradient_errors(),
        "steps": {
            "routing_groups": LARGE.train.batch_pairs // LARGE.moe.group_pairs,
            "tokens": LARGE.train.batch_pairs * (LARGE.image_tokens + LARGE.text.length),
            "dtype": "float32",
            "threads": 1,
            "rounds": ROUNDS,
            "timed_steps": ROUNDS * TIMED_STEPS,
            "wanted_peak_over_whole": WANTED_SHARE,
            "malloc": MAPPINGS,
            "cases": step_figures_of_all(),
            "glibc_default": default_peaks(),
        },
    }
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    for name, figures in found["steps"]["cases"].items():
        peak = f"{figures['peak_bytes'] / 1e6:.0f} MB, {figures['peak_over_whole']} of the whole"
        print(f"{name}: {peak}; {figures['median_step_s']} s, {figures['time_over_whole']} of the whole")
    errors = [figures for layout in found["gradients"].values() for figures in layout.values()]
    for figures in errors:
        print(figures)
    small_enough = found["steps"]["cases"]["4 microbatches"]["peak_over_whole"] < WANTED_SHARE
    return 0 if small_enough and all(passes(figures) for figures in errors) else 1


if __name__ == "__main__":
    sys.exit(main())
