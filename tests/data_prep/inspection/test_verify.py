from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.inspection import verify
from data_prep.inspection.packed_sets import open_set
from data_prep.inspection.shard_check import ShardTask, check_shard
from limoe_dist.config.errors import UserError
from limoe_dist.data.manifest import Source, save_manifest, sha256_of
from tests.data_prep.made_pictures import photo
from tests.data_prep.pictures_of import encoded
from tests.support.shards import damaged, picture, write_shards

ROWS = 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Of three shards, never changed."""
    return write_shards(tmp_path_factory.mktemp("packed"), rows=ROWS, shards=3).parent


@pytest.fixture
def folder(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "set")


def findings(folder, *, sample=None, workers=1):
    done = verify.verify(open_set(str(folder)), sample=sample, seed=0, workers=workers, advance=lambda rows: None)
    return {kind: [(one.where, one.what) for one in first] for kind, _, first in done.findings}


def rewritten(folder, change, *, number=0, schema=None):
    """A shard with other rows, and its size and checksum in the manifest: as a packer with a fault would make it."""
    manifest = manifest_of(folder)
    file = folder / manifest.shards[number].file
    with pa.OSFile(str(file)) as opened, pa.ipc.open_file(opened) as reader:
        rows, old = reader.read_all().to_pylist(), reader.schema
    file.unlink()
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_file(opened, schema or old) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(change(rows), schema=schema or old))
    declare(folder, number)


def declare(folder, number, **more):
    """Writes what the shard's file now is into the manifest."""
    manifest = manifest_of(folder)
    shards = list(manifest.shards)
    file = folder / shards[number].file
    shards[number] = shards[number].model_copy(update={"bytes": file.stat().st_size, "sha256": sha256_of(file), **more})
    save_manifest(manifest.model_copy(update={"shards": tuple(shards)}), folder / "manifest.json")


def manifest_of(folder):
    return open_set(str(folder)).manifest


def edit_manifest(folder, **changes):
    save_manifest(manifest_of(folder).model_copy(update=changes), folder / "manifest.json")


def test_a_set_as_it_was_packed_is_in_order_and_every_picture_is_decoded(folder):
    done = verify.verify(open_set(str(folder)), sample=None, seed=0, workers=1, advance=lambda rows: None)
    assert not done.findings
    assert (done.rows, done.decoded) == (ROWS, ROWS)
    assert done.bytes == sum(file.stat().st_size for file in folder.glob("*.arrow"))


def test_a_sample_decodes_some_of_every_shard_and_the_seed_says_which(folder):
    packed = open_set(str(folder))

    def drawn(seed):
        return [
            verify._sampled(shard.rows, ROWS, 6, [seed, n]).tolist() for n, shard in enumerate(packed.manifest.shards)
        ]

    assert [len(rows) for rows in drawn(0)] == [2, 2, 2]
    assert drawn(0) == drawn(0)
    assert any(drawn(0) != drawn(seed) for seed in range(1, 5))
    done = verify.verify(packed, sample=1, seed=0, workers=1, advance=lambda rows: None)
    assert done.decoded == 3


def test_one_flipped_bit_is_found_wherever_it_is(folder):
    file = folder / "shard-00001.arrow"
    content = bytearray(file.read_bytes())
    for place in np.random.default_rng(0).integers(0, len(content), 12):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(place) % 8
        file.write_bytes(flipped)
        assert findings(folder, sample=1)["checksum of a shard"][0][0] == "shard-00001.arrow"


def test_a_shard_that_was_cut_off_is_found_by_its_size(folder):
    os.truncate(folder / "shard-00002.arrow", 1000)
    found = findings(folder)
    assert found["size of a shard"][0][1].startswith("1000 bytes, but the manifest says ")
    assert found["no Arrow file"][0][0] == "shard-00002.arrow"


def test_a_missing_shard_and_an_empty_one_are_named(folder):
    (folder / "shard-00000.arrow").unlink()
    (folder / "shard-00001.arrow").write_bytes(b"")
    found = findings(folder)
    assert "there is no such file" in found["missing or unreadable shard"][0][1]
    assert found["size of a shard"][0] == ("shard-00001.arrow", found["size of a shard"][0][1])
    assert found["no Arrow file"][0][0] == "shard-00001.arrow"


def test_two_shards_that_changed_places_are_found(folder):
    one, two = folder / "shard-00000.arrow", folder / "shard-00001.arrow"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    found = findings(folder)
    wrong = found.get("checksum of a shard", []) + found.get("size of a shard", [])
    assert {where for where, _ in wrong} == {one.name, two.name}


def test_a_shard_that_the_manifest_does_not_name_is_found(folder):
    shutil.copy(folder / "shard-00000.arrow", folder / "shard-00007.arrow")
    assert findings(folder) == {
        "shard that the manifest does not name": [
            ("shard-00007.arrow", "its rows are not read: remove it, or pack again")
        ]
    }


def test_a_key_of_two_shards_is_found_with_both_places(folder):
    rewritten(folder, lambda rows: [{**rows[0], "key": "row-5"}, *rows[1:]])
    (finding,) = findings(folder)["key that comes twice"]
    assert finding == ("row-5", "2 rows: shard-00000.arrow row 0, shard-00001.arrow row 1")


@pytest.mark.parametrize(("rows", "of"), [(10**12, 1000), (2**70, 2**70)])
def test_a_manifest_that_declares_absurd_numbers_is_a_finding(folder, rows, of):
    shards = manifest_of(folder).shards
    edit_manifest(folder, rows=of, shards=(shards[0].model_copy(update={"rows": rows}), *shards[1:]))
    found = findings(folder, sample=500)
    assert found["rows of a shard"] == [("shard-00000.arrow", f"4 rows, but the manifest says {rows}")]
    assert main(["stats", str(folder)]) == 0


def test_a_shard_listed_twice_is_a_fault_of_the_manifest_and_its_keys_come_twice(folder):
    manifest = manifest_of(folder)
    edit_manifest(folder, shards=(*manifest.shards, manifest.shards[0]))
    found = findings(folder)
    assert [what for _, what in found["manifest"]] == [
        "rows=12, but its shards declare 16",
        "shard shard-00000.arrow is listed 2 times: its rows would be read twice",
    ]
    assert len(found["key that comes twice"]) == 4


def test_rows_that_contradict_themselves_are_named(folder):
    noise = picture(0)

    def change(rows):
        rows[0]["width"] = 25
        rows[1]["sha256"] = "0" * 64
        rows[2].update(image=damaged(2), sha256="")
        rows[3].update(image=b"", captions=[], width=0, height=0, sha256="", key="")
        return [
            *rows,
            {**rows[0], "image": b"GIF89a" + noise, "key": "gif"},
            {**rows[1], "captions": [" "], "key": "c"},
        ]

    rewritten(folder, change)
    found = findings(folder)
    assert "declared as 25 x 24, its header says 24 x 24" in found["size of a picture"][0][1]
    assert found["checksum of a picture"][0][0] == "shard-00000.arrow row-1"
    assert found["picture that cannot be decoded"][0][0] == "shard-00000.arrow row-2"
    assert found["empty row"] == [("shard-00000.arrow row 3", "neither picture nor caption")]
    assert found["row without a key"][0][0] == "shard-00000.arrow row 3"
    assert found["picture that training refuses"] == [("shard-00000.arrow gif", "neither PNG nor JPEG nor WebP")]
    assert found["blank caption"][0][0] == "shard-00000.arrow c"
    assert found["rows of a shard"] == [("shard-00000.arrow", "6 rows, but the manifest says 4")]


def test_pictures_that_training_would_misread_are_found(folder):
    """Another packer's: DALI would drop alpha, misread CMYK and not turn."""
    exif = Image.Exif()
    exif[0x0112] = 3
    odd = [
        encoded(photo(24, 24), "JPEG", exif=exif),
        encoded(photo(24, 24).convert("RGBA")),
        encoded(photo(24, 24), "JPEG") + b"PK",
        encoded(photo(24, 24), "WEBP"),
    ]
    sums = [hashlib.sha256(content).hexdigest() for content in odd]
    rewritten(folder, lambda rows: [{**r, "image": i, "sha256": s} for r, i, s in zip(rows, odd, sums, strict=True)])
    found = findings(folder)
    assert [*found] == ["picture that decoders read differently"]
    assert len(found["picture that decoders read differently"]) == 3


def test_what_is_only_in_the_pixels_is_found_by_decoding_alone(folder):
    content = damaged(1)

    def change(rows):
        rows[1].update(image=content, sha256=hashlib.sha256(content).hexdigest())
        return rows

    rewritten(folder, change)
    assert list(findings(folder)) == ["picture that cannot be decoded"]
    task = ShardTask(str(folder / "shard-00000.arrow"), open_set(str(folder)).manifest.shards[0], 0, np.array([0, 2]))
    assert not check_shard(task).findings


def test_columns_of_another_type_or_missing_are_a_finding(folder):
    schema = pa.schema([("key", pa.string()), ("image", pa.string()), ("captions", pa.list_(pa.string()))])
    rewritten(folder, lambda rows: [{"key": "a", "image": "x", "captions": ["y"]}], schema=schema)
    what = [text for _, text in findings(folder)["schema"]]
    assert 'column "image" is string, not binary' in what
    assert 'no column "width", or more than one' in what


def hostile_shard(folder, offset):
    """Writes `offset` over the last offset of the column `key` of the first shard, which then points anywhere."""
    file = folder / "shard-00000.arrow"
    content = bytearray(file.read_bytes())
    offsets = struct.pack("<5i", *np.cumsum([0, 5, 5, 5, 5]))  # row-0 to row-3
    place = content.index(offsets) + 16
    content[place : place + 4] = struct.pack("<i", offset)
    file.write_bytes(content)
    declare(folder, 0)


@pytest.mark.parametrize("offset", [2**31 - 1, -5, 21, 3])
def test_offsets_that_point_outside_are_found_and_never_followed(folder, offset):
    hostile_shard(folder, offset)
    (where, what) = findings(folder)["damaged values"][0]
    assert where == "shard-00000.arrow batch 0"
    assert 'column "key"' in what


def test_a_key_that_is_no_utf_8_is_found(folder):
    file = folder / "shard-00000.arrow"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"row-0row-1", b"row-\xffrow-1"))
    declare(folder, 0)
    assert "UTF8" in findings(folder)["damaged values"][0][1]


def test_hostile_bytes_anywhere_never_end_in_an_exception(folder):
    """Every byte of the file's last kilobyte, its footer, with 0xff in its place, and 40 places before it."""
    file = folder / "shard-00000.arrow"
    content = file.read_bytes()
    places = [*range(len(content) - 300, len(content)), *np.random.default_rng(1).integers(0, len(content), 40)]
    shard = open_set(str(folder)).manifest.shards[0]
    for place in places:
        changed = bytearray(content)
        changed[place] = 0xFF if changed[place] != 0xFF else 0
        file.write_bytes(changed)
        result = check_shard(ShardTask(str(file), shard, 0, np.array([0])))
        assert "checksum of a shard" in result.findings.counts


def test_counts_of_the_manifest_are_compared_with_the_rows(folder):
    sources = (Source(name="generated", rows=11, license="CC0-1.0"), Source(name="other", rows=1, license="CC0-1.0"))
    edit_manifest(folder, without_caption=1, without_picture=0, sources=sources)
    found = findings(folder)
    assert [what for _, what in found["rows of one modality"]] == ["0 rows without a caption, but it says 1"]
    assert [what for _, what in found["rows of a source"]] == [
        '12 rows of source "generated", but it says 11',
        '0 rows of source "other", but it says 1',
    ]


def test_a_tokenizer_that_was_changed_or_lost_is_found(folder):
    file = folder / "tokenizer.model"
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    assert "but the manifest says" in findings(folder)["tokenizer"][0][1]
    file.unlink()
    assert "there is no such file" in findings(folder)["tokenizer"][0][1]
    tokenizer = manifest_of(folder).tokenizer
    file.write_bytes(content)
    edit_manifest(folder, tokenizer=tokenizer.model_copy(update={"vocab_size": 31}))
    assert "pieces, but the manifest says 31" in findings(folder)["tokenizer"][0][1]


def test_processes_find_what_one_process_finds(folder):
    rewritten(folder, lambda rows: [{**rows[0], "key": "row-5"}, *rows[1:]])
    os.truncate(folder / "shard-00002.arrow", 1000)
    assert findings(folder, workers=2) == findings(folder, workers=1)


def deaf_to_ctrl_c(task):
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    return check_shard(task)


def test_processes_leave_ctrl_c_to_the_command(folder, monkeypatch):
    monkeypatch.setattr(verify, "check_shard", deaf_to_ctrl_c)
    assert findings(folder, workers=2) == {}


def die_on_the_second(task):
    if task.number == 1:
        os._exit(9)
    return check_shard(task)


def test_a_shard_that_kills_its_reader_is_a_finding_and_the_others_are_read(folder, monkeypatch):
    monkeypatch.setattr(verify, "check_shard", die_on_the_second)
    done = verify.verify(open_set(str(folder)), sample=1, seed=0, workers=2, advance=lambda rows: None)
    assert done.findings.counts == {"shard that ends its reader": 1}
    assert done.rows == 8


def test_the_command_ends_with_1_and_writes_what_is_wrong(folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert main(["verify", str(folder), "--all", "--workers", "1", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["result"] == "ok"
    assert "12 pictures decoded" in capsys.readouterr().out
    os.truncate(folder / "shard-00002.arrow", 1000)
    assert main(["verify", str(folder / "manifest.json"), "--workers", "1", "--json", str(out)]) == 1
    written = json.loads(out.read_text())
    assert written["result"] == "wrong"
    assert [one["kind"] for one in written["sets"][0]["findings"]] == ["no Arrow file", "size of a shard"]
    assert "shard-00002.arrow" in capsys.readouterr().out


def test_a_key_cannot_move_the_cursor_of_a_terminal(folder, capsys):
    rewritten(folder, lambda rows: [{**rows[0], "key": "\x1b[2J[red]x", "width": 3}, *rows[1:]])
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[red]x" in printed


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "SHARDS: name at least one manifest.json"),
        (["absent"], "absent: there is no such file"),
        (["SET", "--workers", "0"], "--workers=0: must be 1 or more"),
        (["SET", "--sample", "0"], "--sample=0: must be 1 or more"),
        (["SET", "--json", "no/such/folder.json"], "--json no/such/folder.json: its folder does not exist"),
    ],
)
def test_wrong_options_are_named(options, reason, packed):
    with pytest.raises(UserError, match=reason):
        main(["verify", *(str(packed) if option == "SET" else option for option in options)])


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"rows": 1, "shards": [{"file": "../x"}]}')
    with pytest.raises(UserError, match="must be a plain file name inside"):
        open_set(str(tmp_path))
