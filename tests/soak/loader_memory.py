"""Does the loader's memory stay where it is, epoch after epoch?

python -m tests.soak.loader_memory --out docs/measured/loader_memory.json

Many shards, windows of a few of them, bad rows among them, three epochs. Read at each tenth of an epoch: the process's
own memory (anonymous pages) and the pages of mapped shards. Exit status 1 where one of them grows by more than
MOST_GROWTH_MB after the first epoch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from limoe_dist.config.parse import write_atomically
from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.loader import Loader
from limoe_dist.data.tokenizer import open_tokenizer
from tests.benchmarks.machine import origin
from tests.support.shards import write_shards

MODULE = "tests.soak.loader_memory"
MOST_GROWTH_MB = 32.0


def memory_mb() -> dict[str, float]:
    """The process's own memory, and mapped files, in megabytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def a_run(manifest: Path, *, rows: int, batch_pairs: int, epochs: int, window_rows: int) -> Run:
    tiny = preset("tiny")
    return tiny.model_copy(
        update={
            "data": tiny.data.model_copy(
                update={"manifest": str(manifest), "window_rows": window_rows, "max_bad_frac": 1.0}
            ),
            "train": tiny.train.model_copy(update={"batch_pairs": batch_pairs, "steps": epochs * rows // batch_pairs}),
            "text": tiny.text.model_copy(update={"vocab_size": 32}),
        }
    )


def watch(run: Run, *, rows: int) -> list[dict[str, float]]:
    """Memory at every tenth of an epoch."""
    shards = ShardSet(run.data.manifest)
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    seen, marks = 0, []
    with Loader(run, shards, tokenizer, rank=0, world=1, first_step=0, device=torch.device("cpu")) as loader:
        for batch in loader:
            before, seen = seen, seen + len(batch.rows)
            if before * 10 // rows != seen * 10 // rows:
                gc.collect()
                marks.append({"epoch": round(seen / rows, 3)} | {k: round(v, 1) for k, v in memory_mb().items()})
    shards.close()
    return marks


def growth(marks: list[dict[str, float]], name: str) -> float:
    """Megabytes between the largest value of the first epoch and the largest after it."""
    first = [mark[name] for mark in marks if mark["epoch"] <= 1]
    later = [mark[name] for mark in marks if mark["epoch"] > 1]
    return round(max(later) - max(first), 1)


def measure(*, rows: int, shards: int, size: int, batch_pairs: int, window_rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        bad = dict.fromkeys(range(0, rows, 97), b"")
        manifest = write_shards(Path(folder), rows=rows, shards=shards, size=size, pictures=bad)
        data_mb = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        run = a_run(manifest, rows=rows, batch_pairs=batch_pairs, epochs=3, window_rows=window_rows)
        began = time.monotonic()
        marks = watch(run, rows=rows)
    return {
        "rows": rows,
        "shards": shards,
        "data_mb": round(data_mb, 1),
        "window_rows": window_rows,
        "growth_after_the_first_epoch_mb": {name: growth(marks, name) for name in ("own", "mapped")},
        "seconds": round(time.monotonic() - began, 1),
        "marks_mb": marks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24_000)
    options = parser.parse_args()
    shards = options.rows // 40
    figures = measure(rows=options.rows, shards=shards, size=160, batch_pairs=64, window_rows=40 * 24)
    write_atomically(options.out, json.dumps(origin(MODULE) | figures, indent=2) + "\n")
    grown = figures["growth_after_the_first_epoch_mb"]
    print(json.dumps(grown), f"MB; {options.out}: written")
    return int(max(grown.values()) > MOST_GROWTH_MB)


if __name__ == "__main__":
    sys.exit(main())
