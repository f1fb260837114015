"""What `limoe prep verify`, `stats` and `tokenizer` cost on many rows: time and memory, each in a process of its own.

python -m tests.benchmarks.prep_reports --rows 10000000 --out docs/measured/prep_reports.json

The set is generated: one small picture in every row, so that what costs by the row shows, and captions of 3 to 12 words
from a vocabulary of 50,000 by Zipf's law. A row is about 450 bytes; 10 million need 5 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from limoe_dist.data.manifest import Manifest, Shard, Source, save_manifest, sha256_of
from tests.benchmarks.machine import origin
from tests.support.shards import picture

MODULE = "tests.benchmarks.prep_reports"
SHARD_ROWS, BATCH_ROWS = 250_000, 256
WORDS = 50_000
MOST_RSS_BYTES = 1_000_000_000


def write_set(folder: Path, rows: int) -> Path:
    """Keys, captions and concepts differ from row to row; the pictures are 1,000 different ones."""
    draw = np.random.default_rng(0)
    pictures = [picture(number, size=12) for number in range(1000)]
    sums = [hashlib.sha256(content).hexdigest() for content in pictures]
    text = pa.string()
    names = ("key", "image", "captions", "concept", "width", "height", "sha256", "source")
    types = (text, pa.binary(), pa.list_(text), text, pa.int32(), pa.int32(), text, text)
    schema = pa.schema(list(zip(names, types, strict=True)))
    shards = []
    for first in range(0, rows, SHARD_ROWS):
        file = folder / f"shard-{first // SHARD_ROWS:05d}.arrow"
        count = min(SHARD_ROWS, rows - first)
        with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_file(opened, schema) as writer:
            for start in range(first, first + count, BATCH_ROWS):
                numbers = range(start, min(start + BATCH_ROWS, first + count))
                lengths = draw.integers(3, 13, len(numbers))
                words = iter((draw.zipf(1.3, int(lengths.sum())) % WORDS).tolist())
                captions = [[" ".join(f"word{next(words)}" for _ in range(length))] for length in lengths]
                which = [number % 1000 for number in numbers]
                columns = [
                    [f"list/{number:09d}" for number in numbers],
                    [pictures[one] for one in which],
                    captions,
                    [f"concept {number % 977}" for number in numbers],
                    [12] * len(which),
                    [12] * len(which),
                    [sums[one] for one in which],
                    ["list"] * len(which),
                ]
                arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        shards.append(Shard(file=file.name, rows=count, bytes=file.stat().st_size, sha256=sha256_of(file)))
    sources = (Source(name="list", rows=rows, license="CC0-1.0"),)
    save_manifest(
        Manifest(name="generated", rows=rows, shards=tuple(shards), sources=sources), folder / "manifest.json"
    )
    return folder / "manifest.json"


# A child starts with its parent's peak in ru_maxrss; VmHWM belongs to what it runs itself.
CHILD = """
import sys
from pathlib import Path
from launch.cli import main

status = main(sys.argv[2:])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
Path(sys.argv[1]).write_text(peak.split()[1])
sys.exit(status)
"""


def measured(command: list[str], rows: int, folder: Path) -> dict[str, Any]:
    """Runs `limoe COMMAND` in a process of its own, to its end."""
    began, peak = time.monotonic(), folder / "peak"
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", CHILD, str(peak), *command], os.environ)
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - began
    if status:
        raise SystemExit(f"limoe {' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "command": " ".join(["limoe", *(Path(part).name if os.sep in part else part for part in command)]),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "cpu_microseconds_a_row": round(1e6 * (usage.ru_utime + usage.ru_stime) / rows, 2),
        "peak_rss_bytes": int(peak.read_text()) * 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="limoe-prep-reports-") as folder:
        file = str(write_set(Path(folder), given.rows))
        shards = list(Path(folder).glob("*.arrow"))
        commands = {
            "verify": ["prep", "verify", file, "--workers", "1"],
            "stats": ["prep", "stats", file, "--out", str(Path(folder) / "stats")],
            "tokenizer": ["prep", "tokenizer", "--data", file, "--vocab-size", "8000", "--sample", "100000"],
        }
        runs = {name: measured(command, given.rows, Path(folder)) for name, command in commands.items()}
        size = sum(shard.stat().st_size for shard in shards)
        page = (Path(folder) / "stats/stats.html").stat().st_size
    content = {
        **origin(MODULE),
        "rows": given.rows,
        "shards": len(shards),
        "bytes": size,
        "page_bytes": page,
        "memory": "resident set as the kernel counts it, with the pages of mapped shards, which it may take back",
        "runs": runs,
    }
    given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=2))
    return 0 if all(run["peak_rss_bytes"] < MOST_RSS_BYTES for run in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
