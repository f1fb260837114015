"""The first use of each group of a mesh: an all-to-all so small that a link that does not work shows at once."""

from __future__ import annotations

import torch
import torch.distributed as dist

from limoe_dist.parallel.collectives import all_to_all_rows
from limoe_dist.parallel.fault import Fault, FaultError, blamed
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.place import name_ranks


def check_links(mesh: Mesh, device: torch.device, *, hosts: tuple[str, ...]) -> None:
    """Each rank sends each other one number, in every group. A collective.

    Raises FaultError, on the ranks that see it, naming the axis, the ranks of the group and the cause.
    """
    for axis in (mesh.world, mesh.dp, mesh.tp, mesh.edp, mesh.ep):
        if axis.group is None:
            continue
        try:
            received = _exchange(axis, device)
        except RuntimeError as error:
            raise _broken(axis, hosts, str(error).splitlines()[0]) from None
        expected = [sender * axis.size + axis.index for sender in range(axis.size)]
        if received != expected:
            raise _broken(axis, hosts, f"received {received}, but {expected} were sent")


def _exchange(axis: Axis, device: torch.device) -> list[int]:
    first = axis.index * axis.size
    sent = torch.arange(first, first + axis.size, device=device)
    received: list[int] = all_to_all_rows(sent, axis).tolist()
    return received


def _broken(axis: Axis, hosts: tuple[str, ...], cause: str) -> FaultError:
    ranks = dist.get_process_group_ranks(axis.group) if axis.group is not None else []
    text = (
        f"the first small all-to-all over parallel axis {axis.name} of {name_ranks(ranks, hosts)} failed: {cause}. "
        "The ranks met, so look at the links between their hosts; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the "
        "network interface to use"
    )
    return FaultError(Fault("broken", tuple(ranks), blamed(ranks, hosts), text))
