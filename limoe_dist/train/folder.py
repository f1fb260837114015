"""What a run's directory holds, and whose it is.

RUN/run.json              the settings of the last start
RUN/metrics.jsonl         one line every log.every_steps
RUN/evaluations.jsonl     one line for each evaluation in training
RUN/positions.jsonl       which positions of the data order were consumed
RUN/tensorboard/          the same figures for TensorBoard
RUN/checkpoints/          step-NNNNNNNN, see limoe_dist/checkpoint/storage.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from limoe_dist.config.parse import changed_settings, decisive, load_run, save_run, write_atomically
from limoe_dist.config.schema import Run

ENDED = "ended.json"


def new_run_problem(out: Path) -> str | None:
    """Why no new run may begin in `out`; None where it may."""
    if (out / "run.json").exists():
        return f"{out} holds a run already: go on with `limoe train --resume {out}`, or choose another --out"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"{out} exists and is not empty: choose another --out"
    return None


def begin(out: Path, run: Run) -> None:
    """Makes the directory of a run, or takes up a resumed one with the settings of now; one rank calls it."""
    out.mkdir(parents=True, exist_ok=True)
    save_run(run, out / "run.json")
    (out / ENDED).unlink(missing_ok=True)


def note_end(out: Path, *, step: int, signal: int) -> None:
    """Says that the run ended by itself after a checkpoint of `step`; a run that was killed says nothing."""
    write_atomically(out / ENDED, json.dumps({"step": step, "signal": signal}) + "\n")


@dataclass(frozen=True)
class Ended:
    step: int
    signal: int


def read_end(out: Path) -> Ended | None:
    """How the run ended; None where it was killed, or still runs."""
    try:
        return Ended(**json.loads((out / ENDED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def resume_problems(out: Path, run: Run) -> list[str]:
    """Why the run in `out` cannot go on with these settings: what decides results may not change."""
    return changed_settings(decisive(load_run(out / "run.json")), run, out / "run.json")
