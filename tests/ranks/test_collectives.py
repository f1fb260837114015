"""Each collective forward and backward, against what one process would compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limoe_dist.config.errors import UserError
from limoe_dist.parallel.collectives import (
    all_gather_rows,
    all_to_all_rows,
    max_over,
    raise_together,
    reduce_scatter_rows,
)
from limoe_dist.parallel.mesh import Mesh
from tests.support.ranks import RanksPool


def forward_and_backward() -> dict[str, Any]:
    mesh = Mesh.build(tp=1, ep=2)
    x = (torch.arange(4.0) + 10 * mesh.rank).requires_grad_()
    weight = torch.arange(1.0, 9.0)
    found: dict[str, Any] = {}
    gathered = all_gather_rows(x[:2], mesh.ep)
    (gathered * weight[:4] * (mesh.rank + 1)).sum().backward()
    found["gather"], found["gather_grad"] = gathered.tolist(), x.grad.tolist()
    x.grad = None
    scattered = reduce_scatter_rows(x, mesh.ep)
    (scattered * (mesh.rank + 1)).sum().backward()
    found["scatter"], found["scatter_grad"] = scattered.tolist(), x.grad.tolist()
    x.grad = None
    exchanged = all_to_all_rows(x, mesh.ep)
    (exchanged * weight[:4] * (mesh.rank + 1)).sum().backward()
    found["exchange"], found["exchange_grad"] = exchanged.tolist(), x.grad.tolist()
    found["max"] = max_over(torch.tensor(mesh.rank), mesh.world).item()
    return found


def test_forward_and_backward_on_two_ranks(ranks2: RanksPool) -> None:
    first, second = ranks2.run(forward_and_backward)
    # Rank 0 holds 0 1 2 3, rank 1 holds 10 11 12 13.
    assert first["gather"] == second["gather"] == [0, 1, 10, 11]
    # Both ranks used the gathered rows with weights 1..4, rank 1 twice as much: gradients are summed, 3 times.
    assert first["gather_grad"] == [3, 6, 0, 0]
    assert second["gather_grad"] == [9, 12, 0, 0]
    assert first["scatter"] == [10, 12]
    assert second["scatter"] == [14, 16]
    assert first["scatter_grad"] == second["scatter_grad"] == [1, 1, 2, 2]
    assert first["exchange"] == [0, 1, 10, 11]
    assert second["exchange"] == [2, 3, 12, 13]
    # Rank 0's last half went to rank 1, whose weights there were 1 2, doubled.
    assert first["exchange_grad"] == [1, 2, 2, 4]
    assert second["exchange_grad"] == [3, 4, 6, 8]
    assert first["max"] == second["max"] == 1


def one_rank_has_a_problem() -> str:
    mesh = Mesh.build(tp=1, ep=1)
    try:
        raise_together(["shard 7 is missing"] if mesh.rank == 1 else [], mesh.world, torch.device("cpu"))
    except UserError as error:
        return f"{error} {error.told_by}"
    return "nothing"


def test_every_rank_raises_where_one_has_a_problem(ranks2: RanksPool) -> None:
    assert ranks2.run(one_rank_has_a_problem) == [
        "rank 1 found a fault 1",
        "shard 7 is missing 1",
    ]


def test_a_mesh_of_one_process_communicates_with_nobody() -> None:
    mesh = Mesh.single()
    x = torch.arange(4.0)
    assert all_gather_rows(x, mesh.world) is x
    assert all_to_all_rows(x, mesh.ep) is x
    assert reduce_scatter_rows(x, mesh.tp) is x


def axes_of_four_ranks() -> dict[str, tuple[int, int]]:
    mesh = Mesh.build(tp=2, ep=4)
    return {name: (getattr(mesh, name).size, getattr(mesh, name).index) for name in ("dp", "tp", "edp", "ep")}


def test_tp_and_ep_groups_are_neighbours(ranks4: RanksPool) -> None:
    assert ranks4.run(axes_of_four_ranks) == [
        {"dp": (2, rank // 2), "tp": (2, rank % 2), "edp": (1, 0), "ep": (4, rank)} for rank in range(4)
    ]


def a_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"parallel\.ep=3 must divide the number of ranks, 4"):
        Mesh.build(tp=1, ep=3)


def test_a_size_that_does_not_divide_is_refused(ranks4: RanksPool) -> None:
    ranks4.run(a_size_that_does_not_divide)
