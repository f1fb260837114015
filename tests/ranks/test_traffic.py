"""The bytes of every collective, forward and backward, against what paper says; and the first use of every group."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from limoe_dist.parallel.collectives import (
    all_gather_rows,
    all_to_all_rows,
    gather_into,
    max_over,
    reduce_scatter_rows,
    start_reduce_scatter,
    sum_over,
)
from limoe_dist.parallel.links import check_links
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.traffic import Volume
from tests.support.ranks import RanksPool

Counts = dict[tuple[str, str], Volume]


def forward_and_backward() -> list[Counts]:
    mesh = Mesh.build(tp=2, ep=2)
    found = []

    def count() -> None:
        found.append(mesh.world.traffic.counts())
        mesh.world.traffic.reset()

    for collective, axis in (
        (all_gather_rows, mesh.tp),
        (reduce_scatter_rows, mesh.tp),
        (all_to_all_rows, mesh.ep),
        (all_gather_rows, mesh.dp),
    ):
        x = torch.ones(4, 3, requires_grad=True)
        y = collective(x, axis)
        count()
        y.sum().backward()
        count()
    sum_over(torch.ones(5, dtype=torch.float64), mesh.world)
    max_over(torch.ones(3, dtype=torch.int64), mesh.world)
    count()
    out = torch.empty(7)
    pending = start_reduce_scatter(out, torch.ones(2, 7), mesh.tp)
    count()
    pending.wait()
    gather_into(torch.empty(2, 7), out, mesh.ep)
    count()
    return found


def test_bytes_of_each_collective_forward_and_backward_on_two_ranks(ranks2: RanksPool) -> None:
    first, second = ranks2.run(forward_and_backward)
    # (4, 3) of float32 is 48 bytes, on each rank.
    assert first[:2] == [{("all_gather", "tp"): Volume(1, 96)}, {("reduce_scatter", "tp"): Volume(1, 96)}]
    assert first[2:4] == [{("reduce_scatter", "tp"): Volume(1, 48)}, {("all_gather", "tp"): Volume(1, 48)}]
    assert first[4:6] == [{("all_to_all", "ep"): Volume(1, 48)}, {("all_to_all", "ep"): Volume(1, 48)}]
    # With tp=2 on two ranks dp has size 1, and nothing moves.
    assert first[6:8] == [{}, {}]
    # 5 * 8 and 3 * 8 bytes.
    assert first[8] == {("all_reduce", "world"): Volume(2, 64)}
    # (2, 7) of float32: the asynchronous one counts when it is started.
    assert first[9:] == [{("reduce_scatter", "tp"): Volume(1, 56)}, {("all_gather", "ep"): Volume(1, 56)}]
    assert second == first


def links() -> tuple[Counts, set[float]]:
    mesh = Mesh.build(tp=2, ep=2, timeout=timedelta(seconds=77))
    axes = (mesh.world, mesh.dp, mesh.tp, mesh.edp, mesh.ep)
    mesh.world.traffic.reset()
    check_links(mesh, torch.device("cpu"), hosts=("a",) * 4)
    groups = [axis.group for axis in axes if axis is not mesh.world]
    limits = {_limit_s(group) for group in groups}
    return mesh.world.traffic.counts(), limits


def _limit_s(group: dist.ProcessGroup | None) -> float:
    assert group is not None
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_every_group_of_a_mesh_gets_its_own_limit_and_a_first_small_all_to_all(ranks4: RanksPool) -> None:
    for counts, limits in ranks4.run(links):
        # One number of 8 bytes for each rank of the group.
        expected = {("all_to_all", "world"): Volume(1, 32)}
        expected |= {("all_to_all", axis): Volume(1, 16) for axis in ("dp", "tp", "edp", "ep")}
        assert counts == expected
        assert limits == {77.0}
