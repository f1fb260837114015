"""How long `limoe submit --dry-run` takes: a process of its own each time, and what it imports.

python -m tests.benchmarks.submit --out docs/measured/submit.json

Seconds are those of the whole process, by the clock and by the CPU time of user and system; a run of each preset is
checked against a small set of shards, and the script goes nowhere. Presets take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import origin
from tests.support.shards import write_shards

MODULE = "tests.benchmarks.submit"
PRESETS = {
    "tiny": ["--gpus-per-node", "0", "--ranks-per-node", "2"],
    "b16": ["--parallel.ep", "8"],
    "b16-two-tower": [],
}
ROUNDS = 7
WANTED_S = 1.0
# Prints what is there at the end of the process, where nothing more is imported.
CHILD = """
import sys
from launch.cli import main
status = main(sys.argv[1:])
print("torch" if "torch" in sys.modules else "no torch", file=sys.stderr)
sys.exit(status)
"""


def one(preset: str, data: Path, folder: Path) -> dict[str, Any]:
    """One dry run, for two nodes."""
    words = ["submit", preset, "--data", str(data), "--out", str(folder / "run"), "--nodes", "2", "--time", "24:00:00"]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words, *PRESETS[preset], "--dry-run"], capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": wall, "cpu_s": cpu, "torch": done.stderr.splitlines()[-1] == "torch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    runs: dict[str, list[dict[str, Any]]] = {preset: [] for preset in PRESETS}
    with tempfile.TemporaryDirectory() as name:
        data = write_shards(Path(name) / "shards", rows=64)
        for _ in range(ROUNDS):
            for preset in PRESETS:
                runs[preset].append(one(preset, data, Path(name)))
    figures = {
        preset: {
            "wall_s": round(statistics.median(run["wall_s"] for run in found), 3),
            "cpu_s": round(statistics.median(run["cpu_s"] for run in found), 3),
            "wall_s_worst": round(max(run["wall_s"] for run in found), 3),
            "imports_torch": any(run["torch"] for run in found),
        }
        for preset, found in runs.items()
    }
    passed = all(row["wall_s"] < WANTED_S and not row["imports_torch"] for row in figures.values())
    result = origin(MODULE) | {"rounds": ROUNDS, "wanted_wall_s": WANTED_S, "presets": figures, "passed": passed}
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
