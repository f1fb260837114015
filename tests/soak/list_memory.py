"""Memory of `limoe prep download` over a list of 10 million rows, as the operating system saw it.

python -m tests.soak.list_memory --out docs/measured/list_memory.json

The list is parquet like LAION's; its addresses are private, so that each row goes through the whole command, from the
list to the ledger, without a network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.fetching import ledger
from tests.benchmarks.machine import origin

MODULE = "tests.soak.list_memory"
GROUP_ROWS = 100_000
LIMIT_BYTES = 1_000_000_000
CHILD = """
import sys
from pathlib import Path
from data_prep.cli import main
status = main(sys.argv[1:])
# ru_maxrss would begin at the peak of the process that started this one.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) * 1024)
sys.exit(status)
"""


@dataclass(frozen=True)
class Found:
    rows: int
    peak_bytes: int
    seconds: float


def write_list(path: Path, rows: int) -> None:
    """URL, TEXT, similarity and NSFW of so many rows, written a row group at a time."""
    schema = pa.schema(
        [("URL", pa.string()), ("TEXT", pa.string()), ("similarity", pa.float64()), ("NSFW", pa.string())]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, GROUP_ROWS):
            numbers = range(first, min(rows, first + GROUP_ROWS))
            columns = [
                [f"http://10.0.{number % 256}.1/pictures/{number}/of-a-length-that-is-usual.jpg" for number in numbers],
                [f"a caption of about the usual length, which is that of picture {number}" for number in numbers],
                [number % 97 / 97 for number in numbers],
                ["UNLIKELY"] * len(numbers),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def measure(folder: Path, rows: int, *, rows_per_part: int = 10_000) -> Found:
    """Raises AssertionError where not every row is in the ledger."""
    write_list(folder / "list.parquet", rows)
    words = ["download", "--list", str(folder / "list.parquet"), "--out", str(folder / "out")]
    words += ["--rows-per-part", str(rows_per_part)]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == 1, done.stdout + done.stderr
    assert ledger.totals(folder / "out").rows == {"private_address": rows}
    return Found(rows, int(done.stdout.rpartition("peak ")[2]), seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.rows)
    told: dict[str, Any] = {
        "what": "peak resident memory of the whole command; less than limit_bytes is wanted",
        "rows": found.rows,
        "peak_bytes": found.peak_bytes,
        "limit_bytes": LIMIT_BYTES,
        "seconds": round(found.seconds, 1),
    }
    options.out.write_text(json.dumps(origin(MODULE) | told, indent=2) + "\n")
    print(f"{found.rows} rows, {found.peak_bytes / 1e6:.0f} MB at most, {found.seconds:.0f} s")
    return 1 if found.peak_bytes >= LIMIT_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
