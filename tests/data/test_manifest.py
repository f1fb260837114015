from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.data.manifest import load_manifest, save_manifest, verify_shards
from tests.support.shards import write_shards


def edited(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=12, shards=2)
    manifest = load_manifest(path)
    assert (manifest.rows, [shard.rows for shard in manifest.shards]) == (12, [6, 6])
    verify_shards(manifest, tmp_path)
    save_manifest(manifest, tmp_path / "copy.json")
    assert load_manifest(tmp_path / "copy.json") == manifest


def test_what_is_no_manifest_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        load_manifest(tmp_path / "absent.json")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: .*JSON"):
        load_manifest(tmp_path)


def test_unknown_keys_and_other_schemas_are_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=2, shards=1)
    with pytest.raises(UserError, match="unknown key row"):
        load_manifest(edited(path, row=2))
    path = write_shards(tmp_path, rows=2, shards=1)
    with pytest.raises(UserError, match="schema_version=2, but this version reads 1: pack the shards again"):
        load_manifest(edited(path, schema_version=2))


def test_rows_that_do_not_add_up_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows=13, but its shards hold 12"):
        load_manifest(edited(write_shards(tmp_path, rows=12, shards=2), rows=13))


@pytest.mark.parametrize("name", ["../shard.arrow", "/etc/passwd", "..", ""])
def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    path = write_shards(tmp_path, rows=2, shards=1)
    shard = json.loads(path.read_text())["shards"][0] | {"file": name}
    with pytest.raises(UserError, match="must be a plain file name inside the manifest's folder"):
        load_manifest(edited(path, shards=[shard]))
