"""The run of all scenarios: how it is made, left at some step, and what must be in its directory at its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limoe_dist.checkpoint.catalog import checkpoint_folder, checkpoints, step_of
from limoe_dist.checkpoint.manifest import File, read_manifest, verify
from limoe_dist.checkpoint.rank_file import SUFFIX
from tests.slurm.harness import ROOT, lines_of
from tests.support.shards import write_shards
from tests.support.undisturbed import CLOCKS

RANKS = 4
STEPS = 400
EVERY = 20
"""Steps between two checkpoints."""
SMALL = (
    *("--model.width", "32", "--model.depth", "2", "--model.heads", "2", "--model.mlp-dim", "64"),
    *("--model.embed-dim", "24", "--image.size", "16", "--image.patch", "8", "--text.length", "6"),
    *("--text.vocab-size", "64", "--moe.blocks", "1", "--moe.group-pairs", "2", "--moe.min-image-experts", "3"),
    *("--moe.min-text-experts", "3", "--train.batch-pairs", "16", "--train.dtype", "fp32", "--train.steps", str(STEPS)),
    *("--optim.warmup-steps", "20", "--optim.cooldown-steps", "100", "--optim.timescale", str(STEPS)),
    *("--parallel.ep", "2", "--parallel.start-timeout-s", "120", "--parallel.timeout-s", "60"),
    *("--train.stop-grace-s", "30"),
    # A line a step: what a restart did differently is seen in the step in which it did.
    *("--log.every-steps", "1", "--log.no-tensorboard", "--checkpoint.every-steps", str(EVERY)),
)
"""The preset tiny, cut down: 0.7 MB a checkpoint, and 0.1 s of one core a step."""
RATES = {*CLOCKS, "busy_s"}
"""Of metrics.jsonl, what no two runs share."""


@dataclass(frozen=True)
class Undisturbed:
    """A run on 4 ranks of this machine that nobody disturbed, with the checkpoint of every EVERY steps."""

    out: Path
    manifest: Path

    @classmethod
    def make(cls, folder: Path) -> Undisturbed:
        """Trains it, or takes up the one that is there."""
        found = cls(folder / "undisturbed", folder / "shards" / "manifest.json")
        if (found.out / "ended.json").exists():
            return found
        write_shards(found.manifest.parent, rows=512, shards=4)
        words = ("train", "tiny", "--data", found.manifest, "--out", found.out, "--ranks", RANKS, *SMALL)
        _limoe(*words, "--checkpoint.keep-every", EVERY)
        return found

    def left_at(self, step: int, run: Path) -> Path:
        """A copy in `run`, as the run was after the checkpoint of a step: that one alone is there. Returns `run`."""
        (run / "checkpoints").mkdir(parents=True)
        for name in ("run.json", "tokenizer.model"):
            shutil.copy(self.out / name, run)
        settings = json.loads((run / "run.json").read_text(encoding="utf-8"))
        # A scenario removes old checkpoints as a run usually does.
        settings["checkpoint"]["keep_every"] = 0
        settings["data"]["tokenizer"] = str(run / "tokenizer.model")
        (run / "run.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        for name in ("metrics.jsonl", "positions.jsonl"):
            lines = [json.dumps(line) + "\n" for line in lines_of(self.out / name) if line["step"] <= step]
            (run / name).write_text("".join(lines), encoding="utf-8")
        place = checkpoint_folder(self.out, step)
        shutil.copytree(place, run / "checkpoints" / place.name)
        return run

    def differences(self, run: Path, *, step: int = STEPS) -> list[str]:
        """One sentence for each way in which a run that ended at a step is not this one, up to that step: bits."""
        wanted, given = (_by_step(place / "metrics.jsonl", until=step) for place in (self.out, run))
        found = _differing(wanted, given)
        found += [f"{fault}" for folder in checkpoints(run) for fault in _faults(folder)]
        newest = step_of(checkpoints(run)[-1])
        if newest != step:
            found.append(f"the newest checkpoint is of step {newest}, not {step}")
        elif step % EVERY == 0 and _tensors(checkpoint_folder(run, step)) != _tensors(
            checkpoint_folder(self.out, step)
        ):
            found.append(f"the checkpoint of step {step} holds other bits")
        return found

    def loss(self, step: int = STEPS) -> float:
        return final_loss(self.out, step)


def final_loss(run: Path, step: int = STEPS) -> float:
    """Of the line of that step. Raises KeyError where there is none."""
    return float(_by_step(run / "metrics.jsonl", until=step)[step][-1]["loss"])


def nothing_lost(run: Path) -> None:
    """`limoe prep audit` proves that each row was read once an epoch, or says why not. Raises AssertionError."""
    _limoe("prep", "audit", run)


def finished(run: Path) -> None:
    """The run says itself that it is done."""
    ended = json.loads((run / "ended.json").read_text(encoding="utf-8"))
    assert (ended["step"], ended["signal"], ended.get("status", 0)) == (STEPS, 0, 0), ended


def attempts(run: Path, event: str) -> list[dict[str, Any]]:
    """Of RUN/slurm/attempts.jsonl, those of one kind: begin, end, lost."""
    return [line for line in lines_of(run / "slurm" / "attempts.jsonl") if line["event"] == event]


def newest_step(run: Path) -> int:
    """Of metrics.jsonl, which has a line a step; 0 where there is none."""
    return max((line["step"] for line in lines_of(run / "metrics.jsonl")), default=0)


def saved_step(run: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    return max((step_of(folder) for folder in checkpoints(run)), default=0)


def _limoe(*words: object) -> None:
    command = [sys.executable, "-m", "limoe_dist", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}"


def _by_step(file: Path, *, until: int) -> dict[int, list[dict[str, Any]]]:
    """The lines by step without figures of the clock: more than one of a step would be a fault."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in lines_of(file):
        if line["step"] <= until:
            figures = {name: value for name, value in line.items() if name not in RATES}
            found.setdefault(line["step"], []).append(figures)
    return found


def _differing(wanted: dict[int, list[dict[str, Any]]], given: dict[int, list[dict[str, Any]]]) -> list[str]:
    # repr: nan equals nan, and 0.0 is not -0.0.
    steps = sorted(wanted.keys() | given.keys())
    unequal = [step for step in steps if repr(wanted.get(step)) != repr(given.get(step))]
    if not unequal:
        return []
    first = unequal[0]
    missing = [step for step in unequal if step not in given]
    twice = [step for step in unequal if len(given.get(step, ())) > 1]
    losses = [[line["loss"] for line in lines.get(first, ())] for lines in (wanted, given)]
    return [
        f"metrics.jsonl: {len(unequal)} of {len(steps)} steps differ, the first {first}: loss {losses[1]}, undisturbed "
        f"{losses[0]}; missing {_few(missing)}, more than once {_few(twice)}"
    ]


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "") or "none"


def _faults(checkpoint: Path) -> list[str]:
    return verify(checkpoint, read_manifest(checkpoint).files, threads=1)


def _tensors(checkpoint: Path) -> list[File]:
    """One layout writes the same bytes for the same tensors."""
    return [file for file in read_manifest(checkpoint).files if file.name.endswith(SUFFIX)]
