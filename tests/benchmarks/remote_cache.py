"""Shards read from a store through the cache: named ahead by `want` against fetched when they are asked for.

python -m tests.benchmarks.remote_cache --out docs/measured/remote_cache.json

The store is an HTTP server on loopback, in a process of its own, that waits 50 ms before each answer and sends all
answers together at a limited rate. A reader asks for one shard after the other and holds each for a time, as training
does; it names the next ones ahead, or does not. The cache has room for six shards, and is empty at first. `waited_frac`
is the share of the whole time in which the reader had no shard. Cases take turns; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limoe_dist.data.cache import ShardCache, Wanted
from tests.benchmarks.machine import origin
from tests.support.store import Store, shard_bytes

MODULE = "tests.benchmarks.remote_cache"
LATENCY_S = 0.05
ROOM_SHARDS = 6
AHEAD_SHARDS = 4


@dataclass(frozen=True)
class Setting:
    shards: int = 24
    shard_bytes: int = 8_000_000
    bytes_per_s: float = 100e6
    read_s: float = 0.15
    """How long a shard is held. The store needs shard_bytes / bytes_per_s for one, and a latency."""


def serve(setting: Setting) -> None:
    """Until its input ends. Prints the shards as JSON."""
    store = Store()
    wanted = [store.put(f"{i}.arrow", shard_bytes(setting.shard_bytes, i)) for i in range(setting.shards)]
    store.latency_s, store.bytes_per_s = LATENCY_S, setting.bytes_per_s
    print(json.dumps([asdict(one) for one in wanted]), flush=True)
    sys.stdin.read()
    store.close()


def read_all(shards: list[Wanted], setting: Setting, *, ahead: int) -> dict[str, Any]:
    """One reader's way through all shards, with an empty cache. ahead: how many it names before it needs them."""
    with tempfile.TemporaryDirectory() as folder:
        cache = ShardCache(Path(folder) / "cache", limit_bytes=ROOM_SHARDS * setting.shard_bytes)
        start = time.perf_counter()
        for index, one in enumerate(shards):
            if ahead:
                cache.want(shards[index + 1 : index + 1 + ahead])
            with cache.local_path(one.url, bytes=one.bytes, sha256=one.sha256):
                time.sleep(setting.read_s)
        seconds = time.perf_counter() - start
        cache.close()
    counts = cache.counts
    if counts.fetched != len(shards):
        raise RuntimeError(f"{counts.fetched} fetches of {len(shards)} shards")
    return {
        "seconds": seconds,
        "waited_s": counts.waited_s,
        "waited_frac": counts.waited_s / seconds,
        "found_there": counts.hits,
    }


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", MODULE, "--serve", json.dumps(asdict(setting))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        shards = [Wanted(**one) for one in json.loads(server.stdout.readline())]
        turns = [
            {"ahead": read_all(shards, setting, ahead=AHEAD_SHARDS), "not_ahead": read_all(shards, setting, ahead=0)}
            for _ in range(rounds)
        ]
    finally:
        server.communicate("")
    return {case: _medians([turn[case] for turn in turns]) for case in turns[0]}


def _medians(turns: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: round(statistics.median(turn[name] for turn in turns), 4) for name in turns[0]}


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help="used by this program for its server")
    given = parser.parse_args()
    if given.serve:
        serve(Setting(**json.loads(given.serve)))
        return
    setting = Setting()
    report = origin(MODULE) | {
        "what": "shards over HTTP through the cache, named ahead or not: seconds, and the share that the reader waited",
        "setting": asdict(setting)
        | {"latency_s": LATENCY_S, "room_shards": ROOM_SHARDS, "ahead_shards": AHEAD_SHARDS, "rounds": given.rounds},
        "cases": measure(setting, given.rounds),
    }
    text = json.dumps(report, indent=2) + "\n"
    if given.out:
        given.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
