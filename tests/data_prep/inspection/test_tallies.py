from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.inspection.scripts import NAMES, scripts_of
from data_prep.inspection.tallies import Distribution, Frequent


def of(*portions):
    distribution = Distribution()
    for portion in portions:
        distribution.add(np.array(portion, dtype=np.int64))
    return distribution


@given(st.lists(st.integers(0, 4095), min_size=1, max_size=60), st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_below_4096_quantiles_are_exact(values, share):
    expected = sorted(values)[max(1, int(np.ceil(share * len(values)))) - 1]
    assert of(values[:7], values[7:]).quantile(share) == expected


def test_above_they_are_within_a_tenth_of_a_percent_and_ends_and_mean_are_exact():
    values = np.random.default_rng(0).integers(5000, 90_000_000, 5000)
    found = of(values[:2000], values[2000:])
    assert (found.min, found.max, found.sum) == (values.min(), values.max(), values.sum())
    for share in (0.01, 0.5, 0.99):
        assert found.quantile(share) == pytest.approx(np.quantile(values, share, method="inverted_cdf"), rel=1e-3)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
@settings(max_examples=40, deadline=None)
def test_bins_hold_every_value_once_and_do_not_overlap(values):
    bins = of(values).bins()
    assert sum(one.count for one in bins) == len(values)
    assert bins[0].low <= min(values)
    assert bins[-1].high > max(values)
    assert all(a.high == b.low for a, b in pairwise(bins))


def test_even_bins_hold_what_lies_in_them():
    bins = of([10, 10, 11, 45, 81]).bins()  # 72 values in 36 bars of 2: 10 and 11, ..., 44 and 45, ..., 80 and 81
    assert [(one.low, one.count) for one in bins if one.count] == [(10, 3), (44, 1), (80, 1)]


def test_nothing_has_no_bins_and_json():
    assert of().bins() == []
    assert of([]).to_json()["mean"] is None


def test_frequent_texts_are_exact_while_all_are_held():
    frequent = Frequent(5)
    frequent.add(["b", "a", "a", "c"])
    frequent.add(["a", "c"])
    assert frequent.largest(2) == [("a", 3), ("c", 2)]
    assert (frequent.distinct, frequent.error, frequent.total) == (3, 0, 6)


@given(st.lists(st.integers(0, 40), max_size=400), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_beyond_that_counts_are_too_small_by_at_most_the_error_and_no_frequent_text_is_lost(numbers, capacity):
    texts = [str(number * number // 60) for number in numbers]
    frequent = Frequent(capacity)
    for start in range(0, len(texts), 7):
        frequent.add(texts[start : start + 7])
    true, held = Counter(texts), dict(frequent.largest(1000))
    assert len(held) <= 2 * capacity
    for text, count in true.items():
        assert count - frequent.error <= held.get(text, 0) <= count
    assert frequent.error <= len(texts) / (capacity + 1)


def test_long_texts_count_by_their_beginning():
    frequent = Frequent(5, longest=3)
    frequent.add(["abcd", "abce"])
    assert frequent.largest(5) == [("abc", 2)]


def test_a_text_is_of_the_script_of_most_of_its_letters():
    texts = ["a cat", "кошка a", "猫", "", "12 \N{GRINNING FACE}", "ひらがな", "שלום", "العربية", "한국어", "ä", "żółw"]
    expected = "Latin Cyrillic Han - - Kana Hebrew Arabic Hangul Latin Latin".replace("-", "no_letters").split()
    assert [NAMES[number].replace(" ", "_") for number in scripts_of(texts)] == expected
    assert scripts_of([]).tolist() == []
