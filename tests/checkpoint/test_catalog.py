"""Which directories are checkpoints, which is taken, and which may go: never the last that was verified."""

from __future__ import annotations

from pathlib import Path

import pytest

from limoe_dist.checkpoint import catalog, disk
from limoe_dist.checkpoint.catalog import checkpoint_folder
from limoe_dist.config.errors import UserError
from tests.checkpoint.planted import RANK_0, box, plant, signed

FILE = {RANK_0: box([1.0, 2.0], of=[2], start=[0])}


def planted(run_dir: Path, *steps: int, verified: tuple[int, ...] = ()) -> list[Path]:
    folders = [plant(run_dir, FILE, step=step) for step in steps]
    for step in verified:
        catalog.note_verified(checkpoint_folder(run_dir, step))
    return folders


def steps(run_dir: Path) -> list[int]:
    return [catalog.step_of(folder) for folder in catalog.checkpoints(run_dir)]


def other(run_dir: Path, *names: str) -> list[Path]:
    """Directories of other kinds, each with a file in it."""
    folders = [run_dir / "checkpoints" / name for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / RANK_0).write_bytes(b"half")
    return folders


def test_checkpoints_are_listed_by_step_and_other_names_are_none(tmp_path: Path) -> None:
    assert catalog.checkpoints(tmp_path) == []
    have = planted(tmp_path, 9, 100_000_000, 20)
    saving, removing = other(tmp_path, ".saving-00000021-00ab", ".removing-00000001-00ab")
    aside, cut, *_ = other(
        tmp_path, "damaged-00000004-0a", "step-00000030", "step-31", "step-xxxxxxxx", "step-00000032.old", "best"
    )
    (tmp_path / "checkpoints" / "step-00000040").write_text("a file")
    assert catalog.checkpoints(tmp_path) == [have[0], have[2], have[1]]
    assert catalog.without_manifest(tmp_path) == [cut, tmp_path / "checkpoints" / "step-00000040"]
    assert catalog.leftovers(tmp_path) == [removing, saving]
    assert catalog.put_aside(tmp_path) == [aside]
    with pytest.raises(ValueError, match="is not named as a checkpoint"):
        catalog.step_of(aside)


def test_the_newest_that_looks_whole_is_taken(tmp_path: Path) -> None:
    have = planted(tmp_path, 1, 2, 3, 4, 5)
    (have[4] / RANK_0).unlink()
    (have[3] / RANK_0).write_bytes(b"short")
    (have[2] / "state.json").write_bytes((have[1] / "state.json").read_bytes())
    assert [catalog.looks_whole(folder) for folder in have] == [True, True, False, False, False]
    assert catalog.latest_checkpoint(tmp_path) == have[1]
    # Whoever asks for one gets it, and will be told what it is when it is read.
    assert catalog.latest_checkpoint(tmp_path, 5) == have[4]
    with pytest.raises(UserError, match=r"no checkpoint of step 9 \(steps there: 1, 2, 3, 4, 5\)"):
        catalog.latest_checkpoint(tmp_path, 9)
    with pytest.raises(UserError, match=r"no whole checkpoint \(steps there: none\)"):
        catalog.latest_checkpoint(tmp_path / "elsewhere")


def test_a_checkpoint_of_another_version_is_not_passed_over(tmp_path: Path) -> None:
    planted(tmp_path, 1)
    (newer,) = other(tmp_path, "step-00000002")
    (newer / "manifest.json").write_bytes(signed({"format": "limoe-checkpoint", "format_version": 3}))
    with pytest.raises(UserError, match="format_version=3, but this version reads 2"):
        catalog.latest_checkpoint(tmp_path)


def test_a_hostile_manifest_does_not_look_whole(tmp_path: Path) -> None:
    planted(tmp_path, 1)
    (hostile,) = other(tmp_path, "step-00000002")
    files = [{"name": name, "bytes": 4, "xxh3": ""} for name in ("state.json", "a\0b")]
    fields = {"format": "limoe-checkpoint", "format_version": 2, "step": 2, "files": files}
    (hostile / "manifest.json").write_bytes(signed(fields))
    assert catalog.latest_checkpoint(tmp_path).name == "step-00000001"


def test_the_last_and_every_nth_are_kept(tmp_path: Path) -> None:
    planted(tmp_path, *range(1, 10), verified=(9,))
    catalog.retire(tmp_path, keep=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    catalog.retire(tmp_path, keep=1, keep_every=0)
    assert steps(tmp_path) == [9]


def test_the_last_verified_one_is_never_removed(tmp_path: Path) -> None:
    planted(tmp_path, 1, 2, 3, 4, 5, verified=(1, 2))
    catalog.retire(tmp_path, keep=2, keep_every=0)
    assert steps(tmp_path) == [2, 4, 5]
    catalog.note_verified(checkpoint_folder(tmp_path, 4))
    catalog.retire(tmp_path, keep=1, keep_every=0)
    assert steps(tmp_path) == [4, 5]


def test_directories_without_a_manifest_are_left_to_people(tmp_path: Path) -> None:
    planted(tmp_path, 2, verified=(2,))
    (cut,) = other(tmp_path, "step-00000001")
    catalog.retire(tmp_path, keep=1, keep_every=0)
    assert cut.exists()


def test_what_killed_saves_and_removals_left_goes(tmp_path: Path) -> None:
    planted(tmp_path, 2)
    other(tmp_path, ".saving-00000003-0a", ".saving-00000001-0b", ".removing-00000001-0c")
    left = catalog.leftovers(tmp_path)
    # A save that began after they were listed is not one of them.
    other(tmp_path, ".saving-00000004-0d")
    catalog.retire(tmp_path, keep=1, keep_every=0, leftovers=left)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        ".saving-00000004-0d",
        "step-00000002",
    ]


def test_a_damaged_one_stays_until_the_run_has_a_verified_one_beyond_it(tmp_path: Path) -> None:
    planted(tmp_path, 2, 4, verified=(2,))
    folders = other(tmp_path, "damaged-00000001-0a", "damaged-00000002-0b", "damaged-00000003-0c")
    catalog.retire(tmp_path, keep=5, keep_every=0)
    assert catalog.put_aside(tmp_path) == folders[1:]
    catalog.note_verified(checkpoint_folder(tmp_path, 4))
    catalog.retire(tmp_path, keep=5, keep_every=0)
    assert catalog.put_aside(tmp_path) == []


def test_nothing_that_was_put_aside_goes_without_a_verified_checkpoint(tmp_path: Path) -> None:
    planted(tmp_path, 4)
    other(tmp_path, "damaged-00000001-0a")
    catalog.retire(tmp_path, keep=1, keep_every=0)
    assert len(catalog.put_aside(tmp_path)) == 1


def test_what_is_set_aside_keeps_its_files_and_leaves_its_place(tmp_path: Path) -> None:
    (first,) = planted(tmp_path, 3)
    content = {path.name: path.read_bytes() for path in first.iterdir()}
    aside = catalog.set_aside(first)
    assert steps(tmp_path) == []
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == content
    # The run comes to the same step again, and that one is damaged too.
    (second,) = planted(tmp_path, 3)
    again = catalog.set_aside(second)
    assert catalog.put_aside(tmp_path) == sorted([aside, again])


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = planted(tmp_path, 3)

    def killed(doomed: Path) -> None:
        (doomed / RANK_0).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        catalog.remove(folder)
    assert steps(tmp_path) == []
    assert catalog.without_manifest(tmp_path) == []
    assert [path.name[:18] for path in catalog.leftovers(tmp_path)] == [".removing-00000003"]


def test_what_a_person_removed_meanwhile_is_no_error(tmp_path: Path) -> None:
    catalog.remove(checkpoint_folder(tmp_path, 3))
    (left,) = other(tmp_path, ".saving-00000003-0a")
    disk.remove(tmp_path / "nowhere", left)
    assert not left.exists()


def test_where_nothing_can_be_noted_nothing_is(tmp_path: Path) -> None:
    (folder,) = planted(tmp_path, 3)
    # Also root cannot write below a file.
    catalog.note_verified(folder / "state.json")
    assert not catalog.is_verified(folder)
    catalog.forget_verified(folder / "state.json")
    catalog.forget_verified(folder)
    catalog.note_verified(folder)
    assert catalog.is_verified(folder)
    catalog.forget_verified(folder)
    assert not catalog.is_verified(folder)
