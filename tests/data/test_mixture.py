from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Data
from limoe_dist.data.manifest import Manifest, Shard
from limoe_dist.data.mixture import (
    MAX_PERIOD,
    Entry,
    Mixture,
    absolute,
    check_pairs,
    crowded,
    data_hash,
    described,
    entries_of,
    files_of,
    manifest_file,
    with_home,
)
from limoe_dist.data.order import SourceOrder, pairs_before, position_of, rank_positions, row_at

some_weights = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def mixed(*entries: str, **data: object) -> Data:
    return Data.model_validate({"mixture": entries, **data})


def weights_of(*entries: str) -> list[int]:
    return [entry.weight for entry in entries_of(mixed(*entries))]


def sources(weights: list[int], positions: range) -> list[int]:
    found = Mixture(weights).samples(np.array(positions))[0]
    return [int(source) for source in found]


def orders(rows: list[int], *, seed: int) -> list[SourceOrder]:
    return [SourceOrder((count,), seed=seed, source=source) for source, count in enumerate(rows)]


def a_manifest(rows: int, **counts: int) -> Manifest:
    return Manifest(rows=rows, shards=(Shard(file="a", rows=rows, bytes=1, sha256=f"{rows:x}"),), **counts)


def test_three_of_four_are_of_the_first_source() -> None:
    # a = 1/2: the first source's samples may come from 2/3, 2, 10/3 positions on, the second's from 2; its deadline is
    # 2, and of the first 2/3, 2, 10/3. At the tie of position 2 the earlier source goes first.
    assert sources([3, 1], range(8)) == [0, 0, 1, 0, 0, 0, 1, 0]


@settings(max_examples=80, deadline=None)
@given(weights=some_weights)
def test_every_prefix_is_within_one_sample_of_the_share(weights: list[int]) -> None:
    period = sum(weights)
    counts = np.zeros(len(weights), dtype=np.int64)
    for n, source in enumerate(sources(weights, range(2 * period)), start=1):
        counts[source] += 1
        # |count - n * w / W| <= 1 - 1 / (2k - 2) < 1, in whole numbers; so where n * w / W is whole, it is the count.
        worst = max(2 * len(weights) - 2, 1)
        assert (
            np.abs(counts * period - n * np.array(weights)) * worst <= period * (worst - 1 if worst > 1 else 0)
        ).all()
    assert counts.tolist() == [2 * weight for weight in weights]


@settings(max_examples=80, deadline=None)
@given(pair=st.tuples(st.integers(1, 25), st.integers(1, 25)))
def test_of_two_sources_any_window_is_within_one_sample_of_the_share(pair: tuple[int, int]) -> None:
    period = sum(pair)
    first = np.cumsum([0] + [source == 0 for source in sources(list(pair), range(2 * period))])
    for length in range(1, period + 1):
        counts = first[length:] - first[:-length]
        assert (np.abs(counts * period - length * pair[0]) < period).all()


@settings(max_examples=60, deadline=None)
@given(weights=some_weights, batches=st.integers(1, 5), multiple=st.integers(1, 3))
def test_a_batch_that_holds_whole_shares_holds_them_exactly(weights: list[int], batches: int, multiple: int) -> None:
    batch_pairs = multiple * sum(weights)
    for step in range(batches):
        found = sources(weights, range(step * batch_pairs, (step + 1) * batch_pairs))
        assert [found.count(source) for source in range(len(weights))] == [multiple * weight for weight in weights]


@settings(max_examples=60, deadline=None)
@given(weights=some_weights, end=st.integers(0, 500))
def test_the_count_of_each_source_is_a_closed_form(weights: list[int], end: int) -> None:
    found = sources(weights, range(end))
    assert Mixture(weights).counts(end) == [found.count(source) for source in range(len(weights))]


def test_positions_far_out_are_as_easy_as_the_first() -> None:
    mixture, far = Mixture([3, 1]), 4 * 10**15
    assert mixture.counts(far + 3) == [3 * 10**15 + 2, 10**15 + 1]
    drawn = mixture.at(np.array([far, far + 2]), orders([7, 5], seed=0))
    # The samples before: 3e15 = 7 * 428571428571428 + 4 of the first, 1e15 = 5 * 2e14 of the second.
    assert (drawn.sources.tolist(), drawn.epochs.tolist()) == ([0, 1], [428_571_428_571_428, 200_000_000_000_000])


@settings(max_examples=50, deadline=None)
@given(weights=some_weights, seed=st.integers(0, 2**63), data=st.data())
def test_each_source_reads_each_of_its_rows_once_in_each_of_its_epochs(
    weights: list[int], seed: int, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(1, 30), min_size=len(weights), max_size=len(weights)))
    end = sum(weights) * 40
    drawn = Mixture(weights).at(np.arange(end), orders(rows, seed=seed))
    for source, count in enumerate(rows):
        here = drawn.sources == source
        # In the order of the positions, epoch by epoch.
        assert drawn.epochs[here].tolist() == [sample // count for sample in range(here.sum())]
        for epoch in range(here.sum() // count):
            assert sorted(drawn.rows[here & (drawn.epochs == epoch)].tolist()) == list(range(count))


some_starts = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=12
)
"""Of each start of a run: ranks, pairs of a rank in a step, steps until it is stopped."""
some_jumps = st.lists(st.integers(0, 600), max_size=6, unique=True).map(
    lambda ends: [(first, end) for first, end in zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False)]
)


@settings(max_examples=150, deadline=None)
@given(weights=some_weights, starts=some_starts, jumps=some_jumps, window=st.integers(0, 40), data=st.data())
def test_stopped_anywhere_and_resumed_by_any_number_of_ranks_with_any_batch_each_sample_comes_once(
    weights: list[int],
    starts: list[tuple[int, int, int]],
    jumps: list[tuple[int, int]],
    window: int,
    data: st.DataObject,
) -> None:
    some_rows = st.lists(
        st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=len(weights), max_size=len(weights)
    )
    shards = data.draw(some_rows)
    mixture = Mixture(weights)
    each = [SourceOrder(tuple(n), seed=4, source=i, window_rows=window) for i, n in enumerate(shards)]
    position, read = position_of(0, jumps), []
    for world, local, steps in starts:
        # All that a start knows of those before it is the position and the ranges that are jumped over.
        first_pair = pairs_before(position, jumps)
        for step in range(steps):
            pair = first_pair + step * world * local
            read += [
                place
                for rank in range(world)
                for place in rank_positions(
                    pair, batch_pairs=world * local, rank=rank, world=world, quarantined=jumps
                ).tolist()
            ]
        position = position_of(first_pair + steps * world * local, jumps)
    # Every position once, in order, but for those that are jumped over: they read nothing.
    jumped = {place for first, end in jumps for place in range(first, end)}
    assert read == [place for place in range(read[-1] + 1) if place not in jumped]

    drawn = mixture.at(np.array(read), each)
    skipped = mixture.at(np.array(sorted(place for place in jumped if place <= read[-1]), dtype=np.int64), each)
    counts = mixture.counts(read[-1] + 1)
    for source, order in enumerate(each):
        here, there = drawn.sources == source, skipped.sources == source
        assert here.sum() + there.sum() == counts[source]
        assert abs(counts[source] * sum(weights) - (read[-1] + 1) * weights[source]) < sum(weights)
        for epoch in range(-(-counts[source] // order.rows)):
            rows = [
                *drawn.rows[here & (drawn.epochs == epoch)].tolist(),
                *skipped.rows[there & (skipped.epochs == epoch)].tolist(),
            ]
            assert len(rows) == len({*rows}) == min(order.rows, counts[source] - epoch * order.rows)


def test_a_mixture_of_one_is_the_order_without_a_mixture() -> None:
    drawn = Mixture([1]).at(np.arange(90), orders([40], seed=5))
    epochs, rows = row_at(np.arange(90), rows=40, seed=5)
    assert (drawn.rows.tolist(), drawn.epochs.tolist()) == (rows.tolist(), epochs.tolist())


def test_two_copies_of_a_source_are_read_in_different_orders() -> None:
    drawn = Mixture([1, 1]).at(np.arange(1000), orders([500, 500], seed=5))
    first, second = (drawn.rows[drawn.sources == source] for source in (0, 1))
    # Unrelated permutations of 500 agree in 1 place on average; 8 or more has a chance of 1e-5.
    assert (first == second).sum() < 8


def test_the_order_of_a_mixture_is_the_same_for_ever() -> None:
    # A resumed run reads on in this order: these values change with ORDER_VERSION alone.
    drawn = Mixture([5, 2, 1]).at(np.array([0, 1, 2, 3, 4, 5, 6, 7, 1_000_000]), orders([1000, 100, 10], seed=7))
    assert drawn.sources.tolist() == [0, 0, 1, 0, 2, 0, 1, 0, 0]
    assert sources([7, 5, 3], range(15)) == [0, 1, 0, 2, 1, 0, 0, 1, 2, 0, 1, 0, 2, 1, 0]
    assert drawn.rows.tolist() == [396, 741, 57, 524, 3, 701, 32, 123, 553]


@pytest.mark.parametrize("weights", [[], [0, 1], [1, -1], [MAX_PERIOD, 1]])
def test_weights_that_are_none_are_refused(weights: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1 with a sum of at most 100000"):
        Mixture(weights)


def test_weights_are_reduced_to_whole_numbers() -> None:
    assert weights_of("a=3", "b=1") == [3, 1]
    assert weights_of("a=0.75", "b=0.25") == [3, 1]
    assert weights_of("a=300", "b=100") == [3, 1]
    assert weights_of("a=1/3", "b=1/2", "c=1") == [2, 3, 6]
    assert entries_of(mixed("odd=name/manifest.json=2", " b = 4 ")) == (
        Entry("odd=name/manifest.json", 1),
        Entry("b", 2),
    )


def test_without_a_mixture_the_manifest_is_all() -> None:
    assert entries_of(Data(manifest="a")) == (Entry("a", 1),)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("b", '"b" has no weight: an entry is MANIFEST=WEIGHT'),
        ("=3", '"=3" has no path: an entry is'),
        ("b=", '"b=" has the weight "": a weight is a number above 0 such as 3, 0.25 or 1/4'),
        ("b=-1", 'has the weight "-1"'),
        ("b=nan", 'has the weight "nan"'),
        ("b=1e9", 'has the weight "1e9"'),
        ("b=1/0", 'has the weight "1/0"'),
        ("b=25%", 'has the weight "25%"'),
        ("b=\u0663", 'has the weight "\u0663"'),
        ("b=0", '"b=0" has the weight 0: leave the entry out'),
        ("b=0.0", "has the weight 0"),
        ("a=3", '"a=3" names the manifest that "a=3" has: give it once, with the sum of the weights'),
        ("./a=1", '"./a=1" names the manifest that "a=3" has'),
    ],
)
def test_a_bad_entry_is_named(entry: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        entries_of(mixed("a=3", entry))
    assert str(caught.value).startswith("data.mixture: ")
    assert reason in str(caught.value)


def test_all_bad_entries_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        entries_of(mixed("a", "b=0", "c=x"))
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(UserError, match='"a=0" has the weight 0'):
        entries_of(mixed("a=1", "a=0"))


def test_a_manifest_behind_a_url_is_named_by_it() -> None:
    assert manifest_file("https://example.com/a/../train/") == "https://example.com/a/../train/manifest.json"


def test_a_folder_and_its_manifest_are_the_same_source(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (f"{tmp_path}/manifest.json=1", f"{tmp_path}/link/manifest.json=1"):
        with pytest.raises(UserError, match="names the manifest that"):
            entries_of(mixed(f"{tmp_path}=1", other))


def test_weights_that_hardly_ever_repeat_are_refused_with_rounder_ones() -> None:
    with pytest.raises(UserError) as caught:
        entries_of(mixed("a=1", "b=0.333333"))
    assert str(caught.value) == (
        "data.mixture: the weights 1000000, 333333 (in whole numbers) repeat only after 1333333 samples, more than "
        "100000: use rounder ones, such as 3, 1; a third is 1/3, not 0.333333"
    )


def test_the_home_is_the_first_manifest_or_the_one_that_is_named() -> None:
    assert with_home(mixed("a=3", "b=1")).manifest == "a"
    assert with_home(mixed("a=3", "b=1", manifest="b")).manifest == "b"
    assert with_home(Data(manifest="x")) == Data(manifest="x")
    with pytest.raises(UserError, match=r"data\.manifest=c is no manifest of data\.mixture"):
        with_home(mixed("a=3", "b=1", manifest="c"))
    with pytest.raises(UserError, match='"b" has no weight'):
        absolute(mixed("a=3", "b", manifest="a"))


def test_paths_become_absolute_and_weights_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = absolute(mixed("a=3/4", " /b = 0.25", validation="v"))
    assert found == mixed(f"{tmp_path}/a=3/4", "/b=0.25", manifest=f"{tmp_path}/a", validation=f"{tmp_path}/v")
    assert absolute(found) == found
    assert absolute(Data()) == Data()


def test_ranks_compare_every_manifest_and_its_weight() -> None:
    assert files_of(Data(manifest="a")) == {"data.manifest": "a"}
    assert files_of(mixed("a=0.75", "b=0.25")) == {
        "data.manifest": "a",
        "entry 1 of data.mixture (weight 3)": "a",
        "entry 2 of data.mixture (weight 1)": "b",
    }


def test_the_hash_covers_checksums_weights_and_the_order_of_sources() -> None:
    one, two = a_manifest(10), a_manifest(11)
    alone = data_hash(Data(manifest="a"), [one])
    assert alone != data_hash(Data(manifest="a"), [two])
    assert data_hash(mixed("a=3"), [one]) == alone
    both = data_hash(mixed("a=3", "b=1"), [one, two])
    assert both == data_hash(mixed("elsewhere=0.75", "b=1/4"), [one, two])
    others = [
        data_hash(mixed("a=1", "b=1"), [one, two]),
        data_hash(mixed("a=1", "b=3"), [one, two]),
        data_hash(mixed("b=1", "a=3"), [two, one]),
        data_hash(mixed("a=3", "b=1"), [one, one]),
        data_hash(Data(manifest="a"), [one]),
    ]
    assert both not in others


def test_shards_without_a_pair_are_refused_before_they_are_read() -> None:
    with pytest.raises(UserError, match=r"^a: 10 of the 10 rows have no caption: training needs pairs"):
        check_pairs(Data(manifest="a", max_bad_frac=1.0), [a_manifest(10, without_caption=10, without_picture=0)])
    half = a_manifest(10, without_caption=4, without_picture=6)
    with pytest.raises(UserError, match=r"^b: 4 of the 10 rows have no caption and 6 of the 10 rows have no picture: "):
        check_pairs(mixed("a=3", "b=1"), [a_manifest(10, without_caption=0, without_picture=0), half])


def test_more_lone_rows_than_may_be_bad_are_refused_by_their_share_of_the_samples() -> None:
    # 20 of 100 rows of a source that has a quarter of the samples: 5 %.
    manifests = [a_manifest(1000), a_manifest(100, without_caption=20, without_picture=0)]
    check_pairs(mixed("a=3", "b=1", max_bad_frac=0.05), manifests)
    with pytest.raises(UserError) as caught:
        check_pairs(mixed("a=3", "b=1", max_bad_frac=0.04), manifests)
    assert str(caught.value).startswith(
        "b: 20 of the 100 rows have no caption: 5.0% of what would be read is no pair to train on, more than "
        "data.max_bad_frac=0.04: "
    )
    # Fewer than 16 are left to the loader, which counts what is met.
    check_pairs(Data(manifest="b"), [a_manifest(20, without_caption=15, without_picture=0)])


def test_a_source_that_is_smaller_than_its_part_of_a_batch_is_told() -> None:
    manifests = [a_manifest(60), a_manifest(9)]
    assert crowded(mixed("a=3", "b=1"), manifests, batch_pairs=36) == []
    assert crowded(mixed("a=3", "b=1"), manifests, batch_pairs=40) == [
        "train.batch_pairs=40, but 10 of them are from b, which has 9 rows: every batch holds rows more than once"
    ]
    assert crowded(Data(manifest="a"), [manifests[0]], batch_pairs=64) == [
        "train.batch_pairs=64, but the data has 60 rows: every batch holds rows more than once"
    ]


def test_a_mixture_is_described_by_shares_and_epochs() -> None:
    manifests = [a_manifest(60), a_manifest(10)]
    assert described(mixed("a=3", "b=1"), manifests, samples=400) == [
        "data: 75.00% from a: 300 samples, 5 epochs of its 60 rows",
        "data: 25.00% from b: 100 samples, 10 epochs of its 10 rows",
    ]
    assert described(Data(manifest="a"), manifests[:1], samples=400) == []


def test_shares_are_fractions_of_the_whole() -> None:
    weights = weights_of("a=2", "b=0.5", "c=1/3")
    assert [Fraction(weight, sum(weights)) for weight in weights] == [
        Fraction(12, 17),
        Fraction(3, 17),
        Fraction(2, 17),
    ]
