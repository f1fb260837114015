"""A download whose server does its worst: every row must end in the ledger with its class, and nothing private be met.

python -m tests.soak.download_faults --out docs/measured/download_faults.json

The addresses are of every kind of answer that tests/support/hostile_server.py has, in turn, from a server on several
addresses of loopback; a second server on another port stands for a private one, and counts who asks it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_prep.cli import main as prep
from tests.benchmarks.machine import origin
from tests.support.hostile_server import HostileServer

MODULE = "tests.soak.download_faults"
HOSTS = 8

EXPECTED = {
    "ok": "ok",
    "kind/webp": "ok",
    "chunked": "ok",
    "hop/2": "ok",
    "limited/0": "ok",
    "flaky": "ok",
    "robots/otherbot: noindex": "ok",
    "robots/noai": "robots",
    "robots/limoe-dist: noimageindex": "robots",
    "status/404": "http_4xx",
    "status/500": "http_5xx",
    "status/418": "http_4xx",
    "reset": "broken_off",
    "short": "broken_off",
    "garbage": "bad_http",
    "headers": "bad_http",
    "silent": "timeout",
    "drip": "timeout",
    "drip_header": "timeout",
    "huge": "too_large",
    "endless": "too_large",
    "bomb": "too_many_pixels",
    "gzip": "not_a_picture",
    "html": "not_a_picture",
    "empty": "empty",
    "circle/0": "redirects",
    "nowhere": "redirects",
    "hop/9": "redirects",
    "to/private": "private_address",
    "to/metadata": "private_address",
    "to/ten": "private_address",
    "to/six": "private_address",
    "to/mapped": "private_address",
    "to/name": "private_address",
    "http://127.0.0.1:{private}/ok/1": "private_address",
    "http://localhost:{private}/ok/1": "private_address",
    "http://[::ffff:127.0.0.1]:{private}/ok/1": "private_address",
    "http://2130706433:{private}/ok/1": "private_address",
    "http://user:secret@127.0.0.1:{port}/ok/1": "bad_url",
    "ftp://127.0.0.1:{port}/ok/1": "bad_url",
    "file:///etc/passwd": "bad_url",
    "": "bad_url",
}
"""Class by kind of answer, or by address."""
WHOLE = ("kind/webp", "circle/0", "hop/2", "hop/9", "robots/")
"""Paths that a number behind them would change."""


@dataclass(frozen=True)
class Found:
    rows: int
    by_class: dict[str, int]
    wrong: list[str]
    """Rows that ended otherwise than their kind does, that are missing, or that are there twice."""
    private_hits: int
    seconds: float


def fault_run(folder: Path, rows: int) -> Found:
    """Downloads `rows` addresses of all kinds in turn into folder/out by the command itself."""
    with HostileServer(hosts=HOSTS) as server, HostileServer() as private:
        server.targets = {
            "private": private.url("ok", 1),
            "metadata": "http://169.254.169.254/latest/meta-data",
            "ten": "http://10.0.0.1/",
            "six": f"http://[::1]:{private.port}/ok/1",
            "mapped": f"http://[::ffff:127.0.0.1]:{private.port}/ok/1",
            "name": f"http://localhost:{private.port}/ok/1",
        }
        kinds = [list(EXPECTED)[number % len(EXPECTED)] for number in range(rows)]
        with (folder / "list.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["url", "caption"])
            writer.writerows([_url(server, private, kind, number), kind] for number, kind in enumerate(kinds))
        out, began = folder / "out", time.monotonic()
        words = ["--list", str(folder / "list.csv"), "--out", str(out), "--timeout", "2", "--max-mb", "2"]
        words += ["--allow-private", f"127.0.0.0/8:{server.port}", "--rows-per-part", "1000", "--connections", "64"]
        status = prep(["download", *words])
        seconds = time.monotonic() - began
        # A connection is too much already, whatever is asked for through it.
        hits = private.connections
    ended = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    wrong = [] if status == 0 else [f"the command ended with {status}"]
    if [row["row"] for row in ended] != list(range(rows)):
        wrong.append(f"{len(ended)} rows in the ledger, {rows} in the list")
    wrong += [
        f"row {row['row']} ({row['caption']}): {row['error']}: {row['message']}, tries {row['tries']}"
        for row in ended
        if row["error"] != EXPECTED[row["caption"]]
    ]
    return Found(rows, dict(Counter(row["error"] for row in ended).most_common()), wrong, hits, seconds)


def _url(server: HostileServer, private: HostileServer, kind: str, number: int) -> str:
    if not kind or "://" in kind:
        return kind.format(private=private.port, port=server.port)
    name, _, rest = kind.partition("/")
    if not rest:
        return server.url(name, number)
    host = server.url("", number).removesuffix(f"//{number}")
    return f"{host}/{kind}" if kind.startswith(WHOLE) else f"{host}/{kind}/{number}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=5_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = fault_run(Path(folder), options.rows)
    told: dict[str, Any] = {
        "what": "addresses of all kinds in turn; no wrong row and no private hit are wanted",
        "kinds": len(EXPECTED),
        "rows": found.rows,
        "seconds": round(found.seconds, 1),
        "by_class": found.by_class,
        "wrong_rows": found.wrong,
        "private_hits": found.private_hits,
    }
    options.out.write_text(json.dumps(origin(MODULE) | told, indent=2) + "\n")
    print(f"{found.rows} rows in {found.seconds:.0f} s, {len(found.wrong)} wrong, {found.private_hits} private hits")
    return 1 if found.wrong or found.private_hits else 0


if __name__ == "__main__":
    sys.exit(main())
