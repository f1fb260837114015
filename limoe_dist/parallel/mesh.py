"""Who works with whom: two ways of cutting the same ranks.

Dense weights: world = dp * tp, the ranks of one tp group are neighbours.
Experts:       world = edp * ep, the ranks of one ep group are neighbours.

    4 ranks, tp=1 ep=2      rank   0 1 2 3
                            ep     0 1 0 1    ranks 0-1 and 2-3 each hold all experts
                            edp    0 0 1 1    ranks 0,2 hold the same experts, and 1,3

Every rank is a data rank: it loads its own pairs and keeps only their activations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch.distributed as dist

from limoe_dist.parallel.traffic import Traffic


@dataclass(frozen=True)
class Axis:
    """This rank's group along one axis of the mesh; without communication where its size is 1."""

    name: str
    size: int
    index: int
    group: dist.ProcessGroup | None
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    """Counts what crosses the ranks; one object for all axes of a mesh."""


@dataclass(frozen=True)
class Mesh:
    world: Axis
    dp: Axis
    tp: Axis
    edp: Axis
    ep: Axis

    @property
    def rank(self) -> int:
        return self.world.index

    @staticmethod
    def single() -> Mesh:
        """The mesh of one process: every parallel module becomes an ordinary one."""
        traffic = Traffic()
        return Mesh(*(Axis(name, 1, 0, None, traffic) for name in ("world", "dp", "tp", "edp", "ep")))

    @staticmethod
    def build(*, tp: int, ep: int, timeout: timedelta | None = None, traffic: Traffic | None = None) -> Mesh:
        """Cuts all ranks of the started process group; a collective: every rank calls it with the same sizes.

        timeout: of every group that is made; None: torch's own.
        Raises ValueError where tp or ep does not divide the number of ranks.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        for name, size in (("tp", tp), ("ep", ep)):
            if size < 1 or world % size:
                raise ValueError(f"parallel.{name}={size} must divide the number of ranks, {world}")
        if world == 1:
            return Mesh.single()
        traffic = Traffic() if traffic is None else traffic

        def axis(name: str, groups: list[list[int]]) -> Axis:
            mine = next(ranks for ranks in groups if rank in ranks)
            return _with_group(Axis(name, len(mine), mine.index(rank), None, traffic), groups, rank, timeout)

        mesh = Mesh(
            world=Axis("world", world, rank, dist.group.WORLD, traffic),
            dp=axis("dp", [list(range(place, world, tp)) for place in range(tp)]),
            tp=axis("tp", [list(range(first, first + tp)) for first in range(0, world, tp)]),
            edp=axis("edp", [list(range(place, world, ep)) for place in range(ep)]),
            ep=axis("ep", [list(range(first, first + ep)) for first in range(0, world, ep)]),
        )
        # Counts are of what the groups are used for, not of making them.
        traffic.reset()
        return mesh


def _with_group(axis: Axis, groups: list[list[int]], rank: int, timeout: timedelta | None) -> Axis:
    if axis.size == 1:
        return axis
    made = None
    # new_group is a collective over all ranks: each makes every group, in the same order.
    with axis.traffic.call("connect", axis, 0):
        for ranks in groups:
            group = dist.new_group(ranks, timeout=timeout, group_desc=axis.name)
            if rank in ranks:
                made = group
    return replace(axis, group=made)
