"""Data order and mixture against plain lists: whole epochs written out, and a run that walks through them."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

from limoe_dist.config.schema import Data
from limoe_dist.data.manifest import Manifest, Shard
from limoe_dist.data.mixture import Mixture, orders_of
from limoe_dist.data.order import (
    SourceOrder,
    joined,
    pairs_before,
    position_of,
    positions_of,
    rank_positions,
    rows_checksum,
)
from tests.pipeline import plain_order as plain

SOURCES = [
    # shards, window_rows, block_shards
    ([5, 9, 7, 4, 8, 6, 3], 10, 1),
    ([5, 9, 7, 4, 8, 6, 3], 10, 2),
    ([5, 9, 7, 4, 8, 6, 3], 14, 3),
    ([5, 9, 7, 4, 8, 6, 3], 41, 3),
    ([5, 9, 7, 4, 8, 6, 3], 42, 3),
    ([5, 9, 7, 4, 8, 6, 3], 0, 2),
    ([1, 1, 1, 1, 1], 2, 2),
    ([16], 8, 1),
    ([17], 0, 1),
]
SPANS = [(5, 9), (16, 24), (30, 31), (47, 64)]


@pytest.mark.parametrize(("shards", "window", "block"), SOURCES)
def test_epochs_are_the_ones_that_are_written_out(shards: list[int], window: int, block: int) -> None:
    for seed, source in ((0, 0), (7, 2)):
        order = SourceOrder(tuple(shards), seed=seed, source=source, window_rows=window, block_shards=block)
        wanted = [
            (epoch, row)
            for epoch in range(3)
            for row in plain.epoch_rows(shards, seed=seed, source=source, epoch=epoch, window=window, block=block)
        ]
        for epoch in range(3):
            rows = [row for at, row in wanted if at == epoch]
            assert sorted(rows) == list(range(sum(shards)))
        # Samples in any order and of several epochs at once.
        samples = list(range(len(wanted)))
        random.Random(seed).shuffle(samples)
        epochs, rows = order.at(np.array(samples))
        assert list(zip(epochs.tolist(), rows.tolist(), strict=True)) == [wanted[sample] for sample in samples]


@pytest.mark.parametrize(("window", "block"), [(10, 1), (10, 2), (14, 3), (25, 1)])
def test_the_shards_that_are_fetched_ahead_are_those_of_the_next_windows(window: int, block: int) -> None:
    shards = [5, 9, 7, 4, 8, 6, 3]
    order = SourceOrder(tuple(shards), seed=7, window_rows=window, block_shards=block)
    for sample in range(0, 84, 3):
        for windows in (1, 2):
            found = order.shards_from(sample, windows=windows)
            assert found == plain.shards_ahead(shards, sample, seed=7, window=window, block=block, windows=windows), (
                sample
            )


@pytest.mark.parametrize(("window", "most"), [(2, 2), (3, 3), (9, 4), (10, 5), (15, 5), (100, 7), (0, 7)])
def test_the_most_shards_of_a_window_are_those_of_the_smallest(window: int, most: int) -> None:
    # Sorted 1 2 5 6 7 8 9, sums 1 3 8 14. With the last row of one shard and the first of another at its ends, a window
    # of 9 has room for 7 rows of whole shards, 1 + 2, and one of 10 for 8 rows, 1 + 2 + 5.
    order = SourceOrder((5, 9, 7, 1, 8, 6, 2), seed=0, window_rows=window)
    assert order.shards_of_a_window == most
    if order.windowed:
        ends = np.cumsum(order.shard_rows)
        for epoch in range(20):
            rows = order.at(np.arange(epoch * 38, (epoch + 1) * 38))[1]
            shards = np.searchsorted(ends, rows, side="right")
            assert all(len({*shards[first : first + window].tolist()}) <= most for first in range(0, 38, window))


@pytest.mark.parametrize("quarantined", [[], SPANS, [(0, 3)], [(3, 4), (4, 6)]])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_read_contiguous_parts_of_what_is_not_quarantined(quarantined: list[tuple[int, int]], world: int) -> None:
    walk = list(islice(plain.allowed_positions(quarantined), 96))
    # The batch changes on the way: 8, 8, 16, 4, 12 pairs.
    pair = 0
    for batch in (8, 8, 16, 4, 12):
        for rank in range(world):
            part = batch // world
            first = pair + rank * part
            found = rank_positions(pair, batch_pairs=batch, rank=rank, world=world, quarantined=quarantined)
            assert found.tolist() == walk[first : first + part]
        pair += batch
        position = position_of(pair, quarantined)
        assert position == walk[pair]
        assert pairs_before(position, quarantined) == pair


def test_positions_and_pairs_are_inverse_to_one_another() -> None:
    walk = list(islice(plain.allowed_positions(SPANS), 80))
    assert positions_of(np.arange(80), SPANS).tolist() == walk
    for pair, position in enumerate(walk):
        assert position_of(pair, SPANS) == position
        assert pairs_before(position, SPANS) == pair
    for position in sorted({*range(walk[-1])} - {*walk}):
        with pytest.raises(ValueError, match=f"position {position} is inside"):
            pairs_before(position, SPANS)


def test_ranges_are_joined_where_they_touch_or_overlap_and_not_else() -> None:
    assert joined([(8, 10), (1, 3), (3, 5), (9, 12), (6, 7), (9, 11)]) == ((1, 5), (6, 7), (8, 12))
    assert joined([(1, 10), (2, 3)]) == ((1, 10),)
    assert joined([]) == ()


def test_the_checksum_is_the_plain_sum_and_sees_every_change() -> None:
    positions, rows = list(range(100, 140)), plain.permutation(40, 3)
    known = plain.checksum(positions, rows)
    assert rows_checksum(np.array(positions), np.array(rows)) == known

    def changed(*, swap: tuple[int, int] | None = None, row: int | None = None, shift: int = 0) -> int:
        other = list(rows)
        if swap:
            other[swap[0]], other[swap[1]] = other[swap[1]], other[swap[0]]
        if row is not None:
            other[7] = row
        return rows_checksum(np.array(positions) + shift, np.array(other))

    seen = [changed(swap=(0, 1)), changed(swap=(3, 30)), changed(row=41), changed(row=rows[8]), changed(shift=1)]
    assert len({known, *seen}) == 6
    # In which order the pairs of position and row are added does not matter.
    backwards = rows_checksum(np.array(positions[::-1]), np.array(rows[::-1]))
    assert backwards == known


@pytest.mark.parametrize(
    "weights", [[1], [3], [3, 1], [1, 3], [5, 2, 1], [1, 2, 8], [7, 5, 3, 2], [1, 1, 1, 1, 9], [12, 35, 1]]
)
def test_the_pattern_of_a_mixture_is_the_one_with_the_earliest_deadlines(weights: list[int]) -> None:
    period, mixture = sum(weights), Mixture(weights)
    pattern = plain.pattern(weights)
    assert mixture.period == period
    had, wanted = [0] * len(weights), []
    for position in range(3 * period):
        assert mixture.counts(position) == had
        source = pattern[position % period]
        wanted.append((source, had[source]))
        had[source] += 1
    sources, samples = mixture.samples(np.arange(3 * period))
    assert list(zip(sources.tolist(), samples.tolist(), strict=True)) == wanted
    assert had == [3 * weight for weight in weights]


def manifest(shards: list[int]) -> Manifest:
    return Manifest(
        rows=sum(shards), shards=tuple(Shard(file=f"{n}", rows=r, bytes=1, sha256="0") for n, r in enumerate(shards))
    )


def test_a_mixture_reads_every_row_of_each_source_once_in_each_of_its_epochs() -> None:
    parts = [[6, 4, 8, 2], [5, 5]]
    data = Data(mixture=("a=3", "b=1"), window_rows=9, block_shards=2)
    orders = orders_of(data, [manifest(part) for part in parts], seed=11)
    drawn = Mixture([3, 1]).at(np.arange(80), orders)
    # 60 samples of 20 rows and 20 samples of 10 rows: 3 and 2 epochs.
    pattern, streams = plain.pattern([3, 1]), []
    for source, (part, epochs) in enumerate(zip(parts, (3, 2), strict=True)):
        rows = [
            (epoch, row)
            for epoch in range(epochs)
            for row in plain.epoch_rows(part, seed=11, source=source, epoch=epoch, window=9, block=2)
        ]
        assert sorted(rows) == [(epoch, row) for epoch in range(epochs) for row in range(sum(part))]
        streams.append(iter(rows))
    wanted = [(source, *next(streams[source])) for source in (pattern[position % 4] for position in range(80))]
    found = zip(drawn.sources.tolist(), drawn.epochs.tolist(), drawn.rows.tolist(), strict=True)
    assert list(found) == wanted
