"""From a started process to a rank: who am I, how many are we, where do we meet. torchrun, SLURM, MPI, or alone."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Parallel
from limoe_dist.parallel.mesh import Mesh


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
    if _number(environ, "SLURM_NTASKS", 1) > 1 and "SLURM_PROCID" in environ:
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
        # Jobs that share a host must not meet at one port; the job's number keeps them apart.
        port = 15_000 + _number(environ, "SLURM_JOB_ID", 0) % 15_000
        return Place(
            rank=_number(environ, "SLURM_PROCID"),
            world=_number(environ, "SLURM_NTASKS"),
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


def _meet_by_mpi(place: Place) -> tuple[str, int]:
    """Rank 0 tells all where it listens. A collective over MPI."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(f"started by mpirun, but mpi4py does not import ({error}): pip install mpi4py") from None
    told = None
    if place.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            told = f"{socket.gethostname()} {probe.getsockname()[1]}"
    # As bytes of a fixed size: lower-case bcast would pickle.
    message = bytearray((told or "").encode().ljust(300))
    MPI.COMM_WORLD.Bcast([message, MPI.BYTE], root=0)
    host, port = message.decode().split()
    return host, int(port)


@contextmanager
def start(parallel: Parallel, environ: Mapping[str, str]) -> Iterator[tuple[Mesh, torch.device]]:
    """Joins the other ranks and gives this rank's mesh and device; leaves the process group at the end.

    CPU ranks speak gloo, GPU ranks NCCL. Raises UserError where the layout does not fit the number of ranks.
    """
    place = discover(environ)
    torch.set_num_threads(parallel.threads)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if place.world == 1:
        yield Mesh.single(), device
        return
    host, port = (place.address, place.port) if place.address else _meet_by_mpi(place)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=parallel.timeout_s),
    )
    try:
        yield Mesh.build(tp=parallel.tp, ep=parallel.ep), device
    finally:
        dist.destroy_process_group()
