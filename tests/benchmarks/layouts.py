"""Host time of a step with tp=2 and with ep=2 against the same work on two ranks with neither, and the bytes they move.

python -m tests.benchmarks.layouts --out docs/measured/layouts.json

Two gloo ranks, one thread each, train the preset tiny on generated batches: in every layout the same global batch, as
many pairs on each rank, and the same arithmetic over all ranks. All layouts live in the same two processes and take
turns step by step, after a barrier, so that a slow moment of the machine meets all. Wall seconds go from that barrier
to the end of the rank's step. CPU seconds are what the process used meanwhile, gloo's threads included; what is missing
to the wall is waiting. Ratios are of medians, a rank against itself with tp=1 and ep=1. Bytes are of the full buffers,
as limoe_dist/parallel/traffic.py counts them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Run
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.step import training_step
from tests.benchmarks.machine import origin
from tests.benchmarks.microbatch import examples
from tests.support.ranks import RanksPool

MODULE = "tests.benchmarks.layouts"
RANKS = 2
LAYOUTS = ((1, 1), (2, 1), (1, 2))
ROUNDS = 30
WARM_UP = 3


@dataclass(frozen=True)
class Setup:
    tp: int
    ep: int
    overlap: bool

    @property
    def name(self) -> str:
        return f"tp={self.tp} ep={self.ep}, overlap {'on' if self.overlap else 'off'}"

    @property
    def plain(self) -> Setup:
        """What it is compared with."""
        return Setup(1, 1, self.overlap)


SETUPS = [Setup(tp, ep, overlap) for overlap in (True, False) for tp, ep in LAYOUTS]


def run_of(setup: Setup) -> Run:
    tiny = preset("tiny")
    changes = {"tp": setup.tp, "ep": setup.ep, "overlap": setup.overlap}
    return tiny.model_copy(update={"parallel": tiny.parallel.model_copy(update=changes)})


@dataclass(frozen=True)
class Trainer:
    """One layout, alive on this rank."""

    step: Callable[[int], object]
    mesh: Mesh


def trainer_of(setup: Setup) -> Trainer:
    run, mesh = run_of(setup), Mesh.build(tp=setup.tp, ep=setup.ep)
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    engine = make_engine(model, run, mesh)
    batch = examples(run).split(run.train.batch_pairs // RANKS)[mesh.rank]
    return Trainer(lambda step: training_step(model, engine, batch, step=step, run=run, mesh=mesh), mesh)


def measure(setups: list[Setup], rounds: int) -> dict[str, dict[str, Any]]:
    """On a rank: wall and CPU seconds of every step by setup, and the collectives of its last step."""
    trainers = {setup.name: trainer_of(setup) for setup in setups}
    found: dict[str, dict[str, Any]] = {name: {"wall_s": [], "cpu_s": []} for name in trainers}
    for number in range(WARM_UP + rounds):
        for name, trainer in trainers.items():
            trainer.mesh.world.traffic.reset()
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.step(number)
            if number >= WARM_UP:
                found[name]["wall_s"].append(time.perf_counter() - wall)
                found[name]["cpu_s"].append(time.process_time() - cpu)
    for name, trainer in trainers.items():
        found[name]["collectives"] = {
            f"{op} on {axis}": {"calls": volume.calls, "bytes": volume.num_bytes}
            for (op, axis), volume in sorted(trainer.mesh.world.traffic.counts().items())
        }
    return found


def summary(setup: Setup, answers: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One setup, from what all ranks measured."""
    ranks = []
    for answer in answers:
        mine, plain = answer[setup.name], answer[setup.plain.name]
        wall, cpu = (statistics.median(mine[clock]) for clock in ("wall_s", "cpu_s"))
        ranks.append(
            {
                "median_wall_s": round(wall, 4),
                "median_cpu_s": round(cpu, 4),
                "wall_over_plain": round(wall / statistics.median(plain["wall_s"]), 3),
                "cpu_over_plain": round(cpu / statistics.median(plain["cpu_s"]), 3),
                "quartiles_wall_s": [round(part, 4) for part in statistics.quantiles(mine["wall_s"])[::2]],
            }
        )
    collectives = answers[0][setup.name]["collectives"]
    assert all(answer[setup.name]["collectives"] == collectives for answer in answers)
    return {
        "tp": setup.tp,
        "ep": setup.ep,
        "overlap": setup.overlap,
        "ranks": ranks,
        "bytes_of_a_step_and_rank": sum(volume["bytes"] for volume in collectives.values()),
        "collectives": collectives,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    pool = RanksPool(RANKS)
    try:
        answers = pool.run(measure, SETUPS, options.rounds, timeout_s=1800)
    finally:
        pool.close()
    found = origin(MODULE) | {
        "preset": "tiny",
        "batch_pairs": preset("tiny").train.batch_pairs,
        "backend": "gloo",
        "ranks": RANKS,
        "threads_of_a_rank": 1,
        "rounds": options.rounds,
        "setups": {setup.name: summary(setup, answers) for setup in SETUPS},
    }
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    for name, figures in found["setups"].items():
        times = ", ".join(f"{rank['median_wall_s']} s ({rank['wall_over_plain']})" for rank in figures["ranks"])
        print(f"{name}: {times}; {figures['bytes_of_a_step_and_rank'] / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
