"""What becomes of a run whose newest checkpoint was damaged: whether that is seen, by whom, and what is taken instead.

python -m tests.benchmarks.checkpoint_corruption --out docs/measured/checkpoint_corruption.json

Two gloo ranks train a small model with ep=2 and leave two whole checkpoints, of steps 2 and 4. The newest is then
damaged in one way after the other (tests/checkpoint/damage.py) and opened as a run that goes on opens it: by two ranks,
and by one process. In between it is put right again, and must then be taken without a word.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limoe_dist.checkpoint.catalog import checkpoints, step_of
from limoe_dist.checkpoint.reader import open_checkpoint
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Checkpoint, Data, Eval, Parallel, Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.loop import train
from tests.benchmarks.machine import origin
from tests.checkpoint.damage import Case, cases, read_files, write_files
from tests.support.cases import small_run
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards

MODULE = "tests.benchmarks.checkpoint_corruption"
RANKS = 2
STEPS = 4
FLIPS = 17


def run_on(manifest: Path) -> Run:
    small = small_run("fp32", steps=STEPS)
    return small.model_copy(
        update={
            "data": Data(manifest=str(manifest)),
            "optim": small.optim.model_copy(update={"cooldown_steps": 2}),
            "parallel": Parallel(ep=RANKS),
            "eval": Eval(every_steps=0),
            "checkpoint": Checkpoint(every_steps=STEPS // 2),
        }
    )


def train_on_ranks(run: Run, out: str) -> None:
    train(run, Path(out), mesh=Mesh.build(tp=1, ep=RANKS), device=torch.device("cpu"), resume=False)


@dataclass(frozen=True)
class Opened:
    step: int | None
    """Of the checkpoint that was taken; None where none was."""
    said: tuple[str, ...]
    """Lines of this rank, or those of all ranks in turn."""


def opened(out: str, mesh: Mesh) -> Opened:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            step = open_checkpoint(Path(out), mesh, torch.device("cpu")).state.step
        except UserError as error:
            step = None
            print(error, file=sys.stderr)
    lines = said.getvalue().replace(f"{out}/", "RUN/").splitlines()
    return Opened(step, tuple(line.removeprefix("limoe: warning: ") for line in lines))


def opened_on_rank(out: str) -> Opened:
    return opened(out, Mesh.build(tp=1, ep=RANKS))


def opened_by_all(out: Path, pool: RanksPool) -> dict[str, Opened]:
    """By two ranks together, and by one process."""
    answers = pool.run(opened_on_rank, str(out))
    steps = {answer.step for answer in answers}
    assert len(steps) == 1, f"ranks take different checkpoints: {steps}"
    said = tuple(f"rank {rank}: {line}" for rank, answer in enumerate(answers) for line in answer.said)
    return {"two_ranks": Opened(steps.pop(), said), "one_process": opened(str(out), Mesh.single())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    pool = RanksPool(RANKS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), pool)
    finally:
        pool.close()
    options.out.write_text(json.dumps(origin(MODULE) | found, indent=2) + "\n")
    print(f"{found['undetected']} of {len(found['cases'])} undetected; {found['counts']}")
    return 1 if found["undetected"] else 0


def measure(folder: Path, pool: RanksPool) -> dict[str, Any]:
    manifest, out = write_shards(folder / "shards", rows=64), folder / "run"
    pool.run(train_on_ranks, run_on(manifest), str(out))
    older, newest = checkpoints(out)
    content = read_files(newest)
    undamaged = Opened(step_of(newest), ())

    def tried(case: Case) -> dict[str, Any]:
        write_files(newest, case.files)
        found = opened_by_all(out, pool)
        write_files(newest, content)
        assert all(each == undamaged for each in opened_by_all(out, pool).values()), f"{case.text}: not put right"
        # Detected: everybody took the older one, and said what is wrong with the newest.
        detected = all(
            each.step == step_of(older) and any(newest.name in line for line in each.said) for each in found.values()
        )
        return {"kind": case.kind, "case": case.text, "detected": detected} | {
            who: {"took_step": each.step, "said": list(each.said)} for who, each in found.items()
        }

    tries = [tried(case) for case in cases(content, read_files(older), flips=FLIPS)]
    return {
        "ranks": RANKS,
        "steps_of_the_checkpoints": [step_of(older), step_of(newest)],
        "bytes_of_the_newest": {name: len(data) for name, data in content.items()},
        "counts": Counter(each["kind"] for each in tries),
        "undetected": sum(not each["detected"] for each in tries),
        "cases": tries,
    }


if __name__ == "__main__":
    sys.exit(main())
