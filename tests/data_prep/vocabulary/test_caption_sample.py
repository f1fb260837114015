from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.vocabulary.caption_sample import _OBJECT_BYTES, CaptionSample


def drawn(texts, *, captions=1000, size=1 << 20, seed=0):
    left_out = []
    sample = CaptionSample(captions=captions, size_bytes=size, seed=seed, left_out=left_out.append)
    for text in texts:
        sample.add(text)
    return list(sample), left_out


def test_below_the_limits_every_caption_stays_in_order():
    texts = [f"caption {n}" for n in range(50)]
    assert drawn(texts) == (texts, [])


@given(st.integers(0, 300), st.integers(1, 40), st.integers(_OBJECT_BYTES + 4, 3000))
@settings(max_examples=60, deadline=None)
def test_a_caption_stays_or_is_left_out_and_both_limits_hold(count, captions, size):
    texts = [f"{n:04}" for n in range(count)]
    kept, left_out = drawn(texts, captions=captions, size=size)
    assert sorted(kept + left_out) == texts
    assert kept == sorted(kept)
    assert len(kept) == min(count, captions, size // (_OBJECT_BYTES + 4))


def test_each_caption_is_as_likely_as_any_other_wherever_it_comes():
    counts = Counter(
        text for seed in range(600) for text in drawn([str(n) for n in range(40)], captions=10, seed=seed)[0]
    )
    # Each stays in a quarter of 600 draws: 150, with a standard deviation of 10.6; five of them are 53.
    assert all(97 <= counts[str(n)] <= 203 for n in range(40))
    first, last = (sum(counts[str(n)] for n in half) for half in (range(20), range(20, 40)))
    assert abs(first - last) < 250  # each half 3,000, the difference's deviation below 95


def test_the_seed_decides_and_nothing_else():
    texts = [str(n) for n in range(100)]
    assert drawn(texts, captions=10, seed=1) == drawn(texts, captions=10, seed=1)
    assert drawn(texts, captions=10, seed=1) != drawn(texts, captions=10, seed=2)


def test_memory_stays_a_quarter_above_the_limit_on_the_way():
    sample = CaptionSample(captions=10**9, size_bytes=100 * (_OBJECT_BYTES + 4), seed=0)
    most = 0
    for n in range(5000):
        sample.add(f"{n:04}")
        most = max(most, len(sample._texts))
    assert 100 <= most <= 126
    assert sample.seen == 5000
