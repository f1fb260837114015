from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limoe_dist.data.order import next_position, rank_positions, row_at


def epoch_rows(rows: int, *, seed: int, epoch: int = 0) -> list[int]:
    epochs, order = row_at(np.arange(epoch * rows, (epoch + 1) * rows), rows=rows, seed=seed)
    assert (epochs == epoch).all()
    return order.tolist()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 10_000))
def test_every_epoch_holds_every_row_once(rows: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_rows(rows, seed=seed, epoch=epoch)) == list(range(rows))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 4096])
def test_sizes_around_powers_of_two_and_four_are_bijections(rows: int) -> None:
    assert sorted(epoch_rows(rows, seed=3)) == list(range(rows))


def test_the_order_differs_by_epoch_and_by_seed() -> None:
    first = epoch_rows(500, seed=0)
    assert first != epoch_rows(500, seed=0, epoch=1)
    assert first != epoch_rows(500, seed=1)
    # Two unrelated permutations of 500 agree in 1 place on average; 8 or more has a chance of 1e-5.
    for other in (epoch_rows(500, seed=0, epoch=1), epoch_rows(500, seed=1), list(range(500))):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 8


def test_the_order_of_a_seed_is_the_same_for_ever() -> None:
    # A resumed run reads on in this order: these values may never change.
    epochs, rows = row_at(np.array([0, 1, 2, 3, 999, 1000, 1001, 123_456_789_012]), rows=1000, seed=7)
    assert epochs.tolist() == [0, 0, 0, 0, 0, 1, 1, 123_456_789]
    assert rows.tolist() == [136, 742, 588, 628, 309, 882, 267, 920]


def test_every_row_is_as_likely_at_every_place() -> None:
    # 4 rows, 6000 epochs: row r at place p in 1500 of them, standard deviation sqrt(6000 * 3/16) = 34; 5 of them: 170.
    _, rows = row_at(np.arange(4 * 6000), rows=4, seed=11)
    counts = np.zeros((4, 4), dtype=int)
    np.add.at(counts, (np.tile(np.arange(4), 6000), rows), 1)
    assert np.abs(counts - 1500).max() < 170


def test_neighbours_do_not_stay_neighbours() -> None:
    order = np.array(epoch_rows(1000, seed=5))
    # A random permutation has |difference| 1 about 2 times in 1000.
    assert (np.abs(np.diff(order)) == 1).sum() < 12


@pytest.mark.parametrize(("world", "batch_pairs"), [(1, 12), (2, 12), (3, 12), (4, 24), (6, 6)])
def test_the_ranks_of_any_split_read_each_position_of_an_epoch_once(world: int, batch_pairs: int) -> None:
    rows = 120
    read = [
        row
        for step in range(rows // batch_pairs)
        for rank in range(world)
        for row in row_at(rank_positions(step, batch_pairs=batch_pairs, rank=rank, world=world), rows=rows, seed=2)[1]
    ]
    assert read == epoch_rows(rows, seed=2)


def test_a_rank_reads_its_contiguous_slice() -> None:
    # Step 3 of 8 pairs starts at 24; rank 1 of 2 has the second four.
    assert rank_positions(3, batch_pairs=8, rank=1, world=2).tolist() == [28, 29, 30, 31]


def test_quarantined_positions_are_jumped_over_and_nothing_else() -> None:
    ranges = [(5, 8), (8, 10), (30, 31)]
    read = [
        position
        for step in range(4)
        for rank in range(2)
        for position in rank_positions(step, batch_pairs=8, rank=rank, world=2, quarantined=ranges).tolist()
    ]
    jumped = {position for first, end in ranges for position in range(first, end)}
    assert read == [position for position in range(38) if position not in jumped]
    assert [next_position(step, batch_pairs=8, quarantined=ranges) for step in range(4)] == [0, 13, 21, 29]
    assert next_position(2, batch_pairs=8) == 16


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(ValueError, match="position -1 is negative"):
        row_at(np.array([0, -1]), rows=4, seed=0)
    with pytest.raises(ValueError, match="rows=0"):
        row_at(np.array([0]), rows=0, seed=0)
    with pytest.raises(ValueError, match="seed=-1"):
        row_at(np.array([0]), rows=4, seed=-1)
    with pytest.raises(ValueError, match="batch_pairs=10 must be a multiple of the number of ranks, 4"):
        rank_positions(0, batch_pairs=10, rank=0, world=4)


def test_order_mixture_and_manifest_need_neither_torch_nor_dali() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['nvidia'] = None; "
        "import limoe_dist.data.order, limoe_dist.data.manifest, limoe_dist.data.mixture"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_each_source_of_a_mixture_has_an_order_of_its_own() -> None:
    orders = [row_at(np.arange(500), rows=500, seed=3, source=source)[1].tolist() for source in range(3)]
    assert orders[0] == epoch_rows(500, seed=3)
    # Neither is another source's order of another seed or epoch, as where the keys were sums.
    orders += [epoch_rows(500, seed=seed) for seed in (2, 4, 5)] + [epoch_rows(500, seed=3, epoch=n) for n in (1, 2)]
    for i, first in enumerate(orders):
        assert sorted(first) == list(range(500))
        for second in orders[:i]:
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 9
