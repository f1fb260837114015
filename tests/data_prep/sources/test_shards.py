from __future__ import annotations

import json
import pickle

import pyarrow as pa
import pytest

from data_prep.sources.columns import Columns
from data_prep.sources.opening import full_key, open_sources
from data_prep.sources.source import License
from limoe_dist.config.errors import UserError
from limoe_dist.data import manifest as manifests

SCHEMA = pa.schema(
    [
        *(("key", pa.string()), ("image", pa.binary()), ("captions", pa.list_(pa.string())), ("concept", pa.string())),
        *(("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()), ("source", pa.string())),
    ]
)


def row(number, **fields):
    known = {"key": f"src/{number}", "image": b"%d" % number, "captions": [f"caption {number}"], "concept": "owl"}
    return {**known, "width": 1, "height": 1, "sha256": "", "source": "birds", **fields}


def packed(folder, *shards, schema=SCHEMA):
    """shards: for each its record batches, lists of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, batches in enumerate(shards):
        file = folder / f"shard-{number:05d}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        rows = sum(map(len, batches))
        entry = {"file": file.name, "rows": rows, "bytes": file.stat().st_size, "sha256": manifests.sha256_of(file)}
        listed.append(entry)
    sources = [{"name": "birds", "rows": 1, "license": "MIT", "attribution": "somebody"}]
    note = {"rows": sum(one["rows"] for one in listed), "shards": listed, "sources": sources}
    (folder / "manifest.json").write_text(json.dumps(note))
    return folder


def opened(place, columns=Columns(), **more):  # noqa: B008
    (source,) = open_sources([str(place)], columns, **more)
    return source


def rows(source):
    return [sample for block in source.blocks for sample in source.read(block)]


def test_packed_rows_come_out_with_their_keys_sources_and_licences(tmp_path):
    batches = [[row(0), row(1, captions=[], concept=None)], [row(2, image=b"")]], [[row(3), row(4)]]
    for place in (packed(tmp_path / "set", *batches), tmp_path / "set/manifest.json"):
        source = opened(place)
        found = rows(source)
        assert [full_key(source, one) for one in found] == [f"set/src/{number}" for number in range(5)]
        assert [one.image for one in found] == [b"0", b"1", b"", b"3", b"4"]
        assert [one.captions for one in found][:2] == [("caption 0",), ()]
        assert {one.source for one in found} == {"birds"}
        assert source.licenses == {"birds": License("MIT", "somebody")}
    assert [block.rows for block in source.blocks] == [2, 1, 2]
    assert [one.key for one in source.read(source.blocks[2])] == ["src/3", "src/4"]
    assert rows(pickle.loads(pickle.dumps(source))) == found


def test_columns_with_scores_are_carried(tmp_path):
    schema = SCHEMA.append(pa.field("clip", pa.float64()))
    folder = packed(tmp_path / "set", [[row(0, clip=0.5), row(1)]], schema=schema)
    assert [one.scores for one in rows(opened(folder, Columns(scores=("clip",))))] == [{"clip": 0.5}, {}]
    with pytest.raises(UserError, match='no column "nsfw"'):
        opened(folder, Columns(scores=("nsfw",)))


def test_keys_that_cannot_be_keys_are_refused(tmp_path):
    found = rows(opened(packed(tmp_path / "set", [[row(0, key="../x"), row(1, key=None), row(2)]])))
    assert [(one.key, bool(one.problem)) for one in found] == [("/0/0", True), ("/0/1", True), ("src/2", False)]


def test_a_shard_that_is_missing_damaged_or_of_other_columns_is_an_error(tmp_path):
    folder = packed(tmp_path / "set", [[row(0)]])
    shard = folder / "shard-00000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(b"x" * len(content))
    with pytest.raises(UserError, match="cannot be read as an Arrow file"):
        opened(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00000\.arrow is missing"):
        opened(folder)
    with pytest.raises(UserError, match='no column "image"'):
        opened(packed(tmp_path / "b", [[{"key": "a"}]], schema=pa.schema([("key", pa.string())])))
    numbers = SCHEMA.set(0, pa.field("key", pa.int64()))
    with pytest.raises(UserError, match='column "key" is int64'):
        opened(packed(tmp_path / "c", [[row(0, key=3)]], schema=numbers))


def test_offsets_that_lead_out_of_the_file_are_an_error(tmp_path):
    folder = packed(tmp_path / "set", [[row(0, image=b"\xaa" * 64), row(1, image=b"\xbb" * 64)]])
    source = opened(folder)
    shard = folder / "shard-00000.arrow"
    offsets = b"\0\0\0\0\x40\0\0\0\x80\0\0\0"
    content = shard.read_bytes()
    assert content.count(offsets) == 1
    shard.write_bytes(content.replace(offsets, b"\0\0\0\0\x40\0\0\0\0\0\0\x7f"))
    with pytest.raises(UserError, match="cannot be read as an Arrow file"):
        rows(source)


def test_what_was_learned_is_kept_and_the_fingerprint_follows_the_manifest(tmp_path):
    folder = packed(tmp_path / "set", [[row(0)]])
    first = opened(folder, index=tmp_path / "index")
    assert opened(folder, index=tmp_path / "index") == first
    assert len(list((tmp_path / "index").iterdir())) == 1
    packed(folder, [[row(0), row(1)]])
    assert opened(folder, index=tmp_path / "index").fingerprint() != first.fingerprint()
