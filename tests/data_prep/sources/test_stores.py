"""Sources in a store: a real S3 server on loopback."""

from __future__ import annotations

import gzip
import io
import json

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from data_prep.sources.columns import Columns
from data_prep.sources.opening import full_key, open_sources
from data_prep.sources.url_columns import Columns as ListColumns
from data_prep.sources.url_list import open_list
from limoe_dist.config.errors import UserError
from tests.data_prep.sources.test_shards import packed
from tests.data_prep.sources.test_shards import row as packed_row
from tests.data_prep.tars_of import END, member, tar_bytes

JPG = b"\xff\xd8 picture"
KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(server, tmp_path_factory):
    """A bucket "data" with one source of each kind."""
    store = boto3.client(
        "s3", endpoint_url=server, aws_access_key_id="tester", aws_secret_access_key="secret", region_name="us-east-1"
    )
    store.create_bucket(Bucket="data")

    def put(name, content):
        # Whoever asks over HTTP has no credentials.
        store.put_object(Bucket="data", Key=name, Body=content, ACL="public-read")

    for tar in range(3):
        rows = (member(f"{n:04d}.jpg", JPG + b"%04d" % n) for n in range(300))
        put(f"tars/{tar:05d}.tar", tar_bytes(*rows, member("z.txt", b"a text")) + END)
    put("cut/0.tar", tar_bytes(member("a.jpg", JPG)))
    table = io.BytesIO()
    images = [{"bytes": b"%d" % n, "path": None} for n in range(100)]
    pq.write_table(pa.table({"image": images, "caption": [f"c {n}" for n in range(100)]}), table, row_group_size=40)
    put("tables/a.parquet", table.getvalue())
    listed = io.BytesIO()
    pq.write_table(pa.table({"url": [f"http://example.com/{n}" for n in range(5_000)]}), listed, row_group_size=900)
    put("lists/a.parquet", listed.getvalue())
    put("lists/b.tsv.gz", gzip.compress("".join(f"http://example.com/{n}\t{n}\n" for n in range(5_000)).encode()))
    names = [f"{n:03d}.jpg" for n in range(5)]
    for name in names[:4]:
        put(f"coco/train/{name}", JPG)
    put("outside.jpg", JPG)
    document = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate([*names, "../../outside.jpg"])],
        "annotations": [{"image_id": n, "caption": f"caption {n}"} for n in (0, 0, 1)],
    }
    put("coco/captions.json", json.dumps(document).encode())
    for name in ("tench/b.JPEG", "tench/a.JPEG", "gold_fish/a.png", "top.png", "gold_fish/x.txt"):
        put(f"classes/{name}", JPG)
    put(
        "folder/captions.jsonl",
        b'{"image": "sub/a.png", "caption": "an owl"}\r\n{"image": "absent.png", "caption": "x"}\n',
    )
    put("folder/sub/a.png", JPG)
    put("folder/sources.json", b'[{"name": "folder", "license": "MIT"}]')
    shards = packed(tmp_path_factory.mktemp("packed"), [[packed_row(0)], [packed_row(1), packed_row(2)]])
    for file in shards.iterdir():
        put(f"shards/{file.name}", file.read_bytes())
    return store


@pytest.fixture(autouse=True)
def _settings(server, bucket, monkeypatch):
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def rows(text, **more):
    (source,) = open_sources([text], Columns(), **more)
    return source, [sample for block in source.blocks for sample in source.read(block)]


@pytest.mark.parametrize("place", ["s3://data/tars", "s3://data/tars/*.tar", "s3://data/tars/{00000..00002}.tar"])
def test_tars(place, tmp_path):
    source, found = rows(place, index=tmp_path)
    assert len(source.blocks) == 6
    keys = [f"tars/{tar:05d}/{n:04d}" for tar in range(3) for n in range(300)]
    assert [full_key(source, row) for row in found if row.image] == keys
    assert found[1].image == JPG + b"0001"
    assert [row.captions for row in found if not row.image] == [("a text",)] * 3
    assert rows(place, index=tmp_path)[0] == source
    assert found[0].place == "s3://data/tars/00000.tar, 0000"


def test_parquet():
    source, found = rows("s3://data/tables")
    assert [(row.key, row.image, row.captions) for row in found] == [
        (f"a/{n}", b"%d" % n, (f"c {n}",)) for n in range(100)
    ]
    assert len(source.blocks) == 3


def test_a_tar_and_a_table_of_a_web_server(server):
    source, found = rows(f"{server}/data/tars/00001.tar")
    assert [full_key(source, row) for row in found[:2]] == ["00001/00001/0000", "00001/00001/0001"]
    assert (len(found), found[299].image) == (301, JPG + b"0299")
    source, found = rows(f"{server}/data/tables/a.parquet?download=true,name=web")
    assert [full_key(source, row) for row in found] == [f"web/a/{n}" for n in range(100)]
    with pytest.raises(UserError, match=r"absent\.tar: "):
        rows(f"{server}/data/tars/absent.tar")


@pytest.mark.parametrize(
    "places",
    [
        ["s3://data/lists"],
        ["s3://data/lists/*.parquet", "s3://data/lists/b.tsv.gz"],
        ["{web}/data/lists/a.parquet", "{web}/data/lists/b.tsv.gz"],
        ["{web}/data/lists/a.parquet?download=true", "{web}/data/lists/b.tsv.gz?download=true"],
    ],
)
def test_lists_of_addresses(places, server):
    listed = open_list([place.format(web=server) for place in places], ListColumns())
    found = [row for _, part in listed.parts(3_000, lambda _: True) for row in part]
    assert [(row.number, row.url) for row in found] == [(n, f"http://example.com/{n % 5_000}") for n in range(10_000)]
    assert all(len(mark.split()) == 2 for _, mark in listed.identity() if "s3://" in listed.files[0])


def test_coco():
    source, found = rows("coco:s3://data/coco/captions.json,images=s3://data/coco/train")
    assert [(full_key(source, row), row.image, row.captions) for row in found[:2]] == [
        ("captions/000", JPG, ("caption 0",)),
        ("captions/001", JPG, ("caption 1",)),
    ]
    assert [row.problem for row in found[2:4]] == ["", ""]
    assert found[4].problem == "there is no such file"
    assert "leaves the source" in found[5].problem


def test_class_folders():
    _, found = rows("classes:s3://data/classes")
    assert [(row.key, row.concept) for row in found] == [
        ("gold_fish/a.png", "gold fish"),
        ("tench/a.JPEG", "tench"),
        ("tench/b.JPEG", "tench"),
    ]


def test_a_folder_with_captions():
    source, found = rows("s3://data/folder")
    assert [(full_key(source, row), row.image, row.problem) for row in found] == [
        ("folder/sub/a", JPG, ""),
        ("folder/absent", b"", "there is no such file"),
    ]
    assert source.licenses["folder"].license == "MIT"


def test_packed_shards():
    source, found = rows("s3://data/shards")
    assert [(full_key(source, row), row.image) for row in found] == [(f"shards/src/{n}", b"%d" % n) for n in range(3)]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("s3://data/tars", "tars/00001.tar"),
        ("coco:s3://data/coco/captions.json,images=s3://data/coco/train", "coco/train/001.jpg"),
    ],
)
def test_the_fingerprint_follows_the_store(bucket, text, name):
    before = rows(text)[0].fingerprint()
    content = bucket.get_object(Bucket="data", Key=name)["Body"].read()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert rows(text)[0].fingerprint() == before
    bucket.put_object(Bucket="data", Key=name, Body=content + b"\0" * 512)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    after = rows(text)[0].fingerprint()
    bucket.put_object(Bucket="data", Key=name, Body=content)
    assert after != before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://absent/tars", "s3://absent/tars: there is no such folder or file"),
        ("webdataset:s3://absent/tars", "s3://absent/tars: there is no such file"),
        ("parquet:s3://data/tars", r"no folder or pattern of files with \.parquet"),
        ("s3://data/cut/0.tar", r"s3://data/cut/0\.tar: .*cut off"),
        ("coco:s3://data/absent.json,images=s3://data/coco/train", r"s3://data/absent\.json: there is no such file"),
        ("coco:s3://data/coco/captions.json,images=s3://absent/x", "images=s3://absent/x: there is no such folder"),
        ("shards:s3://data/tars", r"s3://data/tars/manifest\.json: there is no such file"),
        ("gs://data/tars", "gs:// needs gcsfs, which is not installed: pip install gcsfs"),
        ("nonsense://data/tars", "paths begin with s3://, gs://, https:// or are local"),
    ],
)
def test_what_is_not_there_is_an_error_that_names_it(text, reason):
    with pytest.raises(UserError, match=reason):
        open_sources([text])


def test_missing_credentials_are_an_error_that_says_so(monkeypatch):
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"s3://data/tars.*credentials"):
        open_sources(["s3://data/tars"])
