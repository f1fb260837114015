"""The checksum of the code, without which ranks of two versions would train together."""

from __future__ import annotations

from pathlib import Path

import torch

from limoe_dist.parallel.preflight import code_version


def test_another_line_file_or_name_of_code_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "block.py"
    file.write_text("x = 1\n")
    versions = [code_version(tmp_path)]
    file.write_text("x = 2\n")
    versions.append(code_version(tmp_path))
    file.rename(tmp_path / "model" / "tower.py")
    versions.append(code_version(tmp_path))
    (tmp_path / "new.py").write_text("")
    versions.append(code_version(tmp_path))
    assert len({version["limoe-dist"] for version in versions}) == 4
    assert {version["torch"] for version in versions} == {torch.__version__}
    # What is no code does not count: shards, caches, notes.
    (tmp_path / "notes.txt").write_text("later")
    assert code_version(tmp_path) == versions[-1]
