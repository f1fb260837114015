"""A process that reads shards through a cache: python -m tests.support.shard_reader FOLDER LIMIT_BYTES SHARDS.

SHARDS: JSON, a list of [url, bytes, sha256]. Prints "ready", waits for a line, reads each shard once, and prints what
it counted.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from limoe_dist.data.cache import ShardCache, Wanted
from limoe_dist.data.remote import Patience


def main() -> None:
    folder, limit_bytes, shards = sys.argv[1:]
    wanted = [Wanted(*one) for one in json.loads(shards)]
    cache = ShardCache(Path(folder), limit_bytes=int(limit_bytes), patience=Patience(backoff_s=0.01), reserve_bytes=0)
    print("ready", flush=True)
    sys.stdin.readline()
    cache.want(wanted)
    for one in wanted:
        with cache.local_path(one.url, bytes=one.bytes, sha256=one.sha256) as shard:
            assert hashlib.sha256(shard.path.read_bytes()).hexdigest() == one.sha256
    cache.close()
    print(json.dumps(asdict(cache.counts)), flush=True)


if __name__ == "__main__":
    main()
