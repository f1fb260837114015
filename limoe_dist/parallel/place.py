"""From the environment of a started process to its rank: torchrun, SLURM, MPI, or alone. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
        )
    return Place(rank=0, world=1, local_rank=0, address="", port=0, found_by="alone")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(f'environment variable {name}="{text}" must be a number; it comes from the launcher')
    return int(text)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `gpu[03-05,9],login1` gives `gpu03`."""
    match = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodelist)
    if match is None or not match.group(0):
        raise UserError(f'cannot read the first host of the Slurm node list "{nodelist}": set MASTER_ADDR')
    return match.group(1) + (match.group(2) or "") + match.group(3)
