from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limoe_dist.data.order import (
    SourceOrder,
    epoch_keys,
    pairs_before,
    permuted,
    position_of,
    rank_positions,
    row_at,
    rows_checksum,
)


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
    # A resumed run reads on in this order: these values change with ORDER_VERSION alone.
    epochs, rows = row_at(np.array([0, 1, 2, 3, 999, 1000, 1001, 123_456_789_012]), rows=1000, seed=7)
    assert epochs.tolist() == [0, 0, 0, 0, 0, 1, 1, 123_456_789]
    assert rows.tolist() == [396, 741, 524, 701, 14, 82, 250, 460]


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
        for row in row_at(
            rank_positions(step * batch_pairs, batch_pairs=batch_pairs, rank=rank, world=world), rows=rows, seed=2
        )[1]
    ]
    assert read == epoch_rows(rows, seed=2)


def test_a_rank_reads_its_contiguous_slice() -> None:
    # Step 3 of 8 pairs starts at 24; rank 1 of 2 has the second four.
    assert rank_positions(24, batch_pairs=8, rank=1, world=2).tolist() == [28, 29, 30, 31]


def test_quarantined_positions_are_jumped_over_and_nothing_else() -> None:
    ranges = [(5, 8), (8, 10), (30, 31)]
    read = [
        position
        for step in range(4)
        for rank in range(2)
        for position in rank_positions(8 * step, batch_pairs=8, rank=rank, world=2, quarantined=ranges).tolist()
    ]
    jumped = {position for first, end in ranges for position in range(first, end)}
    assert read == [position for position in range(38) if position not in jumped]
    assert [position_of(pair, ranges) for pair in (0, 4, 5, 8, 24, 25)] == [0, 4, 10, 13, 29, 31]
    assert position_of(16) == 16
    assert [pairs_before(position, ranges) for position in (0, 4, 10, 13, 29, 31)] == [0, 4, 5, 8, 24, 25]
    with pytest.raises(ValueError, match=r"position 30 is inside the quarantined range \(30, 31\)"):
        pairs_before(30, ranges)


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


some_shards = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(
    shards=some_shards,
    window=st.integers(0, 200),
    block=st.integers(1, 4),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 999),
)
def test_every_epoch_of_blocks_and_windows_holds_every_row_once(
    shards: list[int], window: int, block: int, seed: int, epoch: int
) -> None:
    order = SourceOrder(tuple(shards), seed=seed, window_rows=window, block_shards=block)
    epochs, rows = order.at(np.arange(epoch * order.rows, (epoch + 1) * order.rows))
    assert (epochs == epoch).all()
    assert sorted(rows.tolist()) == list(range(order.rows))


@given(shards=some_shards, window=st.integers(1, 60), block=st.integers(1, 4), data=st.data())
def test_any_samples_read_what_a_walk_through_all_of_them_reads(
    shards: list[int], window: int, block: int, data: st.DataObject
) -> None:
    order = SourceOrder(tuple(shards), seed=7, window_rows=window, block_shards=block)
    _, walked = order.at(np.arange(3 * order.rows))
    asked = data.draw(st.lists(st.integers(0, 3 * order.rows - 1), min_size=1, max_size=20))
    assert order.at(np.array(asked))[1].tolist() == walked[asked].tolist()


def shards_in_turn(order: SourceOrder, epoch: int) -> list[list[int]]:
    """The shards that each window of an epoch reads, sorted."""
    ends = np.cumsum(order.shard_rows)
    _, rows = order.at(np.arange(epoch * order.rows, (epoch + 1) * order.rows))
    shards = np.searchsorted(ends, rows, side="right")
    windows = range(0, order.rows, order.window_rows)
    return [sorted({*shards[first : first + order.window_rows].tolist()}) for first in windows]


def test_a_window_mixes_the_rows_of_its_shards_and_of_no_others() -> None:
    # 8 shards of 10 rows, windows of 20: each window is two whole shards, drawn at random in each epoch.
    order = SourceOrder((10,) * 8, seed=3, window_rows=20)
    turns = [shards_in_turn(order, epoch) for epoch in range(3)]
    for windows in turns:
        assert [len(shards) for shards in windows] == [2, 2, 2, 2]
        assert sorted(shard for shards in windows for shard in shards) == list(range(8))
    assert turns[0] != turns[1] != turns[2]
    rows = order.at(np.arange(20))[1]
    # Not one shard behind the other: shuffled, the first ten of twenty are of one shard once in 92,378 times.
    assert len({*(rows[:10] // 10).tolist()}) == 2


def test_blocks_of_neighbouring_shards_stay_together() -> None:
    order = SourceOrder((10,) * 9, seed=3, window_rows=20, block_shards=2)
    turns = [order.shards_from(epoch * 90, windows=5) for epoch in range(4)]
    for shards in turns:
        assert sorted(shards) == list(range(9))
        assert all(shards[shards.index(first) + 1] == first + 1 for first in (0, 2, 4, 6))
    assert len({tuple(shards) for shards in turns}) == 4


@pytest.mark.parametrize("window", [0, 30, 31])
def test_without_windows_every_shard_is_wanted_at_any_time(window: int) -> None:
    order = SourceOrder((10, 10, 10), seed=3, window_rows=window)
    assert [order.shards_from(sample) for sample in (0, 29, 75)] == [[0, 1, 2]] * 3


@given(shards=some_shards, window=st.integers(1, 60), sample=st.integers(0, 500))
def test_the_shards_ahead_are_those_that_are_read_next(shards: list[int], window: int, sample: int) -> None:
    order = SourceOrder(tuple(shards), seed=11, window_rows=window)
    ahead = order.shards_from(sample, windows=2)
    if order.windowed:
        in_epoch = sample % order.rows
        first = sample - in_epoch + in_epoch // window * window
        rows = order.at(np.arange(first, first + 2 * window))[1]
        read = {*np.searchsorted(np.cumsum(shards), rows, side="right").tolist()}
        # Where the epoch ends inside the two windows, the next epoch's first window may be wider than what is left.
        assert read <= {*ahead} or first + 2 * window > sample - in_epoch + order.rows
        assert {*ahead} <= read or first + 2 * window > sample - in_epoch + order.rows
    else:
        assert ahead == list(range(len(shards)))


def test_a_source_that_one_window_holds_is_permuted_as_a_whole() -> None:
    whole = row_at(np.arange(200), rows=100, seed=5)
    for window in (0, 100, 101):
        order = SourceOrder((30, 70), seed=5, window_rows=window)
        assert [part.tolist() for part in order.at(np.arange(200))] == [part.tolist() for part in whole]


def test_the_windowed_order_of_a_seed_is_the_same_for_ever() -> None:
    order = SourceOrder((300, 400, 300, 500), seed=7, source=1, window_rows=512, block_shards=2)
    epochs, rows = order.at(np.array([0, 1, 2, 511, 512, 1499, 1500, 15_000_000_007]))
    assert epochs.tolist() == [0, 0, 0, 0, 0, 0, 1, 10_000_000]
    assert rows.tolist() == [1100, 977, 852, 1175, 1308, 692, 83, 1131]


def test_the_checksum_tells_which_position_read_which_row() -> None:
    positions, rows = np.arange(100), np.arange(100)[::-1].copy()
    whole = rows_checksum(positions, rows)
    assert (rows_checksum(positions[:37], rows[:37]) + rows_checksum(positions[37:], rows[37:])) % 2**64 == whole
    swapped = rows.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert rows_checksum(positions, swapped) != whole
    assert rows_checksum(positions[1:], rows[1:]) != whole


def test_a_permutation_has_1_to_2_62_rows() -> None:
    keys = np.array([5, 6], dtype=np.uint64)
    assert permuted(np.array([0, 0]), size=1, keys=keys).tolist() == [0, 0]
    ends = np.array([0, (1 << 62) - 1])
    found = permuted(ends, size=1 << 62, keys=np.full(2, 5, dtype=np.uint64)).tolist()
    assert found[0] != found[1]
    assert all(0 <= place < 1 << 62 for place in found)
    for size in (0, -1, (1 << 62) + 1):
        with pytest.raises(ValueError, match=r"in 1 to 2\*\*62"):
            permuted(ends, size=size, keys=keys)


def test_a_seed_is_a_word_of_64_bits() -> None:
    assert len({int(epoch_keys(seed, np.array([3]))[0]) for seed in (0, 1, 2**64 - 1)}) == 3
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed={seed}: must be in 0 to 2\*\*64 - 1"):
            epoch_keys(seed, np.array([3]))
