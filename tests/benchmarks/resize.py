"""Which library makes pictures smaller: CPU time, bytes, difference from an exact resize, and damage that goes unseen.

python -m venv PEERS && PEERS/bin/pip install -r tests/benchmarks/requirements-peers.txt
python -m tests.benchmarks.resize --peer PEERS/bin/python --out docs/measured/resize.json

Made photographs of 512 to 800 pixels a side to a shorter side of 256, JPEG of quality 90, 4:2:0, on one core; every
way in turn over all pictures, medians of the rounds. PSNR is against a full decode and a Lanczos filter in float64,
before the encoder, but for imaging.transform, whose line is the whole of it: limits, structure, encoder, sha256.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import origin

MODULE = "tests.benchmarks.resize"
ROOT = Path(__file__).parents[2]


def measured(peer: str, pictures: int, rounds: int) -> dict[str, Any]:
    command = [peer, "-m", "tests.benchmarks.resizers", str(pictures), str(rounds)]
    one_core = {str(name): "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VIPS_CONCURRENCY")}
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, env=os.environ | one_core)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def lines(answer: dict[str, Any]) -> list[str]:
    shown = [f"{'':48}{'ms':>7}{'kB':>7}{'dB':>7}{'MB':>7}  damage that passes: cut off, bit flipped"]
    for name, way in answer["ways"].items():
        damage = ", ".join(way["damage_that_passes"].values())
        figures = (
            f"{way['cpu_ms']:7.2f}{way['encoded_bytes'] / 1e3:7.1f}{way['psnr_db']:7.1f}{way['installed_mb']:7.1f}"
        )
        shown.append(f"{name:48}{figures}  {damage}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", default=sys.executable, help="the Python that has the packages to compare")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    answer = measured(options.peer, options.pictures, options.rounds)
    options.out.write_text(json.dumps(origin(MODULE) | answer, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines(answer)))


if __name__ == "__main__":
    main()
