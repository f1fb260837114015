"""Bytes and calls of every collective in a step of `tiny` on 4 ranks, measured beside the formula of `limoe plan`.

python -m tests.benchmarks.traffic --report docs/measured/traffic.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the ranks: the numbers are counts, a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from launch.plan import layout_of
from launch.plan_tables import WORDS
from launch.traffic import Exchange
from limoe_dist.config.presets import preset
from limoe_dist.config.rules import check
from limoe_dist.config.schema import Run
from limoe_dist.model.tower import build_model
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.step import Examples, training_step
from tests.benchmarks.machine import origin
from tests.support.ranks import RanksPool

RANKS = 4
Counts = dict[str, dict[str, int]]
"""calls and bytes by `all-gather over tp`."""


@dataclass(frozen=True)
class Case:
    name: str
    tp: int = 1
    ep: int = 1
    microbatch_pairs: int = 0
    recompute: bool = False
    optimizer: str = "adamw"

    def run(self) -> Run:
        """`tiny` with 64 pairs a rank, so that there are two microbatches of a routing group to make."""
        tiny = preset("tiny")
        changes = {
            "parallel": {"tp": self.tp, "ep": self.ep},
            "optim": {"name": self.optimizer},
            "train": {
                "batch_pairs": 64 * RANKS,
                "dtype": "fp32",
                "microbatch_pairs": self.microbatch_pairs,
                "recompute": self.recompute,
            },
        }
        run = tiny.model_copy(
            update={name: getattr(tiny, name).model_copy(update=values) for name, values in changes.items()}
        )
        check(run, world=RANKS)
        return run


CASES = (
    Case("replicas"),
    Case("ep=4", ep=4),
    Case("tp=2, ep=2", tp=2, ep=2),
    Case("tp=2, ep=2, 2 microbatches", tp=2, ep=2, microbatch_pairs=32),
    Case("tp=2, ep=2, recompute", tp=2, ep=2, recompute=True),
    Case("tp=2, ep=2, 2 microbatches, recompute", tp=2, ep=2, microbatch_pairs=32, recompute=True),
    Case("tp=2, ep=2, adafactor", tp=2, ep=2, optimizer="adafactor"),
)


def measured(run: Run) -> tuple[Counts, float]:
    """On a rank: one training step on random pairs; and the share of token choices that this rank's experts refused."""
    mesh = Mesh.build(tp=run.parallel.tp, ep=run.parallel.ep)
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    engine = NativeEngine(model, run, mesh)
    mesh.world.traffic.reset()
    losses = training_step(model, engine, _examples(run, mesh), step=0, run=run, mesh=mesh).losses
    counts = {
        f"{WORDS[op]} over {axis}": {"calls": volume.calls, "bytes": volume.num_bytes}
        for (op, axis), volume in mesh.world.traffic.counts().items()
    }
    kept, routed = (
        sum(getattr(record, name).sum().item() for record in losses.records.values())
        for name in ("kept_E2", "routed_E2")
    )
    return counts, 1 - kept / routed


def _examples(run: Run, mesh: Mesh) -> Examples:
    pairs, length = run.train.batch_pairs // mesh.world.size, run.text.length
    generator = torch.Generator().manual_seed(mesh.rank)
    return Examples(
        images=torch.randn(pairs, 3, run.image.size, run.image.size, generator=generator),
        tokens=torch.randint(0, run.text.vocab_size, (pairs, length), generator=generator),
        valid=torch.arange(length) < torch.randint(1, length + 1, (pairs, 1), generator=generator),
    )


def formula(run: Run) -> Counts:
    (cost,) = layout_of(run, RANKS).costs.values()
    found: Counts = {}
    for exchange in cost.exchanges:
        sums = found.setdefault(_kind(exchange), {"calls": 0, "bytes": 0})
        sums["calls"] += exchange.calls
        sums["bytes"] += exchange.num_bytes
    return found


def _kind(exchange: Exchange) -> str:
    return f"{WORDS[exchange.op]} over {exchange.axis}"


def compare(pool: RanksPool, case: Case) -> dict[str, Any]:
    run = case.run()
    answers = pool.run(measured, run)
    told, counts = formula(run), answers[0][0]
    collectives = {
        kind: {"measured": counts.get(kind), "formula": told.get(kind)} for kind in sorted(counts.keys() | told.keys())
    }
    return {
        "case": case.name,
        "dropped_frac": round(sum(dropped for _, dropped in answers) / RANKS, 4),
        "equal_on_every_rank": all(found == told for found, _ in answers),
        "collectives": collectives,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", required=True, type=Path)
    options = parser.parse_args()
    pool = RanksPool(RANKS)
    try:
        cases = [compare(pool, case) for case in CASES]
    finally:
        pool.close()
    equal = all(case["equal_on_every_rank"] for case in cases)
    found = origin("tests.benchmarks.traffic") | {
        "what": "one training step of tiny, 64 pairs a rank, float32; calls, and bytes of whole buffers of a rank",
        "ranks": RANKS,
        "equal": equal,
        "cases": cases,
    }
    options.report.write_text(json.dumps(found, indent=2) + "\n")
    for case in cases:
        print(f"{case['case']}: {'equal' if case['equal_on_every_rank'] else 'DIFFERENT'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
