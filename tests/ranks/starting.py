"""Ranks that come late, differ, raise, hang or are killed: what each rank of tests/ranks/test_start.py runs.

`main` stands in the table of the `limoe` command there, so that errors take the way that they take for a user.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch import cli
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Parallel
from limoe_dist.parallel.bootstrap import start
from limoe_dist.parallel.collectives import raise_together, sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.faults import fault_file

LIMIT_S = 60.0
FOREVER_S = 300.0


def meet(mesh: Mesh, rank: int) -> None:
    sum_over(torch.ones(3), mesh.world)
    # Text and end of line in one piece: the ranks share one pipe.
    print(f"rank {rank} met\n", end="", flush=True)


def one_raises(mesh: Mesh, rank: int) -> None:
    raising = int(os.environ["TEST_RANK"])
    meet(mesh, rank)
    if rank == raising:
        time.sleep(0.5)
        raise KeyError("planted")
    sum_over(torch.ones(3), mesh.world)


def one_has_a_problem(mesh: Mesh, rank: int) -> None:
    if rank == 1:
        raise UserError("only rank 1 has this problem")
    sum_over(torch.ones(3), mesh.world)


def all_have_a_problem(mesh: Mesh, rank: int) -> None:
    raise_together(["shard 7 is missing"] if rank == 1 else [], mesh.world, torch.device("cpu"))


def one_sleeps(mesh: Mesh, rank: int) -> None:
    meet(mesh, rank)
    if rank == 1:
        fall_asleep()
    sum_over(torch.ones(5, dtype=torch.float64), mesh.world)


def fall_asleep() -> None:
    time.sleep(FOREVER_S)


def one_is_killed(mesh: Mesh, rank: int) -> None:
    meet(mesh, rank)
    if rank == int(os.environ["TEST_RANK"]):
        os.kill(os.getpid(), signal.SIGKILL)
    sum_over(torch.ones(3), mesh.world)


def one_is_stopped(mesh: Mesh, rank: int) -> None:
    meet(mesh, rank)
    if rank == int(os.environ["TEST_RANK"]):
        os.kill(os.getpid(), signal.SIGSTOP)
    sum_over(torch.ones(3), mesh.world)


def one_leaves_late(mesh: Mesh, rank: int) -> None:
    meet(mesh, rank)
    if rank == 1:
        time.sleep(2.5)


def main(argv: list[str]) -> int:
    """Runs the scenario as often as told; the numbers come from the environment, as a launcher's do."""
    scenario: Callable[[Mesh, int], None] = globals()[argv[0]]
    parallel = Parallel(
        start_timeout_s=float(os.environ["TEST_START_S"]), timeout_s=float(os.environ["TEST_TIMEOUT_S"])
    )
    agree = {name: value for name, _, value in (pair.partition("=") for pair in argv[1:])}
    problem, on_fault = os.environ.get("TEST_PROBLEM", ""), fault_file(Path(os.environ["TEST_RUN"]), os.environ)
    for _ in range(int(os.environ["TEST_STARTS"])):
        with start(parallel, os.environ, agree=agree, problem=problem, on_fault=on_fault) as (mesh, _):
            scenario(mesh, mesh.rank)
    return 0


@dataclass(frozen=True)
class Ended:
    statuses: dict[int, int]
    """Exit status by rank; minus the signal's number where a signal ended it."""
    printed: str
    """What all ranks printed, in the order in which they did."""
    faults: list[dict[str, Any]]
    """The lines of faults.jsonl."""
    seconds: float


def run_ranks(
    scenario: str,
    folder: Path,
    *,
    world: int,
    ranks: Iterable[int] | None = None,
    words: Mapping[int, list[str]] | None = None,
    problems: Mapping[int, str] | None = None,
    start_s: float = LIMIT_S,
    timeout_s: float = LIMIT_S,
    rank: int = 1,
    starts: int = 1,
    launchers_store: bool = False,
    awaits: Iterable[int] | None = None,
    hosts: Mapping[int, str] | None = None,
) -> Ended:
    """Starts ranks (by default all of `world`) as processes of their own, and waits until they have ended.

    words: by rank, what it is started with, as name=value. problems: by rank, what it found before. rank: which one the
    scenario is about. launchers_store: the store is this process's, as it is torchrun's, instead of rank 0's.
    awaits: the others are killed after these. hosts: by rank, what Slurm calls its host; else it has its own name.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if launchers_store else None
    environ = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port if store else _free_port()),
        "TORCHELASTIC_USE_AGENT_STORE": str(launchers_store),
        "TEST_START_S": str(start_s),
        "TEST_TIMEOUT_S": str(timeout_s),
        "TEST_RANK": str(rank),
        "TEST_STARTS": str(starts),
        "TEST_RUN": str(folder / "run"),
    }
    # One process imports torch, once; ranks are forks of it, before any thread was started there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    output = folder / "printed.txt"
    processes, began = {}, time.monotonic()
    for number in range(world) if ranks is None else ranks:
        own = environ | {"RANK": str(number), "LOCAL_RANK": str(number)}
        own["SLURMD_NODENAME"] = (hosts or {}).get(number, "")
        own["TEST_PROBLEM"] = (problems or {}).get(number, "")
        command = [scenario, *(words or {}).get(number, [])]
        processes[number] = context.Process(target=_serve, args=(command, own, output), daemon=True)
    try:
        for process in processes.values():
            process.start()
        deadline = time.monotonic() + LIMIT_S
        for number in processes if awaits is None else awaits:
            processes[number].join(deadline - time.monotonic())
        seconds = time.monotonic() - began
        statuses = {number: process.exitcode for number, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    faults = folder / "run" / "faults.jsonl"
    lines = faults.read_text().splitlines() if faults.exists() else []
    return Ended(statuses, output.read_text(), [json.loads(line) for line in lines], seconds)


def _serve(command: list[str], environ: dict[str, str], output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environ)
    cli.COMMANDS["starting"] = (__name__, "")
    sys.exit(cli.main(["starting", *command]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
