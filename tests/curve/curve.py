"""The 30-step loss curve of the preset `tiny`, on generated shards: every number of its log, step by step.

The model, losses, routing, augmentation and optimizer are the preset's. Steps, schedule and batch are shortened, so
that warm-up, peak and cooldown are passed in 30 steps of 64 pairs: two routing groups.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Checkpoint, Data, Eval, Log, Parallel, Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.loop import train
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards

FROZEN = Path(__file__).with_name("tiny.json")
STEPS, BATCH = 30, 64
CURVES = {
    "1 rank, fp64": (1, "fp64"),
    "2 ranks with ep=2, fp64": (2, "fp64"),
    "1 rank, fp32": (1, "fp32"),
    "2 ranks with ep=2, fp32": (2, "fp32"),
}
"""Ranks and type of each curve."""
TOLERANCES = {"fp64": 1e-7, "fp32": 1e-4}
"""Largest difference, relative to the largest number of the curve."""
CLOCKS = ("step", "time", "pairs_per_s", "seconds_per_step", "memory_bytes", "busy_s")
Curve = dict[str, list[float]]
"""Values by name, one for each step."""


def run_of(manifest: Path, *, ranks: int, dtype: str) -> Run:
    tiny = preset("tiny")
    return tiny.model_copy(
        update={
            "data": Data(manifest=str(manifest)),
            "optim": tiny.optim.model_copy(update={"warmup_steps": 5, "timescale": 10, "cooldown_steps": 10}),
            "parallel": Parallel(ep=ranks),
            "train": tiny.train.model_copy(update={"steps": STEPS, "batch_pairs": BATCH, "dtype": dtype, "seed": 11}),
            "eval": Eval(),
            "checkpoint": Checkpoint(every_steps=0, read_back=False),
            "log": Log(every_steps=1, tensorboard=False),
        }
    )


def trained(run_json: str, out: str) -> None:
    """Trains on the started ranks, or in this process alone."""
    run = Run.model_validate_json(run_json)
    mesh = Mesh.build(tp=1, ep=run.parallel.ep) if torch.distributed.is_initialized() else Mesh.single()
    train(run, Path(out), mesh=mesh, device=torch.device("cpu"), resume=False)


def curves(pool: RanksPool, folder: Path) -> dict[str, Curve]:
    """All four curves, trained now. pool: 2 ranks."""
    # Lossless pictures: what a JPEG decoder rounds would be part of the curve.
    manifest = write_shards(folder / "shards", rows=96, shards=3, size=48, vocab_size=32)
    found = {}
    for name, (ranks, dtype) in CURVES.items():
        run, out = run_of(manifest, ranks=ranks, dtype=dtype).model_dump_json(), str(folder / name)
        if ranks == 1:
            trained(run, out)
        else:
            pool.run(trained, run, out)
        found[name] = _curve(Path(out) / "metrics.jsonl", digits=13 if dtype == "fp64" else 8)
    return found


def _curve(metrics: Path, *, digits: int) -> Curve:
    lines = [_flat(json.loads(line)) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert all(line.keys() == lines[0].keys() for line in lines)
    return {name: [float(f"{line[name]:.{digits}g}") for line in lines] for name in lines[0]}


def _flat(line: dict[str, Any]) -> dict[str, float]:
    """All numbers of a line but its clocks; of each block its success rates, entropies and experts in use."""
    values = {name: value for name, value in line.items() if isinstance(value, float | int) and name not in CLOCKS}
    for block, figures in line["blocks"].items():
        for kind in ("success", "entropy", "experts"):
            values |= {f"{block}/{kind}_{modality}": figures[f"{kind}_{modality}"] for modality in ("image", "text")}
    return values


def differences(found: Curve, wanted: Curve) -> dict[str, list[float]]:
    """Difference at each step, relative to the name's largest wanted number. Raises ValueError for other names."""
    if found.keys() != wanted.keys():
        raise ValueError(f"only one of the curves has {', '.join(sorted(found.keys() ^ wanted.keys()))}")
    errors = {}
    for name, values in wanted.items():
        largest = max(map(abs, values)) or 1.0
        errors[name] = [abs(a - b) / largest for a, b in zip(found[name], values, strict=True)]
    return errors


def problems(found: dict[str, Curve], wanted: dict[str, Curve]) -> list[str]:
    """One sentence for each number that leaves its tolerance, with the first step at which it does."""
    lines = []
    for curve, (_, dtype) in CURVES.items():
        limit = TOLERANCES[dtype]
        for name, errors in differences(found[curve], wanted[curve]).items():
            beyond = [step for step, error in enumerate(errors, start=1) if not error <= limit]
            if beyond:
                worst = max(error if math.isfinite(error) else math.inf for error in errors)
                lines.append(
                    f"{curve}: {name} differs by up to {worst:.1e}, more than {limit:.0e} from step {beyond[0]}"
                )
    return lines


def frozen(path: Path = FROZEN) -> dict[str, Curve]:
    curves: dict[str, Curve] = json.loads(path.read_text(encoding="utf-8"))["curves"]
    return curves


def trained_now() -> dict[str, Curve]:
    """All curves, with ranks and a folder of their own."""
    pool = RanksPool(2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return curves(pool, Path(folder))
    finally:
        pool.close()
