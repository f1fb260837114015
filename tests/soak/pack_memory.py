"""Peak memory of `limoe prep pack` over a list of 10 million rows: the command and its workers together.

python -m tests.soak.pack_memory --out docs/measured/pack_memory.json [--rows 10000000] [--workers 2]

The rows are those of a synthetic parquet source; nearly all have no picture behind their bytes and are rejected with a
reason, so that what is measured is the plan, the reading, and the accounts, not the work on pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.machine import origin
from tests.data_prep.pictures_of import encoded, noisy

MODULE = "tests.soak.pack_memory"
FILE_ROWS = 1_000_000
GROUP_ROWS = 8_192
GOOD_EVERY = 1_000


def write_lists(folder: Path, rows: int) -> None:
    """Parquet files of at most FILE_ROWS rows with `image` and `caption`; one row in GOOD_EVERY has a picture."""
    folder.mkdir()
    picture = encoded(noisy(1))
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
        with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", schema) as writer:
            for start in range(first, min(first + FILE_ROWS, rows), GROUP_ROWS):
                count = min(GROUP_ROWS, min(first + FILE_ROWS, rows) - start)
                images = [picture if (start + n) % GOOD_EVERY == 0 else b"none" for n in range(count)]
                captions = [f"caption number {start + n}" for n in range(count)]
                writer.write_table(pa.table({"image": pa.array(images, pa.binary()), "caption": captions}, schema))


def measure(folder: Path, *, rows: int, workers: int) -> dict[str, Any]:
    write_lists(folder / "lists", rows)
    words = ["prep", "pack", "--source", f"parquet:{folder / 'lists'}", "--out", str(folder / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "limoe_dist", *words, "--workers", str(workers)], env=environment)
    peak, peak_processes = 0, 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        held = _tree_bytes(root)
        peak, peak_processes = max(peak, sum(held)), max(peak_processes, len(held))
        time.sleep(0.1)
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"pack ended with {process.returncode}")
    note = json.loads((folder / "out" / "pack.json").read_text())
    assert note["rows"] + note["rejected"] == rows
    return {
        "rows": rows,
        "workers": workers,
        "processes": peak_processes,
        "packed": note["rows"],
        "rejected": note["rejected"],
        "peak_rss_mb": round(peak / 1e6, 1),
        "seconds": round(seconds, 1),
        "microseconds_a_row": round(seconds / rows * 1e6, 1),
    }


def _tree_bytes(root: psutil.Process) -> list[int]:
    """Unique memory of each live process of a tree: what they share, as the packages' code, is counted once."""
    held = []
    try:
        for process in [root, *root.children(recursive=True)]:
            memory = process.memory_full_info()
            held.append(memory.rss if process == root else memory.uss)
    except psutil.Error:
        pass
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), rows=given.rows, workers=given.workers)
    given.out.write_text(json.dumps({**origin(MODULE), **figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
