"""One real run, stopped at random moments and resumed by 1, 2, 3, 4 and 8 ranks with other batches, then audited.

python -m tests.soak.resume --out docs/measured/resume.json

A mixture of two sources, with bad rows, blocks and windows. Every start is `limoe train --resume RUN --ranks N
--train.batch-pairs B`; some are killed (SIGKILL to every process) at a moment of chance between saves, others stop by
themselves. At the end `limoe prep audit` must account for every row of every epoch, by the checksums of the rows that
the ranks used, and the shares of both sources must be exact.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

from limoe_dist.config.parse import write_atomically
from tests.benchmarks.machine import origin
from tests.support.shards import write_shards

MODULE = "tests.soak.resume"
RANKS = (1, 2, 3, 4, 8)
SHAPE = {
    "model.depth": 2,
    "model.width": 32,
    "moe.blocks": 1,
    "moe.group-pairs": 2,
    "image.size": 16,
    "image.patch": 8,
    "text.length": 8,
    "text.vocab-size": 32,
    "optim.warmup-steps": 2,
    "optim.cooldown-steps": 2,
    "checkpoint.every-steps": 2,
    "data.window-rows": 48,
    "data.block-shards": 2,
    "data.max-bad-frac": 0.5,
}
STEPS = 100_000
"""Never reached."""


def limoe(*words: str) -> list[str]:
    return [sys.executable, "-m", "limoe_dist", *words]


def start(out: Path, first: list[str], ranks: int, batch: int, end: int, kill_after_s: float | None) -> str:
    """One start of the run, until step `end` or killed; first: the words of its first start. How it ended."""
    resumed = (out / "run.json").is_file()
    words = ["train", "--resume", str(out)] if resumed else ["train", "tiny", "--out", str(out), *first]
    words += ["--ranks", str(ranks), "--train.batch-pairs", str(batch), "--stop-after", str(end)]
    process = subprocess.Popen(limoe(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if kill_after_s is None:
        printed, _ = process.communicate(timeout=300)
        if process.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{printed}")
        return "stopped"
    saved = newest(out)
    deadline = time.monotonic() + 240
    # At the earliest when this start has saved, so that the run gets on.
    while newest(out) == saved and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(kill_after_s)
    for child in (
        [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        if process.poll() is None
        else []
    ):
        try:
            child.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()
    return "killed"


def newest(out: Path) -> int:
    """The step of the newest whole checkpoint; 0 before the first."""
    steps = [int(path.parent.name.split("-")[1]) for path in (out / "checkpoints").glob("step-*/manifest.json")]
    return max(steps, default=0)


def measure(starts: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        a = write_shards(folder / "a", rows=210, shards=14, pictures={7: b"", 130: b"no picture", 199: b"\xff\xd8\xff"})
        b = write_shards(folder / "b", rows=75, shards=5)
        first = ["--data.mixture", f"{a}=2", f"{b}=1", "--train.steps", str(STEPS)]
        first += [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
        out, lived = folder / "run", []
        order = [RANKS[i % len(RANKS)] for i in range(starts)]
        chance.shuffle(order)
        for number, ranks in enumerate(order):
            batch = 2 * ranks * chance.choice([3, 6, 12])
            kills = number % 2 == 1
            end = newest(out) + (STEPS // 2 if kills else chance.randint(1, 9))
            how = start(out, first, ranks, batch, end, chance.uniform(0.0, 0.4) if kills else None)
            lived.append({"ranks": ranks, "batch": batch, "ended": how, "step": newest(out)})
            print(f"start {number + 1} of {starts}: {lived[-1]}", flush=True)
        result = folder / "audit.json"
        status = subprocess.run(limoe("prep", "audit", str(out), "--json", str(result))).returncode
        found = json.loads(result.read_text())
    position, sources = found["position"], Counter()
    for epoch in found["epochs"]:
        sources[Path(epoch["source"]).parent.name] += epoch["once"] + epoch["jumped"]
    return {
        "starts": lived,
        "ranks": sorted({one["ranks"] for one in lived}),
        "killed": sum(one["ended"] == "killed" for one in lived),
        "audit": {
            "exit_status": status,
            "positions": position,
            "stretches_proved_by_checksum": found["checked"],
            "stretches_without_one": found["unchecked"],
            "faults": found["faults"],
            "epochs": [
                {"source": Path(one["source"]).parent.name} | {k: v for k, v in one.items() if k != "source"}
                for one in found["epochs"]
            ],
        },
        "samples": dict(sources),
        "exact_shares": {"a": position * 2 / 3, "b": position / 3},
        # Two sources: never more than half a sample off.
        "shares_hold": abs(sources["a"] - position * 2 / 3) <= 0.5,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args()
    began = time.monotonic()
    figures = origin(MODULE) | measure(options.starts, options.seed)
    figures["seconds"] = round(time.monotonic() - began)
    write_atomically(options.out, json.dumps(figures, indent=2) + "\n")
    print(f"{options.out}: written")
    return figures["audit"]["exit_status"] or int(not figures["shares_hold"])


if __name__ == "__main__":
    sys.exit(main())
