"""Whatever one byte, or one file, of the newest checkpoint becomes: it is seen, said, and the one before is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limoe_dist.checkpoint.catalog import looks_whole
from limoe_dist.checkpoint.reader import open_checkpoint
from limoe_dist.parallel.mesh import Mesh
from tests.checkpoint.damage import Case, cases, read_files, write_files
from tests.checkpoint.planted import RANK_0, mixed
from tests.support.checkpoints import CPU, a_state, save

ALONE = Mesh.single()
FLIPS = 9


def given(run_dir: Path) -> tuple[Path, dict[str, bytes], list[Case]]:
    older, newest = (save(run_dir, a_state(step), mixed(step), ALONE) for step in (1, 2))
    content = read_files(newest)
    return newest, content, list(cases(content, read_files(older), flips=FLIPS))


def test_all_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, content, damage = given(tmp_path)
    assert list(content) == ["manifest.json", RANK_0, "state.json"]
    # Of each of 3 files: 9 flips, 3 cuts, a byte more, none at all, another checkpoint's; and 3 pairs.
    assert len(damage) == 3 * (FLIPS + 6) + 3
    wanted = mixed(1)
    for case in damage:
        write_files(newest, case.files)
        reader = open_checkpoint(tmp_path, ALONE, CPU)
        said = capsys.readouterr().err
        assert reader.state.step == 1, case.text
        assert all(torch.equal(reader.whole(name), shard.tensor) for name, shard in wanted.items()), case.text
        assert str(newest) in said, case.text
        write_files(newest, content)
        # Whole again, it is taken again: what was seen was the damage.
        assert open_checkpoint(tmp_path, ALONE, CPU).state.step == 2, case.text
        assert capsys.readouterr().err == ""


def test_what_changes_a_name_a_size_or_the_state_is_seen_without_reading_tensors(tmp_path: Path) -> None:
    newest, content, damage = given(tmp_path)
    for case in damage:
        write_files(newest, case.files)
        # Only tensors that changed in place keep their size.
        same_size = set(case.files) == {RANK_0} and len(case.files[RANK_0] or b"") == len(content[RANK_0])
        assert looks_whole(newest) == same_size, case.text
        write_files(newest, content)
