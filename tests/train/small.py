"""A small run on small shards, for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from limoe_dist.config.schema import Checkpoint, Data, Eval, Log, Parallel, Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.loop import Outcome, train
from tests.support.cases import small_run

CPU = torch.device("cpu")


def run_on(data: Path, *, steps: int = 6) -> Run:
    run = small_run("fp32", steps=steps)
    return run.model_copy(
        update={
            "data": Data(manifest=str(data), validation=str(data.parent.parent / "validation" / "manifest.json")),
            "optim": run.optim.model_copy(update={"cooldown_steps": 2}),
            "parallel": Parallel(ep=2),
            "eval": Eval(every_steps=4, batch_pairs=8),
            "checkpoint": Checkpoint(every_steps=2),
            "log": Log(every_steps=1, tensorboard=True),
        }
    )


def on_ranks(text: str, out: str, resume: bool, stop_after: int | None) -> Outcome:
    run = Run.model_validate_json(text)
    return train(run, Path(out), mesh=Mesh.build(tp=1, ep=2), device=CPU, resume=resume, stop_after=stop_after)


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(out)]


def alone(run: Run, out: Path, *, resume: bool = False) -> Outcome:
    return train(run, out, mesh=Mesh.single(), device=CPU, resume=resume, stop_after=1)
