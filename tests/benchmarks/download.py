"""`limoe prep download` against img2dataset: the same list, from one server on loopback, interleaved; medians.

    python -m tests.benchmarks.download --peer PYTHON --out docs/measured/download.json

PYTHON has tests/benchmarks/requirements-pipelines.txt installed. The server runs in a process of its own and serves
JPEGs of 20 to 60 kB as fast as it can. Both sides write WebDataset tars of the pictures as they came, with as many
connections (img2dataset: threads) and parts of the same size. img2dataset runs with 1 and with 2 processes, and once
as it is used most, with its resize to 256; its faster setting counts. A run is a whole command, start and end
included; the same commands for eight pictures tell what starting takes, and the rates without that are there too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.machine import origin

MODULE = "tests.benchmarks.download"
SIDE = 288
"""Of the pictures, in pixels: 20 to 60 kB each."""
PEER = """
import json, sys
from img2dataset import download
if __name__ == "__main__":
    download(**json.loads(sys.argv[1]))
"""


class Server:
    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hostile_server", str(SIDE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def cpu_s(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system


def ours(folder: Path, port: int, connections: int, rows_per_part: int) -> list[str]:
    return [
        *(sys.executable, "-m", "limoe_dist", "prep", "download"),
        *("--list", str(folder / "list.csv"), "--out", str(folder / "out")),
        *("--connections", str(connections), "--per-host", str(connections), "--retries", "0"),
        *("--rows-per-part", str(rows_per_part), "--allow-private", f"127.0.0.1:{port}"),
    ]


def theirs(folder: Path, python: str, connections: int, rows_per_part: int, processes: int, resize: str) -> list[str]:
    options: dict[str, Any] = {
        "url_list": str(folder / "list.csv"),
        "input_format": "csv",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": str(folder / "out"),
        "processes_count": processes,
        "thread_count": connections // processes,
        "number_sample_per_shard": rows_per_part,
        "enable_wandb": False,
        "retries": 0,
    }
    if resize == "no":
        options |= {"resize_mode": "no", "disable_all_reencoding": True}
    else:
        options |= {"image_size": 256, "resize_mode": "keep_ratio"}
    return [python, str(folder / "peer.py"), json.dumps(options)]


def timed(command: list[str], folder: Path, server: Server) -> dict[str, float]:
    """Seconds and processor seconds of a command with its children, the server's, and pictures in its tars."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    before, began = server.cpu_s(), time.monotonic()
    with (folder / "printed.txt").open("w") as printed:
        process = psutil.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        cpu = _cpu_until_end(process)
    seconds = time.monotonic() - began
    pictures = 0
    for path in (folder / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            pictures += sum(name.endswith(".jpg") for name in tar.getnames())
    if process.returncode:
        raise SystemExit((folder / "printed.txt").read_text()[-3000:])
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "server_cpu_seconds": server.cpu_s() - before,
        "pictures": pictures,
        "pictures_per_s": pictures / seconds,
    }


def _cpu_until_end(process: psutil.Popen) -> float:
    """Of the command and its children, as last seen every 50 ms."""
    seen: dict[int, float] = {}
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for one in (process, *process.children(recursive=True)):
                times = one.cpu_times()
                seen[one.pid] = times.user + times.system
        time.sleep(0.05)
    return sum(seen.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--peer", help="python with img2dataset; without it only ours is measured")
    parser.add_argument("--pictures", type=int, default=4_000)
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--rows-per-part", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    with Server() as server, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        addresses = [
            f"http://127.0.0.1:{server.port}/ok/{number},caption {number}" for number in range(options.pictures)
        ]
        (folder / "list.csv").write_text("\n".join(["url,caption", *addresses]) + "\n")
        (folder / "peer.py").write_text(PEER)
        commands = {"limoe": ours(folder, server.port, options.connections, options.rows_per_part)}
        if options.peer:
            for name, processes, resize in (
                ("img2dataset, 1 process", 1, "no"),
                ("img2dataset, 2 processes", 2, "no"),
                ("img2dataset, 2 processes, resize 256", 2, "256"),
            ):
                commands[name] = theirs(
                    folder, options.peer, options.connections, options.rows_per_part, processes, resize
                )
        startup = {
            name: timed(_of_few(command, folder), folder, server)["seconds"] for name, command in commands.items()
        }
        for number in range(options.runs):
            for name, command in commands.items():
                found = timed(command, folder, server)
                runs.setdefault(name, []).append(found)
                print(f"{number + 1}: {name}: {found['pictures_per_s']:.0f} pictures/s", flush=True)
    figures = {name: _medians(found) for name, found in runs.items()}
    as_came = [
        one["pictures_per_s"] for name, one in figures.items() if name.startswith("img2") and "resize" not in name
    ]
    told: dict[str, Any] = {
        "what": "whole commands, from a list of addresses to WebDataset tars; medians of interleaved runs",
        "pictures": options.pictures,
        "connections": options.connections,
        "runs": options.runs,
        "medians": figures,
    }
    if as_came:
        told["limoe_over_faster_img2dataset"] = round(figures["limoe"]["pictures_per_s"] / max(as_came), 2)
        without = {name: options.pictures / (figures[name]["seconds"] - startup[name]) for name in commands}
        fastest = max(rate for name, rate in without.items() if name.startswith("img2") and "resize" not in name)
        told["without_startup"] = {
            "startup_seconds": {name: round(seconds, 2) for name, seconds in startup.items()},
            "pictures_per_s": {name: round(rate, 1) for name, rate in without.items()},
            "limoe_over_faster_img2dataset": round(without["limoe"] / fastest, 2),
        }
    told["all"] = runs
    options.out.write_text(json.dumps(origin(MODULE) | told, indent=2) + "\n")
    print(json.dumps({name: one["pictures_per_s"] for name, one in figures.items()}, indent=2))
    return 0


def _of_few(command: list[str], folder: Path) -> list[str]:
    """The same command for a list of eight pictures: what it takes to start and to end."""
    few = folder / "few.csv"
    few.write_text("\n".join((folder / "list.csv").read_text().split("\n", 9)[:9]) + "\n")
    return [word.replace(str(folder / "list.csv"), str(few)) for word in command]


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in runs), 3) for name in runs[0]}


if __name__ == "__main__":
    sys.exit(main())
