from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dedup import bands, near

SMALL = {"DIRECT": 8, "MOST_CUTS": 1, "CHUNK": 16, "_COMPARE_NS": 300, "_LOOP_NS": 0}
"""Makes a few hundred hashes go every way that ten million go: cuts, hot bands, parts."""


def clustered(seed: int, count: int, *, flips: int = 5) -> np.ndarray:
    """Different hashes around a few centres, in the order of chance."""
    chance = np.random.default_rng(seed)
    centres = chance.integers(0, 2**64, max(1, count // 20), dtype=np.uint64)
    hashes = centres[chance.integers(0, len(centres), count)]
    for _ in range(flips):
        hashes ^= np.uint64(1) << chance.integers(0, 64, count, dtype=np.uint64)
    return chance.permutation(np.unique(hashes))


def distances(left, right) -> np.ndarray:
    return np.bitwise_count(np.asarray(left)[:, None] ^ np.asarray(right)[None])


def greedy_by_definition(hashes, radius: int) -> list[int]:
    """For each hash the first kept one within the radius, or -1: the rule as it is told."""
    kept: list[int] = []
    first = []
    for number, one in enumerate(hashes.tolist()):
        first.append(next((k for k in kept if (one ^ int(hashes[k])).bit_count() <= radius), -1))
        if first[-1] < 0:
            kept.append(number)
    return first


def found_pairs(run) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    run(lambda one, other: pairs.extend(zip(one.tolist(), other.tolist(), strict=True)))
    return pairs


@pytest.fixture(params=["as it is", "small"])
def sizes(request, monkeypatch):
    if request.param == "small":
        for name, value in SMALL.items():
            monkeypatch.setattr(bands, name, value)
        monkeypatch.setattr(near, "MAX_PAIRS", 40)


# By hand: 0b0000 keeps; 0b0001 is 1 bit from it; 0b0111 is 2 bits from 0b0001, which is dropped, and 3 from 0b0000.
def test_likenesses_do_not_add_up_along_a_chain():
    found = near.keep_greedily(np.array([0b0000, 0b0001, 0b0111], dtype=np.uint64), 2)
    assert found.first.tolist() == [-1, 0, -1]
    assert found.bits.tolist() == [0, 1, 0]


def test_the_preferred_one_of_two_that_are_near_is_named():
    found = near.first_within(np.array([0b0111, 0b0001], dtype=np.uint64), np.array([0, 2**64 - 1], dtype=np.uint64), 3)
    assert found.first.tolist() == [0, -1]  # both are within 3 bits of 0: the first counts, not the nearest
    assert found.bits.tolist() == [3, 0]


@pytest.mark.parametrize("radius", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 120])
def test_what_stays_is_what_the_rule_says(radius, count, sizes):
    hashes = clustered(radius * 1000 + count, count)
    assert near.keep_greedily(hashes, radius).first.tolist() == greedy_by_definition(hashes, radius)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 80), st.integers(1, 6), st.integers(0, 6))
def test_any_set_of_hashes_keeps_what_the_rule_says(seed, count, flips, radius):
    hashes = clustered(seed, count, flips=flips)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(bands, name, value)
        assert near.keep_greedily(hashes, radius).first.tolist() == greedy_by_definition(hashes, radius)


@pytest.mark.parametrize("radius", [0, 1, 4])
def test_every_near_pair_is_found_once(radius, sizes):
    hashes, others = clustered(1, 200), clustered(2, 120)
    others = np.unique(np.concatenate([others, hashes[:40] ^ np.uint64(3)]))
    within = found_pairs(lambda found: bands.pairs_within(hashes, radius, found))
    expected = np.argwhere(np.triu(distances(hashes, hashes) <= radius, 1)).tolist()
    assert sorted(sorted(pair) for pair in within) == expected
    between = found_pairs(lambda found: bands.pairs_between(hashes, others, radius, found))
    assert sorted(between) == [tuple(pair) for pair in np.argwhere(distances(hashes, others) <= radius).tolist()]


@pytest.mark.parametrize("radius", range(13))
@pytest.mark.parametrize("count", [100_000, 10_000_000, 1_000_000_000])
def test_a_cut_never_lets_a_near_pair_through(radius, count):
    """With r bands spoiled by one bit each there are still enough equal ones, and the keys fit."""
    plan = bands.cut(bands.ALL, radius, count, count * count // 2)
    assert plan is not None
    assert sorted(place for band in plan.bands for place in band) == list(range(64))
    assert len(plan.bands) - radius >= plan.at_a_time >= 1
    assert all(len(plan.places(choice)) <= 32 for choice in plan.choices())


def test_hashes_with_the_same_bands_do_not_take_the_square_of_their_number():
    """30,000 that share 22 bits meet in one bucket: each with each would be 450 million comparisons, about 5 s."""
    chance = np.random.default_rng(0)
    hashes = np.unique(chance.integers(0, 2**42, 30_000, dtype=np.uint64) << np.uint64(22))
    compared = 0
    whole = bands._compare

    def counted(left, right, places, starts, ends, radius, found):
        nonlocal compared
        compared += int((ends - starts).sum())
        whole(left, right, places, starts, ends, radius, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "_compare", counted)
        began = time.process_time()
        near.keep_greedily(hashes, 4)
        taken_s = time.process_time() - began
    assert 0 < compared < 45_000_000
    assert taken_s < 5


def test_a_dense_crowd_is_searched_without_holding_its_pairs(monkeypatch):
    """All 2,081 hashes within 2 bits of one: every pair of them is within 4, two million pairs, and one hash stays."""
    ones = [1 << place for place in range(64)]
    crowd = [0, *ones, *(a | b for i, a in enumerate(ones) for b in ones[:i])]
    hashes = np.array(crowd, dtype=np.uint64)
    assert len(hashes) == 1 + 64 + 2016
    monkeypatch.setattr(near, "MAX_PAIRS", 10_000)
    assert near.keep_greedily(hashes, 4).first.tolist() == [-1] + [0] * (len(hashes) - 1)
