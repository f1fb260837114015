"""What a run's directory holds, and whose it is.

RUN/run.json              the settings, exactly
RUN/metrics.jsonl         one line every log.every_steps
RUN/evaluations.jsonl     one line for each evaluation in training
RUN/positions.jsonl       which positions of the data order were consumed
RUN/tensorboard/          the same figures for TensorBoard
RUN/checkpoints/          step-NNNNNNNN, see limoe_dist/checkpoint/storage.py
"""

from __future__ import annotations

from pathlib import Path

from limoe_dist.config.parse import decisive, load_run, save_run
from limoe_dist.config.schema import Run


def new_run_problem(out: Path) -> str | None:
    """Why no new run may begin in `out`; None where it may."""
    if (out / "run.json").exists():
        return f"{out} holds a run already: go on with `limoe train --resume {out}`, or choose another --out"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"{out} exists and is not empty: choose another --out"
    return None


def claim(out: Path, run: Run) -> None:
    """Makes the directory of a new run; one rank calls it."""
    out.mkdir(parents=True, exist_ok=True)
    save_run(run, out / "run.json")


def resume_problems(out: Path, run: Run) -> list[str]:
    """Why the run in `out` cannot go on with these settings: what decides results may not change."""
    before, now = decisive(load_run(out / "run.json")), decisive(run)
    return [
        f"{name}={now[name]!r}, but the run in {out} has {old!r}: a resumed run keeps what decides its results"
        for name, old in before.items()
        if now[name] != old
    ]
