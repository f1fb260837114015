from __future__ import annotations

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import parquet
from data_prep.sources.columns import Columns, captions_of
from data_prep.sources.files import labels_of
from data_prep.sources.opening import open_sources
from limoe_dist.config.errors import UserError

JPG = b"\xff\xd8 picture"
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(file, columns, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, **options)
    return file


def opened(place, columns=Columns(), **more):  # noqa: B008
    (source,) = open_sources([str(place)], columns, **more)
    return source


def rows(source):
    return [sample for block in source.blocks for sample in source.read(block)]


def test_hugging_faces_image_struct_is_read_and_its_path_is_not(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    images = pa.array(
        [{"bytes": JPG, "path": "/etc/passwd"}, {"bytes": None, "path": str(tmp_path / "secret")}, None], IMAGE
    )
    file = write(tmp_path / "d/train-0.parquet", {"image": images, "text": ["an  owl", "b", "c"]})
    source = opened(file)
    assert source.fields[0].read == ["image.bytes", "text"]
    found = rows(source)
    assert [(row.key, row.image, row.captions, row.problem) for row in found] == [
        ("train-0/0", JPG, ("an owl",), ""),
        ("train-0//1", b"", (), "has no bytes of a picture"),
        ("train-0//2", b"", (), "has no bytes of a picture"),
    ]
    assert found[0].place == f"{file}, row 0"


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_plain_column_of_bytes_with_lists_of_captions_and_scores(tmp_path, kind):
    write(
        tmp_path / "d/a.parquet",
        {
            "png": pa.array([JPG, JPG], kind),
            "captions": [["one", "two", "one"], ["", "three", None]],
            "concept": ["owl", None],
            "clip": [0.3, None],
            "uid": ["u1", "u/2"],
        },
    )
    found = rows(opened(tmp_path / "d", Columns(scores=("clip",), key="uid")))
    assert [(row.key, row.captions, row.concept, row.scores) for row in found] == [
        ("a/0/u1", ("one", "two"), "owl", {"clip": 0.3}),
        ("a/1/u/2", ("three",), "", {}),
    ]


def test_class_numbers_get_the_names_that_the_file_tells(tmp_path):
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["tree_frog", "owl"]}}}}
    table = pa.table({"img": [JPG] * 3, "label": [1, 0, -1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "a.parquet")
    found = rows(opened(tmp_path / "a.parquet", Columns(concept="label")))
    assert [(row.concept, row.captions, row.problem) for row in found] == [
        ("owl", (), ""),
        ("tree frog", (), ""),
        ("", (), "its class -1 has no name"),
    ]
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match='column "label" holds numbers, and the file does not tell their names'):
        opened(tmp_path / "a.parquet", Columns(concept="label"))


def test_nulls_and_empty_cells_are_refused_row_by_row(tmp_path):
    write(
        tmp_path / "a.parquet",
        {"image": [None, b"", JPG, JPG, JPG], "caption": [["a"], ["a"], None, [], ["", None]]},
    )
    assert [row.problem for row in rows(opened(tmp_path / "a.parquet"))] == [
        "has no bytes of a picture",
        "its picture is empty",
        *["has an empty caption"] * 3,
    ]


def test_text_that_is_not_utf8_is_refused_row_by_row(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")]
    )
    write(tmp_path / "a.parquet", {"image": [JPG, JPG], "caption": bad})
    assert [row.problem for row in rows(opened(tmp_path / "a.parquet"))] == ["", "has text that is not UTF-8"]


def test_huge_cells_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGEST_PICTURE", 1000)
    monkeypatch.setattr(parquet, "LARGEST_TEXT", 100)
    write(
        tmp_path / "a.parquet",
        {"image": [b"x" * 1001, b"x" * 1000, JPG], "caption": [["a"], ["x" * 100], ["x" * 60, "x" * 60]]},
    )
    assert [row.problem for row in rows(opened(tmp_path / "a.parquet"))] == [
        "its picture has 1001 bytes, more than 1000",
        "",
        "has captions of 120 characters, more than 100",
    ]


def test_keys_that_cannot_be_keys_are_refused(tmp_path):
    write(tmp_path / "a.parquet", {"image": [JPG] * 3, "id": ["../x", "a\nb", "ok"]})
    found = rows(opened(tmp_path / "a.parquet", Columns(key="id")))
    assert [row.key for row in found] == ["a//0", "a//1", "a/2/ok"]
    assert "leaves the source" in found[0].problem


@pytest.mark.parametrize(
    ("columns", "wanted", "reason"),
    [
        ({"url": ["https://x.example"], "caption": ["x"]}, {}, "no column with pictures.*limoe prep download --list"),
        ({"image": ["https://x.example"]}, {}, 'column "image" is string; pictures are binary'),
        ({"image": [JPG], "caption": [3]}, {}, 'column "caption" is int64, not a text or a list of texts'),
        ({"image": [JPG], "caption": [{"raw": "x"}]}, {}, 'column "caption" is struct'),
        ({"image": [JPG], "captino": ["x"]}, {"caption": "caption"}, 'no such column.*did you mean "captino"'),
        ({"image": [JPG], "s": ["x"]}, {"scores": ("s",)}, 'column "s" is string, not a number'),
        ({"image": [JPG]}, {"scores": ("clip",)}, "score column=clip: no such column"),
        ({"image": [{"path": "a.png"}]}, {}, "pictures are binary, or a struct"),
    ],
)
def test_columns_of_other_types_are_an_error_that_names_them(tmp_path, columns, wanted, reason):
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=reason):
        opened(tmp_path / "a.parquet", Columns(**wanted))


@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_a_truncated_file_is_an_error(tmp_path, keep):
    file = write(tmp_path / "a.parquet", {"image": [JPG]})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.parquet: (is no parquet file|cannot be read)"):
        opened(file)


def test_damaged_pages_are_an_error_while_they_are_read(tmp_path):
    file = write(tmp_path / "a.parquet", {"image": [bytes([n]) * 500 for n in range(50)]}, use_dictionary=False)
    content = bytearray(file.read_bytes())
    source = opened(file)
    content[4:300] = b"\xff" * 296
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: "):
        rows(source)


def test_a_file_without_rows_is_passed_over_and_none_with_rows_is_an_error(tmp_path):
    write(tmp_path / "d/a.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(UserError, match="has no rows"):
        opened(tmp_path / "d")
    write(tmp_path / "d/b.parquet", {"image": [JPG]})
    assert [row.key for row in rows(opened(tmp_path / "d"))] == ["b/0"]


def test_long_row_groups_are_cut_and_every_row_is_read_once_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "SLICE_ROWS", 10)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 7)
    file = write(tmp_path / "a.parquet", {"image": [b"%d" % n for n in range(100)]}, row_group_size=45)
    source = opened(file)
    assert [(block.start, block.end, block.rows) for block in source.blocks] == [
        *((0, before, 9) for before in range(0, 45, 9)),
        *((1, before, 9) for before in range(0, 45, 9)),
        (2, 0, 10),
    ]
    found = {block: [row.image for row in source.read(block)] for block in reversed(source.blocks)}
    assert [image for block in source.blocks for image in found[block]] == [b"%d" % n for n in range(100)]


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_cell_that_a_dictionary_repeats_is_held_once_at_a_time(tmp_path, store_schema):
    """4 MB stored once stand in 2,000 rows: 256 rows at a time would be a gigabyte."""
    cell = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([b"x" * 4_000_000], pa.binary()))
    file = write(tmp_path / "a.parquet", {"image": cell}, compression="zstd", store_schema=store_schema)
    assert file.stat().st_size < 100_000
    source = opened(file)
    block = source.blocks[0]
    before = pa.total_allocated_bytes()
    most = 0
    for number, sample in enumerate(source.read(block)):
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(sample.image) == 4_000_000
        if number == 30:
            break
    assert most < 100_000_000


def test_ten_million_rows_would_stay_small(tmp_path):
    file = write(tmp_path / "a.parquet", {"image": [b"x"] * 50_000}, row_group_size=1000)
    source = opened(file)
    assert sum(block.rows for block in source.blocks) == 50_000
    assert len(pickle.dumps(source)) < 50_000  # below a byte a row


def test_what_was_learned_is_kept(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", {"image": [JPG], "caption": ["x"]})
    first = opened(file, index=tmp_path / "index")
    monkeypatch.setattr(parquet, "fields_of", None)
    assert opened(file, index=tmp_path / "index") == first
    monkeypatch.undo()
    # Other columns are other knowledge.
    assert opened(file, Columns(caption="caption", scores=()), index=tmp_path / "index").fields == first.fields
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_the_fingerprint_follows_files_and_columns(tmp_path):
    file = write(tmp_path / "a.parquet", {"image": [JPG], "a": ["x"], "b": ["y"]})
    before = opened(file, Columns(caption="a")).fingerprint()
    assert opened(file, Columns(caption="a")).fingerprint() == before
    assert opened(file, Columns(caption="b")).fingerprint() != before
    write(file, {"image": [JPG * 50], "a": ["x"], "b": ["y"]})
    assert opened(file, Columns(caption="a")).fingerprint() != before


def test_a_name_of_a_column_that_is_no_utf_8_is_told_in_a_line(tmp_path):
    table = pa.table({"image": [JPG], "caption": ["one"]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema, store_schema=False) as writer:
        writer.write_table(table)
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes().replace(b"caption", b"capti\xff\xfe"))
    with pytest.raises(UserError, match=r"a\.parquet: is no parquet file"):
        opened(tmp_path / "a.parquet")


def test_a_list_of_very_many_captions_is_refused_before_it_is_unfolded(tmp_path, monkeypatch):
    unfolded: list[int] = []
    monkeypatch.setattr(parquet, "captions_of", lambda texts: unfolded.append(len(texts)) or captions_of(texts))
    captions = pa.array([["x"] * 200_000, ["one"]])
    (refused, taken) = rows(opened(write(tmp_path / "d/a.parquet", {"image": [JPG, JPG], "captions": captions})))
    assert (refused.problem, taken.captions) == ("has 200000 captions, more than 1000", ("one",))
    assert unfolded == [1]


def test_a_label_of_a_store_does_not_begin_within_the_buckets_name():
    files = ["s3://bucket/x/1.tar", "s3://bucket/y/1.tar"]
    assert labels_of(files, suffix=".tar") == ["x+1", "y+1"]
    assert labels_of(["/a/xa/1.tar", "/a/xb/1.tar", "/a/1.tar"], suffix=".tar") == ["xa+1", "xb+1", "1"]
