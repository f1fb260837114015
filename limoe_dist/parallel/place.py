"""From the environment of a started process to its rank: torchrun, SLURM, MPI, or alone. Imports no torch."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from limoe_dist.config.errors import UserError


@dataclass(frozen=True)
class Place:
    """This process among all of a run."""

    rank: int
    world: int
    local_rank: int
    """Among the ranks of this host; picks the GPU."""
    address: str
    """Host name or address of rank 0; empty where world is 1, or where MPI has to tell it."""
    port: int
    found_by: Literal["torchrun", "SLURM", "MPI", "alone"]
    local_world: int = 0
    """Ranks of this host; 0 where the launcher does not say."""


def discover(environ: Mapping[str, str]) -> Place:
    """The place of this process from its environment variables, without talking to anyone.

    torchrun comes first: under `srun torchrun` both are set, and torchrun knows the workers that it made.
    Raises UserError where a variable is missing or is no number.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return Place(
            rank=_number(environ, "RANK"),
            world=_number(environ, "WORLD_SIZE"),
            local_rank=_number(environ, "LOCAL_RANK", 0),
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environ, "MASTER_PORT", 29500),
            found_by="torchrun",
            local_world=_number(environ, "LOCAL_WORLD_SIZE", 0),
        )
    # Variables of a step: a batch script has SLURM_PROCID and SLURM_NTASKS too, but is alone until it calls srun.
    if _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environ:
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        # Jobs that share a host must not meet at one port; the job's number keeps them apart.
        port = 15_000 + _number(environ, "SLURM_JOB_ID", 0) % 15_000
        return Place(
            rank=_number(environ, "SLURM_PROCID"),
            world=_number(environ, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environ, "SLURM_LOCALID", 0),
            address=environ.get("MASTER_ADDR") or first_host(hosts),
            port=_number(environ, "MASTER_PORT", port),
            found_by="SLURM",
        )
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return Place(
            rank=_number(environ, "OMPI_COMM_WORLD_RANK"),
            world=_number(environ, "OMPI_COMM_WORLD_SIZE"),
            local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
            address=environ.get("MASTER_ADDR", ""),
            port=_number(environ, "MASTER_PORT", 0),
            found_by="MPI",
            local_world=_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", 0),
        )
    return Place(rank=0, world=1, local_rank=0, address="", port=0, found_by="alone")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(f'environment variable {name}="{text}" must be a number; it comes from the launcher')
    return int(text)


def host_name(environ: Mapping[str, str]) -> str:
    """This host as its scheduler calls it, so that `sbatch --exclude` takes the name; else by its own name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `gpu[03-05,9],login1` gives `gpu03`."""
    hosts = expand_hosts(nodelist)
    if not hosts:
        raise UserError(f'cannot read the first host of the Slurm node list "{nodelist}": set MASTER_ADDR')
    return hosts[0]


def expand_hosts(nodelist: str) -> list[str]:
    """All hosts of Slurm's compressed list: `gpu[03-05,9],login1` gives gpu03, gpu04, gpu05, gpu9 and login1."""
    hosts = []
    for before, numbers, after in re.findall(r"([^\[\],]*)(?:\[([\d,-]+)\])?([^\[\],]*)", nodelist):
        if not numbers:
            hosts += [before + after] if before + after else []
            continue
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            hosts += [f"{before}{number:0{len(first)}d}{after}" for number in span]
    return hosts


def expected_hosts(place: Place, environ: Mapping[str, str]) -> dict[int, str]:
    """The host of each rank by Slurm's word, before any rank has come; empty where the launcher does not tell it."""
    if place.found_by != "SLURM":
        return {}
    hosts = expand_hosts(environ.get("SLURM_STEP_NODELIST", ""))
    # 2(x3),1: three hosts with two tasks each, then one with one.
    tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    room = [int(count) for count, times in tasks for _ in range(int(times or 1))]
    if len(room) != len(hosts) or sum(room) != place.world:
        return {}
    pairs = [(turn, node) for node, count in enumerate(room) for turn in range(count)]
    match re.split("[:,]", environ.get("SLURM_DISTRIBUTION", "block"))[0]:
        case "block":
            return {rank: hosts[node] for rank, (_, node) in enumerate(pairs)}
        case "cyclic":
            return {rank: hosts[node] for rank, (_, node) in enumerate(sorted(pairs))}
    return {}


def name_ranks(ranks: Iterable[int], hosts: Sequence[str] | Mapping[int, str]) -> str:
    """`ranks 0-2 (host a), rank 5 (host b)`; a rank whose host is empty or unknown comes without one."""
    known = dict(hosts) if isinstance(hosts, Mapping) else dict(enumerate(hosts))
    of_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        of_host.setdefault(known.get(rank, ""), []).append(rank)
    return ", ".join(
        f"{'rank' if len(together) == 1 else 'ranks'} {_spans(together)}" + (f" (host {host})" if host else "")
        for host, together in of_host.items()
    )


def _spans(numbers: Sequence[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    # Neighbours have the same distance from their place in the list.
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
