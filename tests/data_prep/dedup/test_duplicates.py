from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dedup.duplicates import EVALUATION, EXACT, NEAR, Drops, find_duplicates
from data_prep.dedup.fingerprints import Prints

FAR = [0, 0xFF << 8, 0xFF << 16, 0xFF << 24, 0xFF << 32]
"""At least 8 bits from each other."""


def prints(rows: list[dict]) -> Prints:
    """A row: sha, hash, and as they differ from what is usual plain, pixels, captions, key."""

    def column(name, usual, dtype):
        return np.array([row.get(name, usual) for row in rows], dtype=dtype)

    sha = column("sha", 0, np.uint64)
    return Prints(
        sha_R2=np.stack([np.full(len(rows), 7, dtype=np.uint64), sha], axis=1).reshape(-1, 2),
        hash_R=column("hash", 0, np.uint64),
        plain_R=column("plain", False, bool),
        pixels_R=column("pixels", 100, np.uint32),
        captions_R=column("captions", 1, np.uint16),
        key_R=np.array([row.get("key", number) for number, row in enumerate(rows)], dtype=np.uint64),
    )


def told(drops: Drops) -> list[tuple[int, int, int, int]]:
    """(row, for which row, reason, bits)"""
    columns = (drops.row_D, drops.kept_D, drops.reason_D, drops.bits_D)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_of_the_same_pixels_most_captions_stay_and_then_the_smaller_key():
    rows = [{"sha": 1, "key": 5}, {"sha": 1, "key": 4}, {"sha": 2, "key": 1}, {"sha": 2, "key": 2, "captions": 3}]
    assert told(find_duplicates(prints(rows), 0, None)) == [(0, 1, EXACT, 0), (2, 3, EXACT, 0)]


def test_of_pictures_that_are_near_the_largest_stays():
    rows = [{"sha": 1, "hash": 0b1}, {"sha": 2, "hash": 0b0, "pixels": 200}, {"sha": 3, "hash": FAR[1]}]
    assert told(find_duplicates(prints(rows), 0, 4)) == [(0, 1, NEAR, 1)]


def test_exact_only_leaves_pictures_that_are_near():
    rows = [{"sha": 1, "hash": 1}, {"sha": 2, "hash": 1}, {"sha": 2, "hash": 1}]
    assert told(find_duplicates(prints(rows), 0, None)) == [(2, 1, EXACT, 0)]


def test_whoever_has_the_pixels_of_a_dropped_row_goes_with_it():
    """Row 2 has the pixels of row 1, which is near row 0: row 0 is what stays for both."""
    rows = [{"sha": 1, "hash": 0, "pixels": 200}, {"sha": 2, "hash": 3}, {"sha": 2, "hash": 3}]
    assert told(find_duplicates(prints(rows), 0, 4)) == [(1, 0, NEAR, 2), (2, 0, NEAR, 2)]


def test_what_an_evaluation_set_holds_is_dropped_whatever_is_preferred():
    rows = [
        {"sha": 1, "hash": 0, "pixels": 10},
        {"sha": 1, "hash": 0, "pixels": 10},
        {"sha": 2, "hash": 0b11, "pixels": 999},
        {"sha": 3, "hash": FAR[1]},
    ]
    assert told(find_duplicates(prints(rows), 1, 4)) == [(1, 0, EVALUATION, 0), (2, 0, EVALUATION, 2)]
    assert told(find_duplicates(prints(rows), 1, None)) == [(1, 0, EVALUATION, 0)]


def test_evaluation_sets_are_never_thinned():
    rows = [{"sha": 1, "hash": 0}, {"sha": 1, "hash": 0}, {"sha": 2, "hash": 1}, {"sha": 9, "hash": FAR[2]}]
    assert told(find_duplicates(prints(rows), 3, 4)) == []


def test_plain_pictures_are_duplicates_only_of_the_same_pixels():
    rows = [{"sha": n, "hash": 1 << 63, "plain": True} for n in (1, 2, 3, 3)] + [{"sha": 4, "hash": 1 << 63}]
    assert told(find_duplicates(prints(rows), 0, 4)) == [(3, 2, EXACT, 0)]


def test_half_of_the_digest_alone_makes_no_duplicates():
    one = prints([{"sha": 1, "hash": FAR[0]}, {"sha": 2, "hash": FAR[1]}])
    assert one.sha_R2[0, 0] == one.sha_R2[1, 0]
    assert told(find_duplicates(one, 0, 4)) == []


def test_nothing_is_nothing():
    assert told(find_duplicates(prints([]), 0, 4)) == []


ROW = st.fixed_dictionaries(
    {
        "sha": st.integers(0, 12),
        "flips": st.sets(st.integers(0, 9), max_size=5),
        "centre": st.sampled_from(FAR),
        "plain": st.booleans(),
        "pixels": st.integers(1, 3),
        "captions": st.integers(0, 2),
    }
)


def whole(rows: list[dict]) -> list[dict]:
    """Rows of the same pixels have the same hash, size and information, as decoding gives them; keys differ."""
    first = {row["sha"]: row for row in reversed(rows)}
    made = []
    for number, row in enumerate(rows):
        like = first[row["sha"]]
        bits = like["centre"] ^ sum(1 << place for place in like["flips"])
        same = {name: like[name] for name in ("sha", "plain", "pixels")}
        made.append({**same, "hash": bits, "captions": row["captions"], "key": number * 7919 % 10_007})
    return made


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, max_size=30), st.integers(0, 6), st.integers(0, 6), st.randoms())
def test_the_rule_holds_for_any_rows_in_any_order(given_rows, evaluation, radius, chance):
    rows = whole(given_rows)
    evaluation = min(evaluation, len(rows))
    drops = told(find_duplicates(prints(rows), evaluation, radius))
    dropped = {row for row, *_ in drops}
    assert all(row >= evaluation for row in dropped)

    def near(a, b):
        if rows[a]["sha"] == rows[b]["sha"]:
            return True
        bits = (rows[a]["hash"] ^ rows[b]["hash"]).bit_count()
        return bits <= radius and not rows[a]["plain"] and not rows[b]["plain"]

    # By definition, one by one: the evaluation stays, and then, by preference, whatever is near no row that stays.
    ours = sorted(
        range(evaluation, len(rows)), key=lambda r: (-rows[r]["pixels"], -rows[r]["captions"], rows[r]["key"])
    )
    staying = list(range(evaluation))
    for row in ours:
        if not any(near(row, other) for other in staying):
            staying.append(row)
    assert dropped == set(range(len(rows))) - set(staying)
    for row, kept, reason, bits in drops:
        assert kept not in dropped
        assert (rows[row]["hash"] ^ rows[kept]["hash"]).bit_count() == bits or rows[row]["sha"] == rows[kept]["sha"]
        assert (reason == EVALUATION) == (kept < evaluation)
        assert near(row, kept) or kept < evaluation

    order = [*range(evaluation), *chance.sample(range(evaluation, len(rows)), len(rows) - evaluation)]
    again = told(find_duplicates(prints([rows[r] for r in order]), evaluation, radius))
    assert sorted((order[row], order[kept], *rest) for row, kept, *rest in again) == drops
