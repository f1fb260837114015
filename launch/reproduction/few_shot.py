"""Few-shot accuracy of trained runs, by `limoe eval fewshot`: what the pictures' features are worth without texts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from launch.reproduction.runs import Data, Planned
from limoe_dist.config.errors import UserError

SHOTS = 5
"""A concept of the demo data has a picture of each maker, at most six: not the paper's ten."""
PENALTY = 1.0
"""Of the ridge; chosen on a run that is in no figure: big_vision's 2^10 is for ten thousand pictures."""


def few_shot(runs: Sequence[Planned], data: Data) -> None:
    """Measures the runs that were not measured. Raises UserError where the command fails."""
    for run in {run.folder: run for run in runs}.values():
        path = run.folder / f"eval-fewshot-{run.run.train.steps}.json"
        if path.is_file():
            continue
        words = [
            "eval",
            "fewshot",
            "--run",
            str(run.folder),
            "--train",
            str(data.train),
            "--data",
            str(data.validation),
        ]
        words += ["--shots", str(SHOTS), "--l2", str(PENALTY), "--json", str(path)]
        done = subprocess.run([sys.executable, "-m", "limoe_dist", *words], check=False, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise UserError(f"{run.label}: limoe {' '.join(words)} ended with status {done.returncode}: {lines[-1:]}")
