"""What ranks compare before they meet."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec

from launch.ranks import agreement
from limoe_dist.config.presets import preset


def test_the_order_of_the_rows_is_compared_and_paths_are_not() -> None:
    run = preset("tiny")

    def words(**data: object) -> dict[str, str]:
        changed = run.model_copy(update={"data": run.data.model_copy(update=data)})
        return agreement(changed, files={}, options={})

    same = words()
    assert words(cache="elsewhere", threads=7, manifest="there") == same
    for name in ("window_rows", "block_shards"):
        assert {key for key, word in words(**{name: 7}).items() if word != same[key]} == {f"data.{name}"}


def test_a_folder_by_its_url_stands_for_its_manifest_and_a_vocabulary_for_itself(tmp_path: Path) -> None:
    content = json.dumps({"rows": 1}).encode()
    store = fsspec.filesystem("memory")
    store.pipe("/agreed/manifest.json", content)
    store.pipe("/agreed/words", b"pieces")
    (tmp_path / "manifest.json").write_bytes(content)
    (tmp_path / "words").write_bytes(b"pieces")

    def checksums(root: str) -> list[str]:
        files = {"folder": root, "file": f"{root}/manifest.json", "words": f"{root}/words", "no": f"{root}/no"}
        words = agreement(preset("tiny"), files=files, options={})
        return [words[f"sha256 of {name}"] for name in files]

    assert checksums("memory://agreed") == checksums(str(tmp_path)) == checksums(f"file://{tmp_path}")
    assert checksums("memory://agreed")[3] == "not there"
