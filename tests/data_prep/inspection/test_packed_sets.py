"""Packed sets in a store: an S3 server on loopback."""

from __future__ import annotations

import json
import tempfile

import pytest

from data_prep.cli import main
from data_prep.inspection.packed_sets import on_disk, open_set
from limoe_dist.config.errors import UserError
from tests.support.s3 import s3_server
from tests.support.shards import write_shards


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """s3://data/good and s3://data/changed, of one set; in the second a byte of the last shard is another."""
    folder = write_shards(tmp_path_factory.mktemp("packed"), rows=12, shards=3).parent
    with s3_server() as client:
        client.create_bucket(Bucket="data")
        for file in folder.iterdir():
            content = file.read_bytes()
            client.put_object(Bucket="data", Key=f"good/{file.name}", Body=content)
            if file.name == "shard-00002.arrow":
                content = content[:900] + bytes([content[900] ^ 1]) + content[901:]
            client.put_object(Bucket="data", Key=f"changed/{file.name}", Body=content)
        client.put_object(Bucket="data", Key="changed/shard-00009.arrow", Body=b"left over")
        yield "s3://data"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_set_in_a_store_is_verified_shard_by_shard_and_no_copy_stays(store, temporary, capsys):
    assert main(["verify", f"{store}/good", "--workers", "1"]) == 0
    assert "3 shards" in capsys.readouterr().out
    assert not list(temporary.iterdir())


def test_a_changed_shard_and_a_left_over_in_a_store_are_found(store, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert main(["verify", f"{store}/changed/manifest.json", "--workers", "1", "--json", str(out)]) == 1
    found = {one["kind"]: one["first"] for one in json.loads(out.read_text())["sets"][0]["findings"]}
    assert found["checksum of a shard"][0]["where"] == "shard-00002.arrow"
    assert found["shard that the manifest does not name"][0]["where"] == "shard-00009.arrow"


def test_stats_and_tokenizer_read_from_a_store(store, temporary, capsys):
    assert main(["stats", f"{store}/good"]) == 0
    assert "12 rows" in capsys.readouterr().out
    text = ["tokenizer", "--text", f"{store}/good/manifest.json", "--vocab-size", "40", "--out", str(temporary / "out")]
    assert main(text) == 0
    assert "of those that it was trained from, of 24" in capsys.readouterr().out


def test_a_missing_manifest_in_a_store_is_one_line(store):
    with pytest.raises(UserError, match=r"s3://data/absent/manifest\.json: there is no such file"):
        open_set(f"{store}/absent")


def test_a_copy_ends_a_byte_behind_its_declared_size(store, temporary):
    with on_disk(f"{store}/good/shard-00000.arrow", limit_bytes=100) as path:
        assert path.stat().st_size == 101
        assert len(path.read_bytes()) == 101
        # A process that is killed now leaves nothing behind.
        assert not list(temporary.iterdir())
