"""From a started process to a rank that speaks with the others: process group, mesh, device."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Parallel
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.place import Place, discover


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
