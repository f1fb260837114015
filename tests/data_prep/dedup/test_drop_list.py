from __future__ import annotations

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.dedup.drop_list import DropList
from limoe_dist.config.errors import UserError
from tests.support.store import Store


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_rows_are_left_out_for_their_reason(tmp_path):
    words = ["exact", "near", "evaluation", "mine"]
    file = parquet(tmp_path / "drop.parquet", key=["s/a", "s/b", "s/c", "s/d"], reason=words)
    drops = pickle.loads(pickle.dumps(DropList.open([file])))
    assert len(drops) == 4
    assert "same pixels" in drops.reason("s/a")
    assert "looks like a row that is kept" in drops.reason("s/b")
    assert "evaluation" in drops.reason("s/c")
    assert drops.reason("s/d") == "is in the drop list"
    assert drops.reason("s/e") is None
    assert drops.reason("") is None


def test_a_text_has_one_key_a_line_and_joins_other_lists(tmp_path):
    (tmp_path / "keys.txt").write_bytes("\ufeffs/ä 1\r\ns/b\n\ns/last".encode())
    file = parquet(tmp_path / "drop.parquet", key=["s/b", "s/p"], reason=["near", "near"])
    drops = DropList.open([tmp_path / "keys.txt", file])
    assert [bool(drops.reason(key)) for key in ("s/ä 1", "s/b", "s/last", "s/p", "s/")] == [True] * 4 + [False]


def test_lists_are_read_by_url(tmp_path):
    file = parquet(tmp_path / "drop.parquet", key=["s/p"], reason=["near"])
    store = Store()
    try:
        store.put("keys.txt", b"s/b\ns/last")
        store.put("drop.parquet", file.read_bytes())
        drops = DropList.open([store.url("keys.txt"), store.url("drop.parquet")])
    finally:
        store.close()
    assert [bool(drops.reason(key)) for key in ("s/b", "s/last", "s/p", "s/q")] == [True] * 3 + [False]


def test_the_checksum_is_of_the_contents_in_any_order(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a\n")
    two.write_text("b\n")
    assert DropList.open([one, two]).sha256 == DropList.open([two, one]).sha256
    assert DropList.open([one]).sha256 != DropList.open([two]).sha256


def test_two_keys_with_the_same_upper_half_are_told_apart(monkeypatch):
    import numpy as np

    made = {"a": (5, 1), "b": (5, 9), "c": (5, 4)}
    monkeypatch.setattr(
        "data_prep.dedup.drop_list._hashes", lambda keys: np.array([made[k] for k in keys], dtype=np.uint64)
    )
    drops = DropList(np.array([5, 5], np.uint64), np.array([1, 9], np.uint64), np.array([0, 1], np.uint8), "")
    assert [drops.reason(key) is None for key in "abc"] == [False, False, True]


def test_many_keys_take_17_bytes_each(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("\n".join(f"source/{number}" for number in range(70_000)))
    drops = DropList.open([file])
    assert len(drops) == 70_000
    assert drops.high_R.nbytes + drops.low_R.nbytes + drops.reason_R.nbytes == 17 * 70_000
    assert all(drops.reason(f"source/{number}") for number in range(0, 70_000, 977))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.txt", None, "there is no such file"),
        ("a.parquet", b"PAR1 no", "is no whole parquet file"),
        ("a.txt", b"\xff\xfe\n", "line 1 .*: a drop list is"),
        ("a.txt", b"ok\n" + b"x" * 5000, "line 2 is longer than 4096 bytes"),
    ],
)
def test_what_is_no_drop_list_is_refused(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        DropList.open([tmp_path / name])


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"url": ["x"]}, "has no column `key`"),
        ({"key": [1]}, "has no column `key` of texts"),
        ({"key": ["a", None]}, "has rows without a key"),
    ],
)
def test_a_table_of_something_else_is_refused(tmp_path, columns, reason):
    with pytest.raises(UserError, match=reason):
        DropList.open([parquet(tmp_path / "a.parquet", **columns)])
