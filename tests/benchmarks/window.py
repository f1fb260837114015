"""What data.window_rows costs and buys: reads from a cold disk, fetches from a store, and how mixed a batch is.

python -m tests.benchmarks.window --out docs/measured/window.json

One set of shards whose rows are sorted, the worst case: every shard holds one class. For each window, over one epoch of
batches of 1,024 pairs: megabytes a second from a disk whose cache has been dropped for these files (interleaved,
medians), how often a shard would be fetched where the cache of a host holds a quarter of the set, shards in a batch,
and the spread of a class's share from batch to batch beside that of a whole permutation, which is chance alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa

from limoe_dist.config.parse import write_atomically
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.manifest import Manifest, Shard, save_manifest
from limoe_dist.data.order import SourceOrder
from tests.benchmarks.machine import origin

MODULE = "tests.benchmarks.window"
BATCH = 1024
ROW_BYTES = 20_000
SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "image": pa.binary(),
        "captions": pa.list_(pa.string()),
        "concept": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "sha256": pa.string(),
        "source": pa.string(),
    }
)


def write_set(folder: Path, *, shards: int, shard_rows: int) -> Path:
    """Shards of rows of ROW_BYTES random bytes: what is measured is reading, not decoding."""
    chance = np.random.default_rng(0)
    entries = []
    for number in range(shards):
        file = folder / f"shard-{number:05d}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for first in range(0, shard_rows, 256):
                count = min(256, shard_rows - first)
                pictures = [chance.bytes(ROW_BYTES) for _ in range(count)]
                keys = [f"{number}/{first + i}" for i in range(count)]
                zeros, names = pa.array([1] * count, pa.int32()), pa.array([f"class {number}"] * count)
                columns = [keys, pictures, [["a caption"]] * count, names, zeros, zeros, keys, names]
                writer.write_batch(
                    pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)
                )
        entries.append(Shard(file=file.name, rows=shard_rows, bytes=file.stat().st_size, sha256=str(number)))
    save_manifest(Manifest(rows=shards * shard_rows, shards=tuple(entries)), folder / "manifest.json")
    return folder / "manifest.json"


def drop_cache(folder: Path) -> None:
    """The pages of these files leave the cache, so that the next read is from the disk."""
    for file in folder.glob("*.arrow"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_epoch(manifest: Path, order: SourceOrder) -> float:
    """Megabytes a second of pictures."""
    drop_cache(manifest.parent)
    shards, total = ShardSet(manifest), 0
    shards.most_open = order.shards_of_a_window
    began = time.perf_counter()
    for first in range(0, order.rows, BATCH):
        for row in order.at(np.arange(first, min(first + BATCH, order.rows)))[1].tolist():
            # Every page of the picture is touched.
            total += len(shards.row(row).image.tobytes())
    return total / 1e6 / (time.perf_counter() - began)


def fetches(order: SourceOrder, *, room: int) -> float:
    """How often a shard is fetched in an epoch, on average, where a cache holds the last `room` shards."""
    ends, held, count = np.cumsum(order.shard_rows), OrderedDict[int, None](), 0
    for first in range(0, order.rows, BATCH):
        rows = order.at(np.arange(first, min(first + BATCH, order.rows)))[1]
        for shard in np.searchsorted(ends, rows, side="right").tolist():
            if shard not in held:
                count += 1
                if len(held) == room:
                    held.popitem(last=False)
            held[shard] = None
            held.move_to_end(shard)
    return count / len(order.shard_rows)


def mixing(order: SourceOrder) -> dict[str, float]:
    """Shards in a batch, and the standard deviation of a class's share over the batches, in units of chance."""
    ends, shares, shards = np.cumsum(order.shard_rows), [], []
    for epoch in range(2):
        for first in range(0, order.rows - BATCH + 1, BATCH):
            rows = order.at(epoch * order.rows + np.arange(first, first + BATCH))[1]
            counts = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(ends))
            shares.append(counts / BATCH)
            shards.append(int((counts > 0).sum()))
    share = 1 / len(ends)
    chance = np.sqrt(share * (1 - share) / BATCH)
    return {"shards_in_a_batch": median(shards), "spread_of_a_class": float(np.std(shares) / chance)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1024, help="of a shard")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows, speeds = options.shards * options.rows, dict[int, list[float]]()
    windows = [0, *(rows // part for part in (2, 4, 8, 16)), 2 * options.rows]
    orders = {window: SourceOrder((options.rows,) * options.shards, seed=0, window_rows=window) for window in windows}
    with tempfile.TemporaryDirectory(dir=options.out.absolute().parent) as folder:
        manifest = write_set(Path(folder), shards=options.shards, shard_rows=options.rows)
        for _ in range(options.repeats):
            for window, order in orders.items():
                speeds.setdefault(window, []).append(read_epoch(manifest, order))
    lines: list[dict[str, Any]] = [
        {
            "window_rows": window,
            "shards_of_a_window": order.shards_of_a_window,
            "cold_disk_mb_s": round(median(speeds[window]), 1),
            "fetches_a_shard_with_a_quarter_cached": round(fetches(order, room=options.shards // 4), 2),
            **{name: round(value, 2) for name, value in mixing(order).items()},
        }
        for window, order in orders.items()
    ]
    figures = {"rows": rows, "shards": options.shards, "row_bytes": ROW_BYTES, "batch": BATCH, "windows": lines}
    write_atomically(options.out, json.dumps(origin(MODULE) | figures, indent=2) + "\n")
    for line in lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
