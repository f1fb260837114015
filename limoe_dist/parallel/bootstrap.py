"""From a started process to a rank that speaks with the others: process group, mesh, device, and a watch over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import MappingProxyType

import torch
import torch.distributed as dist

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Parallel
from limoe_dist.parallel.fault import Fault, FaultError, OnFault, describe, note, of_the_host
from limoe_dist.parallel.links import check_links
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.place import Place, discover, host_name
from limoe_dist.parallel.preflight import Meeting, meet
from limoe_dist.parallel.traffic import Traffic
from limoe_dist.parallel.watchdog import watch

BEHIND_S = 30.0
"""A group's own limit is so much longer than the watch's, which says more."""


@contextmanager
def start(
    parallel: Parallel,
    environ: Mapping[str, str],
    *,
    agree: Mapping[str, str] = MappingProxyType({}),
    problem: str = "",
    on_fault: OnFault | None = None,
) -> Iterator[tuple[Mesh, torch.device]]:
    """Joins the other ranks and gives this rank's mesh and device; leaves the process group at the end.

    agree: by name, the text of what all ranks must have been started with; code and number of ranks are added.
    problem: a UserError's text, where this rank has found already that it cannot go on: all ranks then raise it.
    on_fault: takes a fault of ranks or hosts, on the rank that tells of it, before that rank ends: from another thread,
    which is not waited for longer than a few seconds. A UserError that is no FaultError is none.
    CPU ranks speak gloo, GPU ranks NCCL. Raises FaultError where ranks do not come or cannot reach each other, and
    UserError where they differ, or the layout does not fit the number of ranks. Inside the `with`, any other exception
    of one rank ends all ranks with status 1 within seconds; so does a collective that takes longer than
    parallel.timeout_s. A process alone has no collectives, and no watch.
    """
    place = discover(environ)
    torch.set_num_threads(parallel.threads)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if place.world == 1:
        if problem:
            raise UserError(problem)
        with _failure_noted(host_name(environ), on_fault):
            yield Mesh.single(), device
        return
    with _noted(place.rank, on_fault):
        meeting = meet(place, environ, timeout_s=parallel.start_timeout_s, agree=agree, problem=problem)
    # A GPU's collective returns before it is done.
    traffic = Traffic(mark=_cuda_marker if device.type == "cuda" else None)
    try:
        limit = min((parallel.start_timeout_s, "parallel.start_timeout_s"), (parallel.timeout_s, "parallel.timeout_s"))
        with watch(meeting, traffic, limit_s=limit[0], limit_name=limit[1], on_fault=on_fault) as watchdog:
            mesh = _connect(parallel, place, meeting, device, traffic)
            with _noted(place.rank, on_fault):
                check_links(mesh, device, hosts=meeting.hosts)
            traffic.reset()
            traffic.take_waited()
            watchdog.limit(parallel.timeout_s, "parallel.timeout_s")
            yield mesh, device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _noted(rank: int, on_fault: OnFault | None) -> Iterator[None]:
    try:
        yield
    except FaultError as error:
        if error.told_by in (None, rank):
            note(on_fault, error.fault)
        raise


@contextmanager
def _failure_noted(host: str, on_fault: OnFault | None) -> Iterator[None]:
    """What the watch does for ranks; a process alone raises on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        hosts = (host,) if of_the_host(error) else ()
        note(on_fault, Fault("failed", (0,), hosts, f"rank 0 (host {host}) failed with {describe(error)}"))
        raise


def _connect(parallel: Parallel, place: Place, meeting: Meeting, device: torch.device, traffic: Traffic) -> Mesh:
    """The process group of all ranks, and those of the mesh."""
    timeout = timedelta(seconds=parallel.timeout_s + BEHIND_S)
    with traffic.call("connect", Axis("world", place.world, place.rank, None, traffic), 0):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("groups", meeting.store),
            rank=place.rank,
            world_size=place.world,
            timeout=timeout,
        )
    try:
        return Mesh.build(tp=parallel.tp, ep=parallel.ep, timeout=timeout, traffic=traffic)
    except ValueError as error:
        raise UserError(str(error), told_by=0) from None


def _cuda_marker() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
