from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources.opening import open_sources, parse
from limoe_dist.config.errors import UserError
from tests.data_prep.pictures_of import folder_source
from tests.data_prep.tars_of import write_tar


def tars(folder, *names):
    for name in names:
        write_tar(folder / name, [("x.jpg", b"x")])
    return folder


def table(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [b"x"]}), file)


def kind_of(text):
    (source,) = open_sources([text])
    return type(source).__name__, source.name


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("a/b", ("", "a/b", {})),
        ("s3://bucket/x", ("", "s3://bucket/x", {})),
        ("webdataset:s3://bucket/x", ("webdataset", "s3://bucket/x", {})),
        ("a,b/c,d", ("", "a,b/c,d", {})),
        ("a,b,name=x", ("", "a,b", {"name": "x"})),
        ("coco:c.json,images=d,name=e", ("coco", "c.json", {"images": "d", "name": "e"})),
        ("a/b:c", ("", "a/b:c", {})),
    ],
)
def test_a_text_is_kind_place_and_options(written, parts):
    text = parse(written)
    assert (text.kind, text.place, text.options) == parts


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("webdatset:x", 'no kind is named "webdatset"; did you mean "webdataset"?'),
        ("parquet:", "names no place"),
        ("x,nmae=y", 'nmae= is not known; did you mean "name"?'),
        ("x,name=", "name= is empty"),
        ("x,name=a,name=b", "name= is given twice"),
        ("x/y.tar,names=z,images=w", "names= is for classes, and this is coco"),
        ("classes:x,images=w", "images= is for coco, and this is classes"),
        ("folder:x,name=a/b", "cannot be the source's name"),
        ("folder:x,name=..", "cannot be the source's name"),
        ("absent", "there is no such folder or file"),
        ("absent.tar", "there is no such file"),
        ("x/*.jpg", r"a pattern ends in \.tar or \.parquet"),
    ],
)
def test_a_text_that_cannot_be_understood_says_what_to_write(written, reason):
    with pytest.raises(UserError, match=reason) as caught:
        open_sources([written])
    assert written.partition(",")[0].rpartition(":")[2] in str(caught.value)


def test_kinds_are_recognised(tmp_path):
    folder_source(tmp_path / "pictures", [{"caption": "x"}], {})
    tars(tmp_path / "tars", "0.tar", "1.tar")
    table(tmp_path / "tables/a.parquet")
    table(tmp_path / "lake/0.parquet")
    tars(tmp_path / "lake", "0.tar", "1.tar")
    tars(tmp_path / "fetched", "part-00000.tar")
    table(tmp_path / "fetched/part-00009.parquet")
    (tmp_path / "fetched/download.json").write_text("{}")
    assert [
        kind_of(f"{tmp_path}/{place}")
        for place in (
            *("pictures", "pictures/captions.jsonl", "tars", "tars/*.tar", "tars/1.tar", "tables", "tables/a.parquet"),
            *("lake", "lake/*.parquet", "fetched"),
        )
    ] == [
        *[("FolderSource", "pictures")] * 2,
        *[("WebDataset", "tars")] * 2,
        ("WebDataset", "1"),
        *(
            ("Parquet", "tables"),
            ("Parquet", "a"),
            ("WebDataset", "lake"),
            ("Parquet", "lake"),
            ("WebDataset", "fetched"),
        ),
    ]


def test_a_place_of_several_kinds_or_of_none_is_an_error_that_names_them(tmp_path):
    tars(tmp_path / "both", "0.tar")
    table(tmp_path / "both/other.parquet")
    with pytest.raises(UserError, match="could be webdataset or parquet: say which, as in webdataset:"):
        open_sources([tmp_path / "both"])
    assert kind_of(f"parquet:{tmp_path}/both") == ("Parquet", "both")
    (tmp_path / "none/owl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds neither captions\.jsonl nor .* write classes:"):
        open_sources([tmp_path / "none"])
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="its kind cannot be told from its name: write it KIND:PLACE"):
        open_sources([tmp_path / "file.bin"])


def test_two_sources_of_one_name_are_an_error_that_name_mends(tmp_path):
    tars(tmp_path / "a/set", "0.tar")
    tars(tmp_path / "b/set", "0.tar")
    texts = [f"{tmp_path}/a/set", f"{tmp_path}/b/set"]
    with pytest.raises(UserError, match=r'--against: two sources are named "set".*,name=other'):
        open_sources(texts, option="--against")
    assert [source.name for source in open_sources([texts[0], texts[1] + ",name=more"])] == ["set", "more"]


def test_understanding_a_text_loads_neither_pyarrow_nor_fsspec():
    heavy = ["pyarrow", "fsspec", "torch", "PIL"]
    code = f"import sys, data_prep.sources.opening; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
