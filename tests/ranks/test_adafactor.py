"""Whatever cuts a matrix, Adafactor's averages, updates and state are those of one process."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from limoe_dist.config.schema import Optim
from limoe_dist.optim.adafactor import Adafactor
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.pieces import Bucket, Piece, make_buckets
from limoe_dist.parallel.placement import ZEROS, Placement, Shard, make_parameter
from tests.support.ranks import RanksPool

STEPS = 3
OPTIM = Optim(lr=1e-2, min_factored_dim=4, weight_decay=0.1)
# In a comment: what 4 replicas get of the dim that they cut, or which axis cuts the longest dim.
PLACEMENTS = {
    "even": Placement((8, 6), ZEROS, decay=True),
    "uneven": Placement((5, 7), ZEROS, decay=True),  # 2 2 2 1 columns
    "one gets nothing": Placement((7, 9), ZEROS),  # 3 3 3 0 columns
    "column": Placement((8, 6), ZEROS, "tp", 0, decay=True),  # tp; replicas the other
    "row": Placement((6, 8), ZEROS, "tp", 1, decay=True),  # tp; replicas the other
    "long row": Placement((10, 8), ZEROS, "tp", 1),  # replicas; tp the other
    "uneven row": Placement((7, 8), ZEROS, "tp", 1),  # 4 3 rows on 2 replicas, tp the other
    "heads apart": Placement((6, 4, 5), ZEROS, "tp", 1, decay=True),  # heads are neither of the two
    "many heads": Placement((6, 8, 5), ZEROS, "tp", 1),  # heads are the longest
    "qkv": Placement((3, 4, 5, 6), ZEROS, "tp", 1, decay=True, stacked=1),
    "experts": Placement((4, 6, 5), ZEROS, "ep", 0, decay=True, stacked=1),
    "expert bias": Placement((4, 5), ZEROS, "ep", 0, stacked=1),
    "vector": Placement((5,), ZEROS),
    "cut vector": Placement((8,), ZEROS, "tp", 0),
    "scalar": Placement((), ZEROS),
}
LAYOUTS_2 = [(1, 1), (2, 1), (1, 2)]
LAYOUTS_4 = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)]


@dataclass(frozen=True)
class Held:
    """This rank's pieces of PLACEMENTS, and what changes them."""

    buckets: list[Bucket]
    weights: list[Tensor]
    grads: list[Tensor]
    rule: Adafactor

    @staticmethod
    def on(mesh: Mesh) -> Held:
        parameters = [(name, make_parameter(placement, mesh)) for name, placement in PLACEMENTS.items()]
        # Several buckets, some with several parameters.
        buckets = make_buckets(parameters, mesh, numbers=150)
        weights = [torch.zeros(bucket.length, dtype=torch.float64) for bucket in buckets]
        grads = [torch.zeros_like(weight) for weight in weights]
        held = Held(buckets, weights, grads, Adafactor(buckets, weights, grads, OPTIM))
        held.fill(weights, number=0)
        return held

    def views(self, flats: list[Tensor]) -> list[tuple[Piece, Tensor]]:
        return [
            pair
            for bucket, flat in zip(self.buckets, flats, strict=True)
            for pair in zip(bucket.pieces, bucket.views(flat), strict=True)
        ]

    def fill(self, flats: list[Tensor], *, number: int) -> None:
        for piece, view in self.views(flats):
            view.copy_(box(values(piece.name, number), piece.shard(view)))

    def step(self, number: int) -> None:
        self.fill(self.grads, number=number)
        self.rule.step(OPTIM.lr)

    def shards(self) -> dict[str, Shard]:
        weights = {f"model/{piece.name}": piece.shard(view) for piece, view in self.views(self.weights)}
        return weights | self.rule.shards()


def values(name: str, number: int) -> Tensor:
    """First values (0) or a step's gradient of a logical tensor: scales differ by row, expert 2 never has one."""
    placement = PLACEMENTS[name]
    generator = torch.Generator().manual_seed(100 * list(PLACEMENTS).index(name) + number)
    tensor = torch.randn(placement.shape, generator=generator, dtype=torch.float64)
    if number and placement.shape:
        scales = torch.arange(1.0, placement.shape[0] + 1, dtype=torch.float64)
        tensor *= scales.view(-1, *[1] * (tensor.dim() - 1))
    if number and placement.axis == "ep":
        tensor[2] = 0.0
    return tensor


def box(whole: Tensor, shard: Shard) -> Tensor:
    """The part of a logical tensor that a shard describes; a scalar's shard may be empty."""
    if not shard.shape:
        return whole.expand(shard.tensor.shape)
    return whole[tuple(slice(a, a + n) for a, n in zip(shard.start, shard.tensor.shape, strict=True))]


def error_and_boxes(tp: int, ep: int) -> tuple[dict[str, float], dict[str, tuple[list[slice], tuple[int, ...]]]]:
    """On a rank: the largest differences from one process, and the boxes that this rank writes."""
    mesh = Mesh.build(tp=tp, ep=ep)
    alone, held = Held.on(Mesh.single()), Held.on(mesh)
    for number in range(1, STEPS + 1):
        alone.step(number)
        held.step(number)
    whole, found = alone.shards(), held.shards()
    assert whole.keys() == found.keys()
    errors, written = {}, {}
    for name, shard in found.items():
        want = whole[name]
        assert shard.shape == want.shape == tuple(want.tensor.shape), name
        difference = (shard.tensor - box(want.tensor, shard)).abs()
        errors[name] = difference.max().item() if difference.numel() else 0.0
        if shard.writes:
            assert shard.tensor.numel(), name
            written[name] = (
                [slice(a, a + n) for a, n in zip(shard.start, shard.tensor.shape, strict=True)],
                shard.shape,
            )
    return errors, written


def check(answers: list[tuple[dict[str, float], dict[str, tuple[list[slice], tuple[int, ...]]]]]) -> None:
    counts: dict[str, np.ndarray] = {}
    for errors, written in answers:
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-12, worst
        for name, (part, shape) in written.items():
            counts.setdefault(name, np.zeros(shape, dtype=int))[tuple(part)] += 1
    assert counts.keys() == answers[0][0].keys()
    for name, count in counts.items():
        assert (count == 1).all(), f"{name} is written {count.tolist()} times"


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS_2)
def test_3_steps_on_2_ranks_equal_those_of_one_process_and_each_number_is_written_once(
    ranks2: RanksPool, tp: int, ep: int
) -> None:
    check(ranks2.run(error_and_boxes, tp, ep))


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS_4)
def test_3_steps_on_4_ranks_equal_those_of_one_process_and_each_number_is_written_once(
    ranks4: RanksPool, tp: int, ep: int
) -> None:
    check(ranks4.run(error_and_boxes, tp, ep))


def cuts(tp: int, ep: int) -> dict[str, tuple[list[str], ...]]:
    pieces = [piece for bucket in Held.on(Mesh.build(tp=tp, ep=ep)).buckets for piece in bucket.pieces]
    return {piece.name: tuple([axis.name for axis in axes] for axes in piece.axes) for piece in pieces}


def test_the_case_has_matrices_cut_along_either_dim_and_along_both(ranks4: RanksPool) -> None:
    found = ranks4.run(cuts, 2, 1)[0]
    assert found["even"] == (["world"], [])
    assert found["uneven"] == found["one gets nothing"] == ([], ["world"])
    assert found["column"] == (["tp"], ["dp"])
    assert found["row"] == found["long row"] == found["uneven row"] == (["dp"], ["tp"])
    assert found["experts"] == ([], ["edp"], [])
    assert found["cut vector"] == (["tp", "dp"],)


def collectives_of_a_step(tp: int, ep: int) -> list[int]:
    """How many ranks took part in each all-reduce of one step, in order."""
    held = Held.on(Mesh.build(tp=tp, ep=ep))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as called:
        held.step(1)
    return [dist.get_world_size(call.kwargs["group"]) for call in called.call_args_list]


def test_a_step_makes_one_all_reduce_for_each_axis_that_cuts_a_factored_dim(ranks4: RanksPool) -> None:
    # dp, edp, tp, world; also where a rank's piece of a matrix is empty.
    assert ranks4.run(collectives_of_a_step, 2, 2) == [[2, 2, 2, 4]] * 4
    # tp, world: nothing is left to be cut over dp and edp.
    assert ranks4.run(collectives_of_a_step, 4, 4) == [[4, 4]] * 4


def error_after_going_on(tp: int, ep: int) -> float:
    """Two steps in one process, then the third in this layout, against three in one process."""
    alone, held = Held.on(Mesh.single()), Held.on(Mesh.build(tp=tp, ep=ep))
    for number in range(1, STEPS):
        alone.step(number)
    whole = alone.shards()
    for name, shard in held.shards().items():
        shard.tensor.copy_(box(whole[name].tensor, shard))
    held.rule.steps = alone.rule.steps
    alone.step(STEPS)
    held.step(STEPS)
    whole = alone.shards()
    differences = [(shard.tensor - box(whole[name].tensor, shard)).abs() for name, shard in held.shards().items()]
    return max(difference.max().item() for difference in differences if difference.numel())


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2)])
def test_a_run_goes_on_in_another_layout(ranks4: RanksPool, tp: int, ep: int) -> None:
    assert max(ranks4.run(error_after_going_on, tp, ep)) < 1e-12
