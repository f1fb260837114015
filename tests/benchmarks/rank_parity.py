"""The first 20 losses of `limoe train tiny` on 1 rank and on 2 ranks with ep=2, with dropped tokens.

python -m tests.benchmarks.rank_parity --data quickstart/shards/train/manifest.json --report FILE
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 20
LAYOUTS: dict[str, list[str]] = {
    "1 rank": [],
    "2 ranks, ep=2": ["--ranks", "2", "--parallel.ep", "2"],
}


def losses(data: Path, dtype: str, layout: list[str]) -> list[dict[str, Any]]:
    """metrics.jsonl of a run of 20 steps, one line a step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ["train", "tiny", "--data", str(data), "--out", str(out), "--train.dtype", dtype, *layout]
        command += ["--stop-after", str(STEPS), "--log.every-steps", "1", "--log.no-tensorboard"]
        subprocess.run([sys.executable, "-m", "limoe_dist", *command], check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--report", required=True, type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"command": "python -m tests.benchmarks.rank_parity " + " ".join(sys.argv[1:])}
    for dtype, wanted in (("fp64", 1e-9), ("fp32", 1e-5)):
        one, two = (losses(options.data, dtype, layout) for layout in LAYOUTS.values())
        blocks = [block for line in one for block in line["blocks"].values()]
        found[dtype] = {
            "steps": STEPS,
            "largest_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)),
            "wanted": wanted,
            "first_loss": one[0]["loss"],
            "last_loss": one[-1]["loss"],
            "lowest_success_rate": min(min(block["success_image"], block["success_text"]) for block in blocks),
        }
        print(dtype, found[dtype])
    options.report.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(found[d]["largest_difference"] < found[d]["wanted"] for d in ("fp64", "fp32")) else 1


if __name__ == "__main__":
    sys.exit(main())
