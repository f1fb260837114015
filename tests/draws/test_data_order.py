"""Random orders of rows, shards and windows: every one as likely, and independent between seeds, epochs and sources."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from limoe_dist.config.schema import Data
from limoe_dist.data.manifest import Manifest, Shard, Source
from limoe_dist.data.mixture import Mixture, orders_of
from limoe_dist.data.order import SourceOrder, row_at
from tests.draws.statistics import SIGMAS_OF_MANY, check_counts, check_independent


def epochs_of(rows: int, epochs: int, *, seed: int = 0, source: int = 0, first: int = 0) -> np.ndarray:
    """(epochs, rows): the row at each place."""
    found_epochs, found = row_at(np.arange(first * rows, (first + epochs) * rows), rows=rows, seed=seed, source=source)
    assert (found_epochs.reshape(epochs, rows) == np.arange(first, first + epochs)[:, None]).all()
    return found.reshape(epochs, rows)


def numbers_of_orders(orders: np.ndarray) -> np.ndarray:
    """(n, k) permutations of 0..k-1 -> (n,): the number of each among all k! of them."""
    size = orders.shape[1]
    number = {order: n for n, order in enumerate(permutations(range(size)))}
    return np.array([number[tuple(order)] for order in orders.tolist()])


def check_unlike(orders: dict[object, np.ndarray]) -> None:
    """Unrelated permutations of n agree at one place on average, with deviation 1: at most 9 of any two by chance."""
    names = list(orders)
    for i, first in enumerate(names):
        for second in names[:i]:
            same = int((orders[first] == orders[second]).sum())
            assert same < 10, f"{first} and {second} agree at {same} places"


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_every_order_of_a_few_rows_is_as_likely(rows: int) -> None:
    count = 1000 * math.factorial(rows)
    for seed, source in ((0, 0), (5, 2)):
        numbers = numbers_of_orders(epochs_of(rows, count, seed=seed, source=source))
        check_counts(np.bincount(numbers, minlength=math.factorial(rows)), f"{rows} rows")
    # The order of the next epoch does not depend on this one's.
    if rows == 3:
        numbers = numbers_of_orders(epochs_of(rows, 10_000))
        check_counts(np.bincount(numbers[:-1] * 6 + numbers[1:], minlength=36), "neighbouring epochs")


@pytest.mark.parametrize("rows", [16, 17, 40])
def test_the_rows_of_any_two_places_are_every_pair_as_likely(rows: int) -> None:
    # Of 5 to 8 rows the pairs deviate by about 2 %: eight rounds on halves of two bits do not reach all orders alike.
    starts = np.arange(40 * rows * rows) * rows
    for first, second in ((0, 1), (0, rows // 2), (1, rows - 1)):
        rows_first, rows_second = (row_at(starts + place, rows=rows, seed=3)[1] for place in (first, second))
        pairs = np.bincount(rows_first * rows + rows_second, minlength=rows * rows).reshape(rows, rows)
        assert (np.diag(pairs) == 0).all()
        check_counts(pairs[~np.eye(rows, dtype=bool)], f"places {first} and {second}")


def test_every_order_of_a_few_rows_is_as_likely_over_seeds_and_over_sources() -> None:
    places = np.arange(4)
    by_seed = np.array([row_at(places, rows=4, seed=seed)[1] for seed in range(1500)])
    check_counts(np.bincount(numbers_of_orders(by_seed), minlength=24), "seeds")
    by_source = np.array([row_at(places, rows=4, seed=1, source=source)[1] for source in range(1500)])
    check_counts(np.bincount(numbers_of_orders(by_source), minlength=24), "sources")


@pytest.mark.parametrize("rows", [1000, 1024, 1025, 4096])
def test_where_a_row_comes_does_not_depend_on_its_number(rows: int) -> None:
    # 40 epochs: tenths of the epoch by tenths of the source, and by the row just before.
    order = epochs_of(rows, 40)
    place, row = np.tile(np.arange(rows), 40) * 10 // rows, order.ravel() * 10 // rows
    check_counts(np.bincount(place * 10 + row, minlength=100), "places by rows")
    check_counts(np.bincount(order[:, :-1].ravel() * 10 // rows * 10 + order[:, 1:].ravel() * 10 // rows), "neighbours")
    for residue in (2, 3, 4):
        cells = np.tile(np.arange(rows), 40) % residue * residue + order.ravel() % residue
        counts = np.bincount(cells, minlength=residue**2).astype(float)
        size = np.array([len(range(first, rows, residue)) for first in range(residue)])
        expected = 40 * np.outer(size, size).ravel() / rows
        # Chi-square of (residue - 1)^2 degrees of freedom: above 50 once in a million for 9.
        assert ((counts - expected) ** 2 / expected).sum() < 50, residue


def test_orders_of_seeds_epochs_and_sources_are_independent() -> None:
    orders: dict[object, np.ndarray] = {}
    for seed in (11, 12, 2**32 + 11, 2**63 - 1):
        for source in (0, 1, 2):
            for epoch in (0, 1, 2, 11, 12):
                orders[f"seed {seed} source {source} epoch {epoch}"] = epochs_of(
                    2000, 1, seed=seed, source=source, first=epoch
                )[0]
    check_unlike({**orders, "as packed": np.arange(2000)})
    check_independent(list(orders.values()), list(orders), lags=(0, 1))


def test_no_epoch_of_a_seed_is_an_epoch_of_another_seed() -> None:
    orders = {(seed, epoch): epochs_of(500, 1, seed=seed, first=epoch)[0] for seed in range(4) for epoch in range(4)}
    check_unlike(orders)


def windowed(**changes: object) -> SourceOrder:
    settings = {"shard_rows": (4,) * 4, "seed": 0, "window_rows": 4, "block_shards": 1}
    return SourceOrder(**(settings | changes))


def epoch_of(order: SourceOrder, epoch: int) -> np.ndarray:
    return order.at(np.arange(epoch * order.rows, (epoch + 1) * order.rows))[1]


def test_every_order_of_shards_and_of_rows_in_a_window_is_as_likely_and_they_are_independent() -> None:
    # 4 shards of 4 rows and windows of one shard: 24 orders of shards, 24 of the rows of each window.
    order, count = windowed(), 2400
    rows = np.stack([epoch_of(order, epoch) for epoch in range(count)]).reshape(count, 4, 4)
    shards = rows // 4
    assert (shards == shards[:, :, :1]).all()
    drawn = {"shards": numbers_of_orders(shards[:, :, 0])}
    for window in range(4):
        drawn[f"window {window}"] = numbers_of_orders(rows[:, window] % 4)
    for name, numbers in drawn.items():
        check_counts(np.bincount(numbers, minlength=24), name)
    names = list(drawn)
    for i, first in enumerate(names):
        for second in names[:i]:
            check_counts(np.bincount(drawn[first] * 24 + drawn[second], minlength=576), f"{first} and {second}")
        check_counts(np.bincount(drawn[first][:-1] * 24 + drawn[first][1:], minlength=576), f"{first}, two epochs")


def test_blocks_of_shards_are_in_every_order_and_a_short_last_block_takes_part() -> None:
    # 7 shards in blocks of 3: 3, 3 and 1.
    order = windowed(shard_rows=(2,) * 7, window_rows=2, block_shards=3)
    firsts = [list(dict.fromkeys((epoch_of(order, epoch) // 2).tolist())) for epoch in range(300)]
    blocks = [tuple(dict.fromkeys(shard // 3 for shard in shards)) for shards in firsts]
    for shards, order_of_blocks in zip(firsts, blocks, strict=True):
        assert shards == [shard for block in order_of_blocks for shard in range(3 * block, min(3 * block + 3, 7))]
    check_counts(np.bincount(numbers_of_orders(np.array(blocks)), minlength=6), "blocks")


def test_a_short_last_window_is_shuffled_too() -> None:
    # 16 rows in windows of 6, 6 and 4.
    order = windowed(shard_rows=(16,), window_rows=6)
    rows = np.stack([epoch_of(order, epoch) for epoch in range(500)])
    for first, end in ((0, 6), (6, 12), (12, 16)):
        part = rows[:, first:end]
        assert (np.sort(part, axis=1) == np.arange(first, end)).all()
        for place in range(end - first):
            check_counts(np.bincount(part[:, place] - first, minlength=end - first), f"place {first + place}")


def test_windowed_orders_of_seeds_epochs_and_sources_are_independent() -> None:
    size = {"shard_rows": (1000, 1000), "window_rows": 1000}
    orders: dict[object, np.ndarray] = {}
    for seed in (11, 13):
        for source in (0, 1):
            order = windowed(**size, seed=seed, source=source)
            for epoch in (0, 1, 2):
                # Rows within their shard: one window is one shard. Both windows of an epoch.
                for window, rows in enumerate(epoch_of(order, epoch).reshape(2, 1000) % 1000):
                    orders[f"seed {seed} source {source} epoch {epoch} window {window}"] = rows
    orders["whole"] = epochs_of(1000, 1, seed=11)[0]
    orders["as packed"] = np.arange(1000)
    check_unlike(orders)


def a_manifest(name: str, *rows: int) -> Manifest:
    shards = tuple(
        Shard(file=f"{name}-{n}.arrow", rows=count, bytes=1, sha256="0" * 64) for n, count in enumerate(rows)
    )
    return Manifest(
        name=name, rows=sum(rows), shards=shards, sources=(Source(name=name, rows=sum(rows), license="CC0-1.0"),)
    )


def test_the_orders_of_a_run_take_seed_source_window_and_block_from_its_settings() -> None:
    manifests = (a_manifest("a", 300, 200), a_manifest("b", 500), a_manifest("c", 100, 100, 300))
    data = Data(manifest="a", window_rows=128, block_shards=2)
    found = orders_of(data, manifests, seed=77)
    assert found == (
        SourceOrder((300, 200), seed=77, source=0, window_rows=128, block_shards=2),
        SourceOrder((500,), seed=77, source=1, window_rows=128, block_shards=2),
        SourceOrder((100, 100, 300), seed=77, source=2, window_rows=128, block_shards=2),
    )
    # Each source of the mixture is read by its own order, sample after sample.
    mixture = Mixture([2, 1, 1])
    drawn = mixture.at(np.arange(1500), found)
    for source, order in enumerate(found):
        here = drawn.sources == source
        epochs, rows = order.at(np.arange(int(here.sum())))
        assert (drawn.rows[here] == rows).all()
        assert (drawn.epochs[here] == epochs).all()


def test_an_order_is_a_function_of_seed_source_epoch_and_size_alone() -> None:
    base = epochs_of(300, 1, seed=9, source=1, first=4)[0]
    again = row_at(np.array([4 * 300 + 7, 5, 4 * 300]), rows=300, seed=9, source=1)[1]
    assert again[[0, 2]].tolist() == [base[7], base[0]]
    # The shards' borders are nothing to a source that is permuted as a whole.
    for shards in ((300,), (100, 200)):
        order = SourceOrder(shards, seed=9, source=1, window_rows=0)
        assert (order.at(np.arange(1200, 1500))[1] == base).all()
    for other in ({"seed": 10}, {"source": 2}, {"first": 5}):
        changed = epochs_of(300, 1, **({"seed": 9, "source": 1, "first": 4} | other))[0]
        assert (changed == base).sum() < 1 + SIGMAS_OF_MANY, other
