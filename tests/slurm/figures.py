"""How runs came through what happened to their jobs on the real cluster: losses, restarts, time and steps.

python -m tests.slurm.figures --out docs/measured/slurm.json

Runs the scenarios that the file is about, and puts together what each noted at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import origin
from tests.slurm.harness import ROOT, lines_of
from tests.slurm.runs import STEPS, Undisturbed, attempts, final_loss

MODULE = "tests.slurm.figures"
FOLDER = "LIMOE_SLURM_FIGURES"
"""Where scenarios write their figures; unset: nowhere."""
SCENARIOS = "at_its_time_limit or after_the_power_cut or preempted or another_number_of_ranks or rank_that_hangs"
WORDS = {
    "final_loss": "of the last step",
    "equal": "bit for bit: every line of metrics.jsonl and, on the same number of ranks, the last checkpoint",
    "restarts": "starts after the first",
    "seconds_lost": "between the last step that counts before a restart and the first one after it, over all restarts: "
    "steps done again, the wait of Slurm, the start of the ranks",
    "steps_redone": "steps that were done after the checkpoint that the next start went on from",
}


def note(name: str, run: Path, undisturbed: Undisturbed, more: dict[str, Any]) -> None:
    """Writes the figures of a run that has come to its end, where somebody asked for them."""
    if folder := os.environ.get(FOLDER):
        found = figures_of(run, undisturbed) | more
        (Path(folder) / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def figures_of(run: Path, undisturbed: Undisturbed) -> dict[str, Any]:
    begins = attempts(run, "begin")
    loss, theirs = final_loss(run), undisturbed.loss()
    return {
        "from_step": begins[0]["step"],
        "restarts": len(begins) - 1,
        "final_loss": loss,
        "undisturbed_loss": theirs,
        "equal": not undisturbed.differences(run),
        "relative_difference": abs(loss / theirs - 1),
        "seconds_lost": round(_seconds_lost(run, [line["step"] for line in begins[1:]]), 1),
        "steps_redone": _steps_redone(run),
    }


def _seconds_lost(run: Path, resumed_at: list[int]) -> float:
    times = {line["step"]: line["time"] for line in lines_of(run / "metrics.jsonl")}
    return sum(times[step + 1] - times[step] for step in resumed_at if step in times and step + 1 in times)


def _steps_redone(run: Path) -> int:
    """By the logs, which have a line a step: what was printed more than once."""
    text = "\n".join(file.read_text(errors="replace") for file in (run / "slurm").glob("job-*.log"))
    steps = re.findall(r"^step (\d+)/", text, re.MULTILINE)
    return len(steps) - len(set(steps))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--at-once", type=int, default=2, help="scenarios; figures of time are disturbed by more")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "-m",
            "pytest",
            "tests/slurm",
            "-k",
            SCENARIOS,
            "-n",
            str(options.at_once),
            "--dist",
            "worksteal",
            "-v",
        ]
        environ = os.environ | {FOLDER: folder, "LIMOE_SLURM": "required"}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environ)
        scenarios = {file.stem: json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))}
    found = origin(MODULE) | {"what": WORDS, "steps": STEPS, "ranks": 4, "scenarios": scenarios}
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
