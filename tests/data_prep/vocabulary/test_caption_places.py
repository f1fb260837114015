from __future__ import annotations

import gzip
import io
import json

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.vocabulary.caption_places import Text, captions_of_file
from limoe_dist.config.errors import UserError
from tests.support.shards import write_shards
from tests.support.store import Store


def read(given):
    text = Text.parse(str(given))
    return [caption for file in text.files() for caption in captions_of_file(file, text.column)]


def wrote(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("given", "place", "column"),
    [
        ("a.parquet", "a.parquet", ""),
        ("a.parquet:TEXT", "a.parquet", "TEXT"),
        ("s3://bucket/a.parquet", "s3://bucket/a.parquet", ""),
        ("s3://bucket/a.parquet:alt text", "s3://bucket/a.parquet", "alt text"),
        ("http://127.0.0.1:80/a.tsv:1", "http://127.0.0.1:80/a.tsv", "1"),
        ("folder/a:b/c.csv", "folder/a:b/c.csv", ""),
    ],
)
def test_a_column_stands_behind_the_last_colon(given, place, column):
    assert Text.parse(given) == Text(place, column)


def test_parquet_columns_of_texts_and_of_lists_are_read(tmp_path):
    table = pa.table({"TEXT": ["a", None, "", "b"], "more": [["c"], [], None, ["d", "e"]], "url": ["x"] * 4})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == ["a", "b"]
    assert read(f"{tmp_path}/a.parquet:more") == ["c", "d", "e"]


def test_csv_quotes_and_tsv_does_not(tmp_path):
    assert read(wrote(tmp_path / "a.csv", 'url,caption\nx,"a ""red"", apple\nof two lines"\ny,b\n')) == [
        'a "red", apple\nof two lines',
        "b",
    ]
    assert read(
        f"{wrote(tmp_path / 'a.tsv', chr(34) + 'one' + chr(9) + 'http://x' + chr(10) + 'two' + chr(9) + 'y')}:0"
    ) == [
        '"one',
        "two",
    ]


def test_rows_of_another_width_and_bytes_that_are_no_utf_8_spoil_only_themselves(tmp_path):
    file = wrote(tmp_path / "a.tsv", b"caption\turl\ngood\tx\nbad\tx\ty\tz\n\xff\xfe\tx\nlast\tx\n")
    assert read(file) == ["good", "\ufffd\ufffd", "last"]


@pytest.mark.parametrize("large", ["", "large_"])
def test_bytes_of_a_parquet_file_that_are_no_utf_8_spoil_only_themselves(tmp_path, large):
    texts = pa.array([b"\xff\xfe", b"good", None, b"last"], getattr(pa, f"{large}binary")())
    texts = texts.view(getattr(pa, f"{large}string")())
    kind = pa.LargeListArray if large else pa.ListArray
    for name, column in (("a", texts), ("b", kind.from_arrays([0, 2, 4], texts))):
        pq.write_table(pa.table({"caption": column}), tmp_path / f"{name}.parquet")
        assert read(tmp_path / f"{name}.parquet") == ["\ufffd\ufffd", "good", "last"]


def test_json_lines_hold_a_text_or_a_list(tmp_path):
    lines = [{"caption": "a"}, {"captions": ["b", 3, "c"]}, {"other": 1}, {"text": "half \ud800 pair"}]
    file = wrote(tmp_path / "a.jsonl", "\n".join(json.dumps(line) for line in lines))
    assert read(file) == ["a", "b", "c", "half ? pair"]
    assert read(f"{file}:captions") == ["b", "c"]


def test_lines_of_text_folders_patterns_and_gzip_are_read_in_order(tmp_path):
    wrote(tmp_path / "b.txt", "three\n\n  four  \n")
    wrote(tmp_path / "a.txt.gz", gzip.compress(b"one\ntwo", mtime=0))
    wrote(tmp_path / "ignored.bin", "x")
    assert read(tmp_path) == read(f"{tmp_path}/*.txt*") == ["one", "two", "three", "four"]


def test_texts_are_read_by_url():
    store = Store()
    contents = {
        "a.txt": b"one",
        "a.txt.gz": gzip.compress(b"two", mtime=0),
        "a.jsonl": b'{"text": "three"}',
        "a.tsv": b"four\t4\n",
    }
    try:
        places = [store.put(name, content).url for name, content in contents.items()]
        assert [read(f"{place}{':0' if place.endswith('.tsv') else ''}") for place in places] == [
            ["one"],
            ["two"],
            ["three"],
            ["four"],
        ]
    finally:
        store.close()


def test_a_store_that_fails_while_it_is_read_is_one_line(monkeypatch):
    class Failing(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise aiohttp.ClientPayloadError("the answer ended early")

    monkeypatch.setattr("limoe_dist.data.places.open_binary", lambda place: Failing())
    with pytest.raises(UserError, match=r"s3://b/a.txt: cannot be read: the answer ended early"):
        list(captions_of_file("s3://b/a.txt", ""))


def test_shards_are_read_by_their_manifest(tmp_path):
    file = write_shards(tmp_path, rows=3, shards=2, captions={0: ["One", "two"], 1: [], 2: ["three"]}, vocab_size=None)
    assert read(file) == ["One", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "column", "reason"),
    [
        ("a.parquet", b"PAR1 no", "", "a.parquet: cannot be read"),
        ("a.csv", "x,caption_text\n1,2\n", ":caption_txt", 'no column "caption_txt"; did you mean "caption_text"'),
        ("a.csv", "x,y\n1,2\n", "", r"none of the columns caption, .*: name one, as in --text .*a.csv:x"),
        ("a.csv", b"caf\xe9,caption\n1,2\n", "", "a.csv: cannot be read: 'utf-8' codec"),
        ("a.jsonl", "{}\n[1]\n", "", "line 2 is no object with captions"),
        ("a.jsonl", "{}\n\n{", "", "line 3 is no JSON"),
        ("a.jsonl", "[" * 100_000, "", "line 1 is no JSON"),
        ("a.txt", "x", ":caption", "a text file has no columns"),
        ("a.txt.gz", b"\x1f\x8b\x08 broken", "", "a.txt.gz: cannot be read"),
        # The first block of the deflated data is of the kind that does not exist.
        ("a.txt.gz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 9, "", "a.txt.gz: cannot be read: Error -3"),
        ("a.csv.gz", gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 9, "", "a.csv.gz: cannot be read: Error -3"),
        ("a.zip", "x", "", "is of no known kind: its name must end with"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, column, reason):
    with pytest.raises(UserError, match=reason):
        read(f"{wrote(tmp_path / name, content)}{column}")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.vocabulary.caption_places._LONGEST_LINE", 1000)
    with pytest.raises(UserError, match="a line of more than 1000 bytes"):
        read(wrote(tmp_path / "a.txt", "x" * 1001))
