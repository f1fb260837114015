from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.manifest import load_manifest, save_manifest, sha256_of, verify_shards
from tests.support.shards import picture, write_shards


def rewrite(path: Path, table: pa.Table) -> None:
    """Writes the first shard anew, with a manifest that agrees with its bytes."""
    manifest = load_manifest(path)
    file = path.parent / manifest.shards[0].file
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    shard = manifest.shards[0].model_copy(update={"bytes": file.stat().st_size, "sha256": sha256_of(file)})
    save_manifest(manifest.model_copy(update={"shards": (shard, *manifest.shards[1:])}), path)


def table_of(path: Path) -> pa.Table:
    return pa.ipc.open_file(path.parent / "shard-00000.arrow").read_all()


def test_every_row_is_found_by_its_number(tmp_path: Path) -> None:
    # 25 rows in 3 shards of 9, 8 and 8, in record batches of 7: every kind of edge.
    shards = ShardSet(write_shards(tmp_path, rows=25, shards=3))
    assert len(shards) == 25
    for number in (24, 0, 6, 7, 8, 9, 16, 17, 23, 3):
        row = shards.row(number)
        assert row.key == f"row-{number}"
        assert row.number == number
        assert row.image.tobytes() == picture(number)
        assert row.shard * 8 + (row.shard > 0) + row.index_in_shard == number
    assert shards.row(2).captions == ("a blue stripe", "picture of a blue stripe")
    assert (shards.row(2).concept, shards.row(2).source) == ("blue stripe", "generated")
    for outside in (-1, 25):
        with pytest.raises(IndexError, match=f"row {outside} of 25"):
            shards.row(outside)


def test_shards_are_opened_only_when_one_of_their_rows_is_read(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=20, shards=2))
    (tmp_path / "shard-00001.arrow").write_bytes(b"")
    assert shards.row(9).key == "row-9"
    with pytest.raises(UserError, match=r"shard-00001\.arrow: cannot be read as an Arrow file"):
        shards.row(10)


def test_pictures_are_views_of_the_file(tmp_path: Path) -> None:
    row = ShardSet(write_shards(tmp_path, rows=4, shards=1)).row(1)
    assert not row.image.flags.owndata
    assert not row.image.flags.writeable


def test_stand_ins_are_the_next_rows_of_the_shard_and_wrap(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=12, shards=2))
    assert list(shards.next_in_shard(4, 16)) == [5, 0, 1, 2, 3]
    assert list(shards.next_in_shard(6, 3)) == [7, 8, 9]
    assert list(shards.next_in_shard(11, 2)) == [6, 7]


def test_blank_captions_are_left_out(tmp_path: Path) -> None:
    captions = {0: ["", "  ", "a cat"], 1: ["\t"], 2: []}
    shards = ShardSet(write_shards(tmp_path, rows=3, shards=1, captions=captions))
    assert [shards.row(i).captions for i in range(3)] == [("a cat",), (), ()]


def test_a_tampered_shard_fails_its_checksum_on_the_rank_that_reads_it(tmp_path: Path) -> None:
    manifest = load_manifest(write_shards(tmp_path, rows=12, shards=2))
    verify_shards(manifest, tmp_path)
    file = tmp_path / "shard-00001.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.arrow: its checksum is not .* was changed after packing"):
        verify_shards(manifest, tmp_path)
    verify_shards(manifest, tmp_path, rank=0, world=2)
    with pytest.raises(UserError, match="shard-00001"):
        verify_shards(manifest, tmp_path, rank=1, world=2)


def test_missing_and_cut_shards_are_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=12, shards=2)
    file = tmp_path / "shard-00001.arrow"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"shard-00001\.arrow: \d+ bytes, but manifest.json says \d+"):
        ShardSet(path)
    file.unlink()
    with pytest.raises(UserError, match=r"shard shard-00001\.arrow is missing: pack again, or copy the whole folder"):
        ShardSet(path)


def test_a_folder_stands_for_its_manifest(tmp_path: Path) -> None:
    write_shards(tmp_path, rows=3, shards=1)
    assert len(ShardSet(tmp_path)) == 3


def test_columns_of_another_name_or_type_are_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=6, shards=1)
    table = table_of(path)
    rewrite(path, table.drop_columns("concept"))
    with pytest.raises(UserError, match='no column "concept"; a shard has key, image, captions'):
        ShardSet(path).row(0)
    rewrite(path, table.set_column(4, "width", pa.array(["wide"] * 6)))
    with pytest.raises(UserError, match='column "width" is string, not int32'):
        ShardSet(path).row(0)


def test_another_number_of_rows_than_the_manifest_s_is_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=6, shards=1)
    rewrite(path, table_of(path).slice(0, 5))
    with pytest.raises(UserError, match="5 rows, but the manifest says 6"):
        ShardSet(path).row(0)


def test_offsets_that_point_outside_the_file_are_refused(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=6, shards=1)
    file = tmp_path / "shard-00000.arrow"
    honest = np.cumsum([0, *(len(picture(row)) for row in range(6))]).astype("<i4")
    hostile = np.append(honest[:-1], 2_000_000_000).astype("<i4")
    content = file.read_bytes()
    assert content.count(honest.tobytes()) == 1
    file.write_bytes(content.replace(honest.tobytes(), hostile.tobytes()))
    with pytest.raises(UserError, match=r"shard-00000\.arrow: record batch 0 is damaged .* pack again"):
        ShardSet(path).row(5)


def test_two_manifests_are_one_set_with_the_rows_of_the_second_behind_the_first(tmp_path: Path) -> None:
    paths = [write_shards(tmp_path / "a", rows=10, shards=2), write_shards(tmp_path / "b", rows=7, shards=1)]
    both, second = ShardSet(*paths), ShardSet(paths[1])
    assert len(both) == 17
    assert [(part.path, part.first_row, part.folder) for part in both.parts] == [
        (str(paths[0]), 0, str(tmp_path / "a")),
        (str(paths[1]), 10, str(tmp_path / "b")),
    ]
    both.open_all()
    row, same = both.row(12), second.row(2)
    assert (row.number, row.key, row.index_in_shard, row.shard) == (12, same.key, same.index_in_shard, 2)
    assert (row.image == same.image).all()
    assert both.file_of(row) == str(tmp_path / "b" / "shard-00000.arrow")
    # A stand-in comes from the same shard, and so from the same source.
    assert list(both.next_in_shard(15, 3)) == [16, 10, 11]
    with pytest.raises(IndexError):
        both.row(17)


def test_a_row_may_lack_its_picture(tmp_path: Path) -> None:
    row = ShardSet(write_shards(tmp_path, rows=3, shards=1, pictures={1: b""})).row(1)
    assert (row.image.shape, row.image.dtype) == ((0,), np.uint8)


def mappings(folder: Path) -> int:
    """How many files of the folder this process has mapped."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_no_more_shards_stay_mapped_than_are_asked_for(tmp_path: Path) -> None:
    shards = ShardSet(write_shards(tmp_path, rows=40, shards=10))
    shards.most_open = 3
    rows = []
    for number in [*range(40), 0, 39]:
        rows.append(shards.row(number))
        del rows[:-1]
        # The row that was handed out keeps its own shard mapped, no other.
        assert mappings(tmp_path) <= 4
    assert rows[0].key == "row-39"
    shards.close()
    # What was handed out can still be read.
    assert (rows[0].image == ShardSet(tmp_path).row(39).image).all()
    rows.clear()
    # A thread of Arrow may hold the last one for a moment.
    for _ in range(500):
        if mappings(tmp_path) == 0:
            break
        time.sleep(0.01)
    assert mappings(tmp_path) == 0
