"""Injected NaN and leaps, on one rank and on four: what each policy does, whether both do the same, what it costs.

python -m tests.benchmarks.guard --out docs/measured/guard.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data_prep.inspection.audit import audit
from limoe_dist.checkpoint.catalog import latest_checkpoint
from limoe_dist.checkpoint.state import read_state
from limoe_dist.config.schema import Guard
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import guard as room
from limoe_dist.train import ledger
from limoe_dist.train.votes import NOBODY
from tests.benchmarks.machine import origin
from tests.ranks.test_guard import STEPS, Harm, go, on_ranks, passing_over, run_of
from tests.support.cases import BATCH
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards
from tests.train.small import lines

MODULE = "tests.benchmarks.guard"
LEAP = {"spike_window": 8, "spike_z": 20.0}
CASES: dict[str, tuple[Guard, list[int], Harm]] = {
    "two batches with NaN, skip": (Guard(), [7 * BATCH, 8 * BATCH], "nan"),
    "NaN, rollback": (Guard(non_finite="rollback", rollback_batches=2), [12 * BATCH], "nan"),
    "NaN, stop": (Guard(non_finite="stop"), [7 * BATCH], "nan"),
    "leap, skip": (Guard(spike="skip", **LEAP), [12 * BATCH], "leap"),
    "leap, rollback": (Guard(spike="rollback", rollback_batches=2, **LEAP), [12 * BATCH], "leap"),
    "leap, note": (Guard(spike="note", **LEAP), [12 * BATCH], "leap"),
    "leap, stop": (Guard(spike="stop", **LEAP), [12 * BATCH], "leap"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    pool = RanksPool(4)
    with tempfile.TemporaryDirectory() as folder:
        data = write_shards(Path(folder) / "shards", rows=192)
        cases = {}
        for number, name in enumerate(CASES):
            cases[name] = _case(pool, data, Path(folder) / str(number), *CASES[name])
            print(name, json.dumps(cases[name]), flush=True)
    pool.close()
    content = origin(MODULE) | {
        "run": f"{STEPS} steps of {BATCH} pairs in float64, a checkpoint every 5, 8 experts in 2 of 4 blocks",
        "cases": cases,
        "verdict_us": _verdict_us(),
    }
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _case(pool: RanksPool, data: Path, folder: Path, guard: Guard, positions: list[int], harm: Harm) -> dict[str, Any]:
    one, four = folder / "1", folder / "4"
    folder.mkdir()
    alone = go(run_of(data, guard, ranks=1), one, Mesh.single(), positions, harm, False, None)
    pool.run(on_ranks, run_of(data, guard, ranks=4).model_dump_json(), str(four), positions, harm, False, None)
    losses = [{line["step"]: line["loss"] for line in lines(out)} for out in (one, four)]
    told = [
        [{k: e.get(k) for k in ("step", "action", "first", "end", "to_step")} for e in ledger.read(o)]
        for o in (one, four)
    ]
    spans = [(event["first"], event["end"]) for event in told[0] if event["first"] is not None]
    result = {
        "exit_status": 0 if isinstance(alone, int) else alone[0],
        "ledger": told[0],
        "ledger_of_4_ranks_is_the_same": told[0] == told[1],
        "largest_relative_difference_of_losses": max(abs(losses[0][s] / losses[1][s] - 1) for s in losses[0]),
        "checkpoint_passes_over": [read_state(latest_checkpoint(out)).quarantined for out in (one, four)],
        "audit_faults": [audit(out).faults for out in (one, four)],
    }
    if spans:
        result["losses_equal_a_run_that_was_told_of_these_positions"] = losses[0] == passing_over(
            data, folder, guard, *spans
        )
    return result


def _verdict_us() -> float:
    """Microseconds of one core for the verdict of a step: median of 5 rounds of 1,000."""
    guard = room.Guard(Guard(), torch.device("cpu"))
    votes = torch.tensor([*NOBODY.numbers(), 2.5], dtype=torch.float64)
    norm = torch.ones((), dtype=torch.float64)
    rounds = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(1000):
            guard.read(guard.judge(votes, norm))
        rounds.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(rounds), 1)


if __name__ == "__main__":
    main()
