from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.packing.plan import blocks_of, by_name, plan
from data_prep.sources.source import Block


def source(name, sizes):
    """A source with blocks of so many rows."""
    return SimpleNamespace(name=name, blocks=[Block(0, first, rows) for first, rows in enumerate(sizes)])


def read(plan_, sources, group):
    return [(one.name, block.first) for one, block in blocks_of(plan_, sources, group)]


def test_every_block_is_read_by_one_group_and_groups_have_about_the_rows_that_were_asked_for():
    sources = [source("a", [256] * 100 + [17]), source("b", [100] * 50)]
    made = plan(sources, seed=3, group_rows=1000)
    found = [one for group in range(made.groups) for one in read(made, sources, group)]
    assert sorted(found) == sorted((one.name, block.first) for one in sources for block in one.blocks)
    assert made.groups == 31  # 30,617 rows
    assert made.rows == made.group_rows.sum() == 30_617
    # Ends are the first block behind an even share: a group is off by less than one block at each end.
    assert 1000 - 256 < made.group_rows.min() <= made.group_rows.max() < 1000 + 256


def test_blocks_of_all_sources_are_mixed_but_read_in_the_order_of_their_files():
    sources = [source("a", [10] * 200), source("b", [10] * 200)]
    made = plan(sources, seed=0, group_rows=400)
    for group in range(made.groups):
        found = read(made, sources, group)
        assert {name for name, _ in found} == {"a", "b"}
        assert found == sorted(found)


def test_another_seed_groups_other_blocks():
    sources = [source("a", [10] * 100)]
    made = [plan(sources, seed=seed, group_rows=100) for seed in (0, 0, 1)]
    assert np.array_equal(made[0].block, made[1].block)
    assert not np.array_equal(made[0].block, made[2].block)


def test_the_order_in_which_sources_are_named_makes_no_difference():
    sources = [source("b", [10] * 9), source("a", [10] * 5)]
    one, two = (plan(by_name(given), seed=0, group_rows=50) for given in (sources, sources[::-1]))
    assert [one.name for one in by_name(sources)] == ["a", "b"]
    assert np.array_equal(one.source, two.source)
    assert np.array_equal(one.block, two.block)


@pytest.mark.parametrize("sizes", [[1], [5000], [1, 5000, 1], [3000] * 3, []])
def test_blocks_larger_than_a_group_stay_whole(sizes):
    sources = [source("a", sizes)]
    made = plan(sources, seed=0, group_rows=1000)
    assert made.rows == sum(sizes)
    assert sorted(first for group in range(made.groups) for _, first in read(made, sources, group)) == [
        *range(len(sizes))
    ]
    assert (made.group_rows > 0).all()


def test_a_plan_of_a_hundred_million_rows_takes_bytes_a_block():
    # 391,000 blocks of 256 rows: a list that counts as one object, so that only the plan's own memory is seen.
    class Many:
        def __len__(self):
            return 391_000

        def __iter__(self):
            return iter([Block(0, 0, 256)] * len(self))

    made = plan([SimpleNamespace(name="a", blocks=Many())], seed=0, group_rows=4096)
    assert made.rows == 391_000 * 256
    assert sum(one.nbytes for one in vars(made).values()) < 6_000_000
