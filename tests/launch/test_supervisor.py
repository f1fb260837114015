"""Signals go to the ranks below a launcher, each once; who does not end in time is killed. Launchers of a few lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# A rank notes what it gets, and ends so many seconds after the first signal.
RANK = """
import os, signal, sys, time
first = []
def note(number, frame):
    os.write(1, f"rank got {number}\\n".encode())
    first.append(time.monotonic())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
print("rank ready", flush=True)
while not first or time.monotonic() < first[0] + float(sys.argv[1]):
    time.sleep(0.05)
"""
# Starts two of them, one of them late, waits for both, and ends with a status of its own.
LAUNCHER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: print("launcher got 15", flush=True))
ranks = [subprocess.Popen(sys.argv[1:])]
time.sleep(0.5)
ranks.append(subprocess.Popen(sys.argv[1:]))
for rank in ranks:
    rank.wait()
sys.exit(7)
"""
# The command line of `limoe train`, as far as it matters here.
SUPERVISOR = """
import dataclasses, json, os, sys
from launch.supervisor import supervise
from limoe_dist.train.preemption import StopFlag
early = StopFlag()
early._received = int(os.environ["TEST_EARLY"])
command, ranks, grace_s = json.loads(sys.argv[1])
print("supervisor ready", flush=True)
finished = supervise(command, ranks=ranks, environ=os.environ, grace_s=grace_s, early=early)
print(json.dumps(dataclasses.asdict(finished)))
"""


def start(folder: Path, *, save_s: float, grace_s: float, early: int = 0) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK)
    (folder / "launcher.py").write_text(LAUNCHER)
    ranks = [sys.executable, str(folder / "rank.py"), str(save_s)]
    command = [sys.executable, str(folder / "launcher.py"), *ranks]
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, json.dumps([command, ranks, grace_s])],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TEST_EARLY": str(early)},
    )


def wait_for_ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher, and both ranks."""
    assert process.stdout is not None
    ready = 0
    while ready < 2:
        ready += process.stdout.readline() == "rank ready\n"
    return psutil.Process(process.pid).children(recursive=True)


def test_each_rank_gets_each_signal_once_and_the_launcher_none(tmp_path: Path) -> None:
    process = start(tmp_path, save_s=1, grace_s=30)
    wait_for_ranks(process)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=20)[0].splitlines()
    assert sorted(printed[:-1]) == ["rank got 12", "rank got 12", "rank got 15", "rank got 15"]
    assert json.loads(printed[-1]) == {"status": 7, "signal": 12, "killed": False}


def test_a_signal_that_came_before_reaches_ranks_that_start_late(tmp_path: Path) -> None:
    # Python takes longer to start than the look for ranks: one may be ended by it before it can note it.
    process = start(tmp_path, save_s=0, grace_s=30, early=signal.SIGUSR1)
    printed = process.communicate(timeout=20)[0].splitlines()
    assert json.loads(printed[-1]) == {"status": 7, "signal": 10, "killed": False}


def test_ranks_that_take_longer_than_the_grace_are_killed(tmp_path: Path) -> None:
    process = start(tmp_path, save_s=60, grace_s=1)
    below = wait_for_ranks(process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=20)[0].splitlines()
    assert json.loads(printed[-1]) == {"status": -9, "signal": 15, "killed": True}
    assert psutil.wait_procs(below, timeout=10)[1] == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_ranks_whose_launcher_died_get_sigterm_and_time_to_save(number: int, tmp_path: Path) -> None:
    process = start(tmp_path, save_s=1, grace_s=30)
    below = wait_for_ranks(process)
    next(each for each in below if "launcher.py" in each.cmdline()[1]).send_signal(number)
    printed = process.communicate(timeout=20)[0].splitlines()
    assert printed[:-1] == ["rank got 15", "rank got 15"]
    assert json.loads(printed[-1]) == {"status": -number, "signal": 15, "killed": False}


def test_a_killed_command_takes_its_launcher_along(tmp_path: Path) -> None:
    process = start(tmp_path, save_s=0, grace_s=30)
    below = wait_for_ranks(process)
    process.kill()
    assert process.stdout is not None
    assert process.stdout.readline() == "launcher got 15\n"
    for each in below:
        each.kill()
