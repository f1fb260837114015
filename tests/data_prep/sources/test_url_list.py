from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources.url_columns import BATCH_ROWS, Columns
from data_prep.sources.url_list import Row, open_list
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

URL = "http://example.com/{}.jpg"


def rows_of(*files: Path, columns: Columns | None = None, size: int = 3) -> list[Row]:
    parts = open_list([str(file) for file in files], columns or Columns()).parts(size, lambda _: True)
    return [row for _, rows in parts for row in rows]


def written(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_laions_parquet_is_known_by_its_columns(tmp_path):
    columns = {
        "SAMPLE_ID": [7],
        "URL": [URL.format(1)],
        "TEXT": ["one"],
        "similarity": [0.25],
        "boxes": [[1.0]],
        "NSFW": [None],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [Row(0, URL.format(1), "one", {"SAMPLE_ID": 7, "similarity": 0.25})]


def test_datacomps_parquet_is_known_and_missing_values_are_left_out(tmp_path):
    columns = {"uid": ["u1", "u2"], "url": [URL.format(1), None], "text": [None, "two"], "clip": [float("nan"), 1.0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [
        Row(0, URL.format(1), "", {"uid": "u1"}),
        Row(1, "", "two", {"uid": "u2", "clip": 1.0}),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cc3m.tsv", f'a "quoted dog\t{URL.format(1)}\n'),
        ("cc12m.tsv", f'{URL.format(1)}\ta "quoted dog\n'),
        ("cc12m.tsv.gz", f'{URL.format(1)}\ta "quoted dog\n'),
        ("list.csv", f'url,caption\n{URL.format(1)},"a ""quoted dog"\n'),
        ("list.csv", f'\ufeffCaption,Image_URL\n"a ""quoted dog",{URL.format(1)}\n'),
        ("list.csv.gz", f'{URL.format(1)},"a ""quoted dog"\n'),
        ("list.txt", f'URL\tTEXT\n{URL.format(1)}\ta "quoted dog\r\n\n'),
    ],
)
def test_texts_with_and_without_a_header_are_known(tmp_path, name, text):
    assert rows_of(written(tmp_path / name, text)) == [Row(0, URL.format(1), 'a "quoted dog')]


def test_other_columns_of_a_text_are_numbers_where_they_look_like_it(tmp_path):
    file = written(tmp_path / "a.csv", f"url,caption,clip,year,who,none\n{URL.format(1)},one,0.5,2020,ann,nan\n")
    (row,) = rows_of(file)
    assert row.carried == {"clip": 0.5, "year": 2020, "who": "ann"}
    (row,) = rows_of(file, columns=Columns(carried=("clip",)))
    assert row.carried == {"clip": 0.5}
    (row,) = rows_of(file, columns=Columns(caption="who", carried=()))
    assert (row.caption, row.carried) == ("ann", {})


def test_columns_of_a_text_without_header_are_named_by_option(tmp_path):
    file = written(tmp_path / "a.tsv", f"0.5\t{URL.format(1)}\tone\n0.25\t{URL.format(2)}\ttwo\n")
    with pytest.raises(UserError, match=r"has 3 columns and no header .*--header url caption score"):
        rows_of(file)
    rows = rows_of(file, columns=Columns(header=("clip", "url", "caption")))
    assert rows == [Row(0, URL.format(1), "one", {"clip": 0.5}), Row(1, URL.format(2), "two", {"clip": 0.25})]


def test_a_list_without_addresses_is_told_with_the_columns_it_has(tmp_path):
    pq.write_table(pa.table({"picture": ["x"], "text": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: no column of addresses among picture, text: .*--url-column"):
        open_list([str(tmp_path / "a.parquet")], Columns())
    file = written(tmp_path / "b.csv", "picture,words\nx,y\n")
    with pytest.raises(UserError, match=r"--url-column pictures: not among picture, words; did you mean \"picture\""):
        open_list([str(file)], Columns(url="pictures"))


def test_names_that_only_look_like_numbers_stay_texts(tmp_path):
    file = written(tmp_path / "a.csv", f"url,uid,hex,page,low,high\n{URL.format(1)},00012,12e45678,1_000,1e-05,.5\n")
    (row,) = rows_of(file)
    assert row.carried == {"uid": "00012", "hex": "12e45678", "page": "1_000", "low": 1e-05, "high": 0.5}


def test_captions_that_are_no_utf_8_are_replaced_in_parquet_too(tmp_path):
    broken = pa.array([b"caf\xe9", b"good", None]).view(pa.string())
    table = {"url": [URL.format(n) for n in range(3)], "text": broken.dictionary_encode(), "tag": broken}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert [(row.caption, row.carried.get("tag")) for row in rows_of(tmp_path / "a.parquet")] == [
        ("caf\ufffd", "caf\ufffd"),
        ("good", "good"),
        ("", None),
    ]


def test_addresses_that_are_categories_are_known(tmp_path):
    pq.write_table(pa.table({"url": pa.array([URL.format(1)]).dictionary_encode()}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == [Row(0, URL.format(1), "")]


def test_names_of_columns_that_are_no_utf_8_are_told_in_a_line(tmp_path):
    table = pa.table({"url": [URL.format(1)], "zaption": ["one"]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, store_schema=False) as writer:
        writer.write_table(table)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes().replace(b"zaption", b"zapti\xff\xfe"))
    with pytest.raises(UserError, match=r"a.parquet: is no parquet file: 'utf-8' codec"):
        open_list([str(tmp_path / "a.parquet")], Columns())


def test_huge_cells_are_not_kept(tmp_path):
    columns = {"url": [" " + URL.format(1), "http://" + "a" * 9_000], "text": ["x" * 20_001, "x" * 20_000]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = rows_of(tmp_path / "a.parquet")
    assert (first.url, first.caption) == (URL.format(1), "")
    # One more than an address may have: it is refused as before.
    assert (len(second.url), len(second.caption)) == (4_097, 20_000)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"PAR1 is not enough", "is no parquet file"),
        ("a.csv", b"", "is empty"),
        ("a.csv.gz", b"this is not gzip", "cannot be read"),
        ("a.tsv", b"x" * (1 << 20), "longer than 1048576 characters"),
        ("a.csv", "url,caption\nhttp://example.com/1.jpg,one\n".encode("utf-16"), "perhaps in UTF-16"),
        ("a.jsonl", b"{}", "the name of a list ends in"),
    ],
)
def test_what_is_no_list_is_told_in_a_line(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        rows_of(tmp_path / name)


def test_a_store_that_hangs_up_is_told_in_a_line(tmp_path, monkeypatch):
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() < 100:
                raise aiohttp.ClientPayloadError("the store hung up")
            return super().read(size)

    pq.write_table(pa.table({"url": [URL.format(n) for n in range(300)]}), tmp_path / "a.parquet")
    listed = open_list([str(tmp_path / "a.parquet")], Columns())
    content = (tmp_path / "a.parquet").read_bytes()
    monkeypatch.setattr(places, "open_binary", lambda file: Failing(content))
    with pytest.raises(UserError, match=r"a.parquet: cannot be read: the store hung up"):
        list(listed.parts(3, lambda _: True))


def test_a_gzip_that_is_cut_off_is_told_when_its_end_comes(tmp_path):
    whole = gzip.compress("".join(f"{URL.format(n)}\t{n}\n" for n in range(5000)).encode())
    (tmp_path / "a.tsv.gz").write_bytes(whole[:-300])
    with pytest.raises(UserError, match=r"a.tsv.gz: cannot be read: Compressed file ended"):
        rows_of(tmp_path / "a.tsv.gz")


def test_rows_are_counted_over_all_files_and_only_wanted_parts_come(tmp_path):
    count = BATCH_ROWS + 10
    table = pa.table({"url": [URL.format(n) for n in range(count)], "text": [str(n) for n in range(count)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    written(tmp_path / "b.tsv", "".join(f"{URL.format(n)}\t{n}\n" for n in range(count, 2 * count)))
    listed = open_list([str(tmp_path / "*")], Columns())
    found = {part: [int(row.caption) for row in rows] for part, rows in listed.parts(100, lambda part: part % 7 == 3)}
    assert found == {
        part: list(range(100 * part, min(100 * part + 100, 2 * count))) for part in range(3, -(-2 * count // 100), 7)
    }
    assert listed.rows_read == 2 * count


def test_a_list_changes_its_identity_with_its_file(tmp_path):
    file = written(tmp_path / "a.tsv", f"{URL.format(1)}\tone\n")
    before = open_list([str(file)], Columns()).identity()
    assert before == json.loads(json.dumps(before))
    written(file, f"{URL.format(1)}\tother\n")
    assert open_list([str(file)], Columns()).identity() != before


def test_a_list_named_twice_is_refused(tmp_path, monkeypatch):
    file = written(tmp_path / "a.tsv", f"{URL.format(1)}\tone\n")
    with pytest.raises(UserError, match="is named twice"):
        open_list([str(file), str(tmp_path / "*.tsv")], Columns())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is named twice"):
        open_list(["a.tsv", "*.tsv"], Columns())
