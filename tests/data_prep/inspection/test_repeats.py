from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.inspection.repeats import Repeated, Repeats


def summary(numbers, *, limit_bytes, portion=5, most=20):
    repeats = Repeats(limit_bytes=limit_bytes)
    for start in range(0, len(numbers), portion):
        part = numbers[start : start + portion]
        repeats.add(b"".join(number.to_bytes(16, "big") for number in part), np.arange(start, start + len(part)))
    return repeats.summary(most)


@given(
    st.lists(st.sampled_from([0, 1, 2**63, 2**64, 2**127, 2**128 - 1, 7 << 90, (7 << 90) + 1]), max_size=40),
    st.sampled_from([24, 240, 1 << 20]),
)
@settings(max_examples=20, deadline=None)
def test_repeats_are_those_of_a_dictionary_in_memory_and_on_disk(numbers, limit_bytes):
    rows = defaultdict(list)
    for row, number in enumerate(numbers):
        rows[number].append(row)
    expected = [Repeated(len(of), tuple(of[:3])) for of in rows.values() if len(of) > 1]
    found = summary(numbers, limit_bytes=limit_bytes)
    assert (found.values, found.distinct, found.groups) == (len(numbers), len(rows), len(expected))
    assert list(found.largest) == sorted(expected, key=lambda one: (-one.count, one.rows))
    assert found.surplus == sum(one.count - 1 for one in expected)


def test_only_the_largest_are_named():
    found = summary([1, 1, 2, 2, 2, 3, 3], limit_bytes=1 << 20, most=1)
    assert found.largest == (Repeated(3, (2, 3, 4)),)
    assert found.groups == 3


def test_files_are_removed_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    repeats = Repeats(limit_bytes=24)
    repeats.add(bytes(32), np.arange(2))
    repeats.add(bytes(16), np.array([2]))
    assert list(tmp_path.iterdir())
    assert repeats.summary().largest == (Repeated(3, (0, 1, 2)),)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    from limoe_dist.config.errors import UserError

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="set TMPDIR to a larger disk"):
        Repeats(limit_bytes=1).add(bytes(16), np.arange(1))
