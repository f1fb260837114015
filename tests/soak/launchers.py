"""A save of 60 s under every launcher: who waits for it, and what becomes of the exit status.

python -m tests.soak.launchers --out docs/measured/launchers.json

A run of two ranks gets a signal in its third step and then takes save_s seconds to save. Started by `limoe train
--ranks 2 --launcher X`, and by hand; the signal goes to the process that was started, or to the ranks. Eight pass at a
time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from limoe_dist.checkpoint.manifest import NAME
from limoe_dist.train.folder import read_end
from tests.benchmarks.machine import origin
from tests.support.shards import write_shards
from tests.support.signalled import environment, ranks_below, training

MODULE = "tests.soak.launchers"
PYTHON = [sys.executable, "-m"]
TORCHRUN = "torchrun --nproc-per-node 2"
CAUGHT = "--signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGUSR2"
"""By default torchrun does not catch the last two."""
DEEPSPEED = "deepspeed --num_gpus 2 --master_port {port} --no_local_rank --module"
MPIRUN = "mpirun --allow-run-as-root --oversubscribe -n 2"


@dataclass(frozen=True)
class Case:
    launcher: str
    """Words before `limoe_dist`; empty: `limoe train --launcher`."""
    signal: str
    to: str = "launcher"
    """Or `ranks`."""
    option: str = ""


CASES = [
    *[
        Case("", name, option=launcher)
        for launcher in ("torchrun", "mpirun", "deepspeed")
        for name in ("SIGUSR2", "SIGTERM")
    ],
    Case(f"{TORCHRUN} -m", "SIGTERM"),
    Case(f"{TORCHRUN} -m", "SIGUSR2"),
    Case(f"{TORCHRUN} --shutdown-timeout 120 -m", "SIGTERM"),
    Case(f"{TORCHRUN} --shutdown-timeout 120 {CAUGHT} -m", "SIGUSR2"),
    Case(f"{TORCHRUN} -m", "SIGUSR2", to="ranks"),
    Case(MPIRUN, "SIGTERM"),
    Case(MPIRUN, "SIGUSR2"),
    Case(MPIRUN, "SIGTERM", to="ranks"),
    Case(DEEPSPEED, "SIGTERM"),
    Case(DEEPSPEED, "SIGUSR2", to="ranks"),
]


def measured(case: Case, folder: Path, data: Path, save_s: float, port: int) -> dict[str, Any]:
    folder.mkdir()
    out = folder / "run"
    words = training(data, out, "--train.steps", "100000")
    environ = environment(folder, TEST_SAVE_SECONDS=str(save_s))
    with (folder / "printed.txt").open("w") as printed:
        process = subprocess.Popen(_command(case, words, port), stdout=printed, stderr=printed, env=environ)
        below: list[psutil.Process] = []
        try:
            below = _send_in_training(case, process, folder / "printed.txt")
            began = time.monotonic()
            status = process.wait(save_s + 120)
            seconds = time.monotonic() - began
            # Where the launcher is gone and they are not, nobody waits for them.
            left = any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in below)
            psutil.wait_procs(below, timeout=save_s + 30)
        finally:
            _kill([process, *below])
    ended = read_end(out)
    return {
        "launcher": case.launcher.format(port="PORT") or f"limoe train --ranks 2 --launcher {case.option}",
        "signal": case.signal,
        "sent_to": case.to,
        "status": 128 - status if status < 0 else status,
        "seconds": round(seconds, 1),
        "saved": bool(list(out.glob(f"checkpoints/step-*/{NAME}"))),
        "status_in_ended_json": None if ended is None else ended.status,
        "ranks_outlived_the_launcher": left,
    }


def _command(case: Case, words: list[str], port: int) -> list[str]:
    if not case.launcher:
        return [*PYTHON, "limoe_dist", *words, "--ranks", "2", "--launcher", case.option]
    name, *options = case.launcher.format(port=port).split()
    program = shutil.which(name, path=str(Path(sys.executable).parent))
    assert program, f"the environment has no {name}: pip install -r requirements.txt"
    return [program, *options, *([sys.executable, "-u", "-m"] if name == "mpirun" else []), "limoe_dist", *words]


def _send_in_training(case: Case, process: subprocess.Popen[bytes], printed: Path) -> list[psutil.Process]:
    """Returns all processes below it."""
    while "step 3/" not in printed.read_text():
        assert process.poll() is None, printed.read_text()
        time.sleep(0.1)
    below = psutil.Process(process.pid).children(recursive=True)
    number = signal.Signals[case.signal]
    if case.to == "launcher":
        process.send_signal(number)
    else:
        for rank in ranks_below(process.pid):
            rank.send_signal(number)
    return below


def _kill(processes: list[Any]) -> None:
    for process in processes:
        with suppress(psutil.Error, OSError):
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save-s", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(8) as pool:
        data = write_shards(Path(folder) / "shards", rows=64)
        waiting = [
            pool.submit(measured, case, Path(folder) / f"case-{place}", data, options.save_s, 29_600 + place)
            for place, case in enumerate(CASES)
        ]
        rows = [each.result() for each in waiting]
    ours = [row for row in rows if row["launcher"].startswith("limoe train")]
    wanted = {"SIGUSR2": 75, "SIGTERM": 143}
    good = all(row["saved"] and row["status"] == wanted[row["signal"]] for row in ours)
    content = origin(MODULE) | {"save_s": options.save_s, "limoe_train_waits_and_keeps_the_status": good, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
