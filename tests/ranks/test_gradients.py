"""Buckets leave in a fixed order, some of them before the backward pass ends; every replica gets its own piece."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from limoe_dist.parallel.gradients import Gradients
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.pieces import Piece
from limoe_dist.parallel.placement import ZEROS, Placement, make_parameter
from tests.support.ranks import RanksPool


class Chain(nn.Module):
    """y = x * a * b * c, each of its own shape; d is never used."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.a = make_parameter(Placement((6, 4), ZEROS), mesh)
        self.b = make_parameter(Placement((5,), ZEROS), mesh)
        self.c = make_parameter(Placement((), ZEROS), mesh)
        self.d = make_parameter(Placement((3,), ZEROS), mesh)
        with torch.no_grad():
            self.a.copy_(torch.arange(24.0).view(6, 4))
            self.b.copy_(torch.arange(5.0))
            self.c.fill_(2.0)
            self.d.fill_(1.0)

    def forward(self, x: float) -> torch.Tensor:
        return x * (self.a.sum() + (self.b * self.b).sum() * self.c)


def sums_on_ranks(overlap: bool) -> dict[str, object]:
    """Two backward passes with factors that differ from rank to rank."""
    mesh = Mesh.build(tp=1, ep=1)
    model = Chain(mesh)
    # One byte: every parameter is a bucket of its own.
    gradients = Gradients(model, mesh, dtype=torch.float32, bucket_bytes=1, overlap=overlap)
    found: dict[str, object] = {"order": [bucket.pieces[0].name for bucket in gradients.buckets]}
    for step in range(2):
        gradients.backward(model(1.0 + mesh.rank), last=False)
        gradients.backward(model(10.0), last=True)
        found[f"sent before the end {step}"] = gradients._left
        gradients.finish()
        found["norm"] = gradients.norm()[0].item()
        found["sums"] = {
            bucket.pieces[0].name: bucket.views(sums)[0].tolist()
            for bucket, sums in zip(gradients.buckets, gradients.sums, strict=True)
        }
        gradients.clear()
    found["left behind"] = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    return found


@pytest.mark.parametrize("overlap", [True, False])
def test_each_replica_gets_the_sum_of_its_piece_and_missing_gradients_are_zeros(
    ranks2: RanksPool, overlap: bool
) -> None:
    # The factors are 1 + 10 on rank 0 and 2 + 10 on rank 1: 23 together.
    first, second = ranks2.run(sums_on_ranks, overlap)
    assert first["order"] == second["order"] == ["d", "c", "b", "a"]
    assert first["sums"]["a"] == second["sums"]["a"] == [[23.0] * 4] * 3
    # b has 5 numbers: 3 and 2 of them; d / db = 2 b c = 4 b.
    assert first["sums"]["b"] == [0.0, 4 * 23.0, 8 * 23.0]
    assert second["sums"]["b"] == [12 * 23.0, 16 * 23.0]
    # A scalar is kept by the first replica alone: 0 + 1 + 4 + 9 + 16 = 30.
    assert first["sums"]["c"] == 30 * 23.0
    assert second["sums"]["c"] == []
    assert first["sums"]["d"] == [0.0, 0.0]
    squares = 24 + 16 * 30 + 30 * 30
    assert first["norm"] == second["norm"] == pytest.approx(23.0 * squares**0.5, rel=1e-6)
    assert first["left behind"] == []


def sent_before_the_end(use_all: bool) -> int:
    """How many buckets had left when the backward pass returned."""
    mesh = Mesh.build(tp=1, ep=1)
    model = Chain(mesh)
    gradients = Gradients(model, mesh, dtype=torch.float32, bucket_bytes=1, overlap=True)
    loss = model(1.0)
    gradients.backward(loss + 0 * model.d.sum() if use_all else loss, last=True)
    sent = gradients._left
    gradients.finish()
    return sent


def test_full_buckets_leave_during_the_backward_pass_and_wait_for_those_before_them(ranks2: RanksPool) -> None:
    assert ranks2.run(sent_before_the_end, True) == [4, 4]
    # d, the first bucket, gets no gradient: all wait for the end.
    assert ranks2.run(sent_before_the_end, False) == [0, 0]


def boxes(tp: int, ep: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[list[str], ...]]]:
    mesh = Mesh.build(tp=tp, ep=ep)
    parameters = {
        "row": make_parameter(Placement((8, 6), ZEROS, "tp", 1), mesh),
        "column bias": make_parameter(Placement((8,), ZEROS, "tp", 0), mesh),
        "qkv": make_parameter(Placement((3, 2, 5, 8), ZEROS, "tp", 1, stacked=1), mesh),
        "experts": make_parameter(Placement((4, 6, 3), ZEROS, "ep", 0, stacked=1), mesh),
        "few": make_parameter(Placement((3,), ZEROS), mesh),
    }
    pieces = [Piece.of(name, parameter, mesh) for name, parameter in parameters.items()]
    return [(p.name, p.start, p.shape, tuple([axis.name for axis in axes] for axes in p.axes)) for p in pieces]


def test_pieces_tile_the_logical_tensor(ranks4: RanksPool) -> None:
    # Rank 3 of tp=2, ep=2: second half of tp, second replica of dp; second half of the experts, second of edp.
    assert ranks4.run(boxes, 2, 2)[3] == [
        ("row", (4, 3), (4, 3), (["dp"], ["tp"])),
        ("column bias", (6,), (2,), (["tp", "dp"],)),
        # head_dim 5 does not divide by 2, the width 8 does.
        ("qkv", (0, 1, 0, 4), (3, 1, 5, 4), ([], ["tp"], [], ["dp"])),
        ("experts", (2, 3, 0), (2, 3, 3), (["ep"], ["edp"], [])),
        ("few", (3,), (0,), (["world"],)),
    ]


def test_nothing_stays_in_memory_when_model_and_gradients_are_gone() -> None:
    model = Chain(Mesh.single())
    gradients = Gradients(model, Mesh.single(), dtype=torch.float32, bucket_bytes=1)
    gradients.backward(model(1.0), last=True)
    left = [weakref.ref(model.a), weakref.ref(gradients.sums[0])]
    del model, gradients
    gc.collect()
    assert [one() for one in left] == [None, None]
