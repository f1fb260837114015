"""`limoe checkpoint`: what it lists is what lies there, no damage passes, and nothing goes that somebody needs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from launch.checkpoint import main
from limoe_dist.checkpoint import disk
from limoe_dist.checkpoint.catalog import VERIFIED, checkpoints, is_verified, set_aside
from limoe_dist.checkpoint.manifest import NAME, STATE, CheckpointManifest, File, encode, folder_name
from limoe_dist.checkpoint.rank_file import HostCopy, file_name
from limoe_dist.checkpoint.state import State
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import decisive, preset_named, save_run
from limoe_dist.config.schema import Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.folder import Claim
from tests.support.checkpoints import a_state, save

ROOT = Path(__file__).parents[2]
TINY = preset_named("tiny")
RUN = TINY.model_copy(update={"train": TINY.train.model_copy(update={"steps": 40})})
WRITTEN = 1_700_000_000.0
"""2023-11-14, 22:13 in UTC."""


def box(values: torch.Tensor, shape: tuple[int, ...], *start: int) -> Shard:
    return Shard(tensor=values, shape=shape, start=start, writes=True)


def tensors() -> dict[str, Shard]:
    """20 numbers of weights in two tensors, 12 of a moment: 32 * 4 = 128 bytes."""
    return {
        "model/up": box(torch.arange(12.0).reshape(4, 3), (4, 3), 0, 0),
        "model/norm": box(torch.arange(8.0), (8,), 0),
        "adamw/exp_avg/up": box(-torch.arange(12.0).reshape(4, 3), (4, 3), 0, 0),
    }


def state_of(step: int, run: Run = RUN, **changes: Any) -> State:
    return a_state(step, settings=decisive(run), written=WRITTEN, **changes)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("original")
    save_run(RUN, run_dir / "run.json")
    for step in (10, 20, 30):
        save(run_dir, state_of(step), tensors(), Mesh.single(), keep=3)
    return run_dir


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    """A run with verified checkpoints of steps 10, 20 and 30."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / folder_name(step)


def steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run_dir)]


def left_over(run_dir: Path, step: int = 40) -> Path:
    """What a save leaves that is killed when it has written 100 bytes."""
    path = run_dir / "checkpoints" / f".saving-{step:08d}-0123456789abcdef"
    path.mkdir()
    (path / file_name(0)).write_bytes(bytes(100))
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def sign(checkpoint: Path, step: int) -> None:
    """Writes a manifest that is true of the files that are there: what a hostile writer would do."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.name not in (NAME, VERIFIED)]
    entries = [
        File(name=path.name, bytes=path.stat().st_size, xxh3=xxhash.xxh3_128(path.read_bytes()).hexdigest())
        for path in files
    ]
    (checkpoint / NAME).write_bytes(encode(CheckpointManifest(step=step, files=tuple(entries))))


def write_ranks(run_dir: Path, step: int, *ranks: dict[str, Shard]) -> Path:
    """A checkpoint of several ranks' boxes, wherever they say that these belong."""
    checkpoint = folder(run_dir, step)
    disk.make_folder(checkpoint)
    for rank, shards in enumerate(ranks):
        copy = HostCopy(shards)
        copy.fill(shards)
        disk.write_file(checkpoint / file_name(rank), copy.blocks())
    (checkpoint / STATE).write_text(state_of(step).model_dump_json())
    sign(checkpoint, step)
    return checkpoint


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_ls_tells_step_time_size_layout_and_state(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["ls", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if line.endswith("verified ")]
    assert [row.split()[0] for row in rows] == ["10", "20", "30"]
    size = sum(path.stat().st_size for path in folder(run_dir, 10).iterdir())
    assert f"{size / 1000:.1f} kB" in rows[0]
    assert re.search(r"2023-11-1[45] \d\d:\d\d  \d+ days", rows[0])
    assert "1 rank, tp 1, ep 1, adamw" in rows[0]


def test_ls_tells_apart_all_that_can_lie_there(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (50, 60, 70):
        save(run_dir, state_of(step), tensors(), Mesh.single(), keep=9, read_back=False)
    cut(folder(run_dir, 10) / file_name(0))
    (folder(run_dir, 20) / NAME).unlink()
    flip(folder(run_dir, 30) / STATE)
    content = json.loads((folder(run_dir, 60) / NAME).read_text()) | {"format_version": 1}
    del content["xxh3"]
    (folder(run_dir, 60) / NAME).write_text(json.dumps(content))
    aside = set_aside(folder(run_dir, 70))
    left = left_over(run_dir)
    found = asked(capsys, "ls", str(run_dir))
    assert {one["step"]: one["state"] for one in found["checkpoints"]} == {
        10: "damaged",
        30: "damaged",
        50: "looks whole",
        60: "other format",
    }
    assert {Path(one["path"]): one["state"] for one in found["others"]} == {
        folder(run_dir, 20): "no manifest",
        aside: "put aside",
        left: "saving",
    }
    assert found["bytes"] == sum(path.stat().st_size for path in (run_dir / "checkpoints").glob("*/*"))
    assert main(["ls", str(run_dir)]) == 0
    told = capsys.readouterr().out
    # What is wrong, and what to do.
    assert re.search(r"step 10: .*rank-00000.safetensors has \d+ bytes, not \d+", told)
    assert re.search(r"step 30: .*state.json was changed", told)
    assert "format_version=1, but this version reads 2" in told
    for words in ("--step 10", "--step 20", "--step 30", "--damaged", "--leftovers"):
        assert f"limoe checkpoint rm {run_dir} {words}" in told


def test_a_run_without_checkpoints_is_no_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(RUN, tmp_path / "run.json")
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} has no checkpoints\n"
    for command in ("show", "verify"):
        with pytest.raises(UserError, match="no whole checkpoint"):
            main([command, str(tmp_path)])


@pytest.mark.parametrize("command", ["ls", "show", "verify", "rm"])
def test_what_is_no_run_is_refused(tmp_path: Path, command: str) -> None:
    with pytest.raises(UserError, match="not the directory of a run"):
        main([command, str(tmp_path)])
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="checkpoints: cannot be read: Not a directory"):
        main([command, str(tmp_path)])


def test_show_tells_what_the_newest_holds(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quarantined = [(64, 80), (96, 97)]
    save(run_dir, state_of(40, position=657, quarantined=quarantined), tensors(), Mesh.single(), keep=9)
    found = asked(capsys, "show", str(run_dir), "--tensors")
    assert (found["step"], found["position"], found["quarantined"]) == (40, 657, [[64, 80], [96, 97]])
    assert found["kinds"] == {
        "adamw/exp_avg": {"tensors": 1, "numbers": 12, "bytes": 48, "dtypes": ["F32"]},
        "model": {"tensors": 2, "numbers": 20, "bytes": 80, "dtypes": ["F32"]},
    }
    assert found["tensors"]["model/up"] == {"dtype": "F32", "shape": [4, 3]}
    assert [file["name"] for file in found["files"]] == ["rank-00000.safetensors", "state.json"]
    assert main(["show", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert "64 to 79, 96 to 96" in told
    # One setting of RUN is not the preset's.
    assert re.search(r"train\.steps +40 +1200", told)
    assert "train.batch_pairs" not in told
    assert main(["show", str(run_dir), "--all"]) == 0
    assert re.search(r"train\.batch_pairs +128 +128", capsys.readouterr().out)


def test_show_counts_a_tensor_of_many_ranks_once(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.arange(12.0).reshape(4, 3)
    write_ranks(
        run_dir, 40, {"model/up": box(values[:3].clone(), (4, 3), 0, 0)}, {"model/up": box(values[3:], (4, 3), 3, 0)}
    )
    found = asked(capsys, "show", str(run_dir))
    assert found["kinds"] == {"model": {"tensors": 1, "numbers": 12, "bytes": 48, "dtypes": ["F32"]}}
    assert main(["show", str(run_dir), "--tensors"]) == 0
    assert capsys.readouterr().out == "model/up  F32   (4, 3)\n"


def test_show_warns_where_the_newest_is_damaged(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(folder(run_dir, 30) / file_name(0))
    assert main(["show", str(run_dir), "--tensors"]) == 0
    assert f"{folder(run_dir, 30)} looks damaged" in capsys.readouterr().err
    assert asked(capsys, "show", str(run_dir))["step"] == 20
    assert asked(capsys, "show", str(run_dir), "--step", "10")["step"] == 10
    with pytest.raises(UserError, match=r"no checkpoint of step 15 \(steps there: 10, 20, 30\)"):
        main(["show", str(run_dir), "--step", "15"])


def test_show_of_a_damaged_one_says_what_is_wrong_and_waits_for_nothing(run_dir: Path) -> None:
    cut(folder(run_dir, 30) / file_name(0))
    with pytest.raises(UserError, match=r"rank-00000.safetensors has \d+ bytes, not \d+"):
        main(["show", str(run_dir), "--step", "30"])
    # Nobody writes into this pipe: who reads it waits for good.
    (folder(run_dir, 20) / STATE).unlink()
    os.mkfifo(folder(run_dir, 20) / STATE)
    with pytest.raises(UserError, match=r"state.json is missing"):
        main(["show", str(run_dir), "--step", "20"])


def test_show_of_a_run_whose_preset_is_gone_compares_with_the_defaults(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(RUN.model_copy(update={"preset": "gone"}), run_dir / "run.json")
    assert main(["show", str(run_dir)]) == 0
    assert re.search(r"in the defaults\s.*train\.steps +40 +100000", capsys.readouterr().out, re.DOTALL)


def test_a_verified_checkpoint_is_noted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20, 30):
        (folder(run_dir, step) / VERIFIED).unlink()
    assert main(["verify", str(run_dir), "--step", "20"]) == 0
    assert [is_verified(folder(run_dir, step)) for step in (10, 20, 30)] == [False, True, False]
    capsys.readouterr()
    assert main(["verify", str(run_dir)]) == 0
    assert re.findall(r"step (\d+): whole", capsys.readouterr().out) == ["10", "20", "30"]
    assert all(is_verified(path) for path in checkpoints(run_dir))


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, cut])
def test_damage_is_named_and_no_longer_counts_as_verified(
    run_dir: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Any
) -> None:
    damage(folder(run_dir, 20) / name)
    assert main(["verify", str(run_dir)]) == 1
    told = capsys.readouterr().out
    assert re.findall(r"step (\d+): (whole|damaged)", told) == [("10", "whole"), ("20", "damaged"), ("30", "whole")]
    assert re.search(rf"\n  \S+/step-00000020/{name} ", told)
    assert f"limoe checkpoint rm {run_dir} --step 20 removes" in told
    assert [is_verified(folder(run_dir, step)) for step in (10, 20, 30)] == [True, False, True]


def test_a_format_that_cannot_be_read_is_not_called_whole(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((folder(run_dir, 30) / NAME).read_text()) | {"format_version": 3}
    del content["xxh3"]
    (folder(run_dir, 30) / NAME).write_text(json.dumps(content))
    assert main(["verify", str(run_dir)]) == 1
    assert re.search("step 30: not verified: .*format_version=3", capsys.readouterr().out)


ROWS = torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        # Rows 0-1 and 2-3 of four: all there.
        (((ROWS[:2], (4, 3), 0), (ROWS[2:], (4, 3), 2)), "whole"),
        # Rows 0-1 and 3: 3 * 3 of 12 numbers.
        (((ROWS[:2], (4, 3), 0), (ROWS[3:], (4, 3), 3)), "do not hold every number of model/up exactly once"),
        # Rows 0-1 and 1-2: twelve numbers, but row 1 twice and row 3 never.
        (((ROWS[:2], (4, 3), 0), (ROWS[2:], (4, 3), 1)), "00000.safetensors, rank-00001.* do not hold every number"),
        (((ROWS[:2], (4, 3), 0), (ROWS[2:], (4, 3), 3)), r"the box \(3, 0\) \+ \(2, 3\) of model/up does not fit"),
        (((ROWS[:2], (4, 3), 0), (ROWS[2:], (5, 3), 2)), r"is of shape \(5, 3\), but of \(4, 3\)"),
    ],
)
def test_boxes_must_hold_every_number_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: Any, told: str
) -> None:
    shards = [{"model/up": box(values.clone(), shape, row, 0)} for values, shape, row in ranks]
    write_ranks(tmp_path, 10, *shards)
    assert main(["verify", str(tmp_path)]) == (told != "whole")
    assert re.search(told, capsys.readouterr().out)


def oversized(content: bytes) -> bytes:
    return (1 << 40).to_bytes(8, "little") + content[8:]


def with_header(content: bytes, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[-128:]


def overlapping(content: bytes) -> bytes:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["model/up"]["data_offsets"] = header["adamw/exp_avg/up"]["data_offsets"]
    return with_header(content, header)


def without_places(content: bytes) -> bytes:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return with_header(content, header | {"__metadata__": {"limoe": "{}"}})


def foreign(content: bytes) -> bytes:
    return with_header(content, {"up": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}})


def of_another_type(content: bytes) -> bytes:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["model/norm"] |= {"dtype": "I8", "shape": [32]}
    return with_header(content, header)


def test_the_state_of_another_step_is_damage(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder(run_dir, 30) / STATE).write_text(state_of(20).model_dump_json())
    sign(folder(run_dir, 30), 30)
    assert main(["verify", str(run_dir), "--step", "30"]) == 1
    assert "state.json is of step 20, its manifest of 30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("forged", "told"),
    [
        (oversized, "cannot be read"),
        (overlapping, "cannot be read"),
        (without_places, "does not say where adamw/exp_avg/up belongs"),
        (foreign, "does not say where its tensors belong"),
        (of_another_type, "model/norm is of type I8, which no rank writes"),
    ],
)
def test_a_forged_file_with_a_true_checksum_is_damage(
    run_dir: Path, capsys: pytest.CaptureFixture[str], forged: Any, told: str
) -> None:
    path = folder(run_dir, 30) / file_name(0)
    path.write_bytes(forged(path.read_bytes()))
    sign(folder(run_dir, 30), 30)
    assert main(["verify", str(run_dir), "--step", "30"]) == 1
    assert re.search(rf"rank-00000.safetensors.*{told}", capsys.readouterr().out)


def test_what_a_file_claims_does_not_reach_the_terminal_as_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model/\x1b[31mup[bold]"
    write_ranks(tmp_path, 10, {name: box(ROWS.clone(), (4, 3), 0, 0)})
    for words in (["show", str(tmp_path), "--tensors"], ["show", str(tmp_path)], ["verify", str(tmp_path)]):
        assert main(words) == 0
        assert "\x1b" not in capsys.readouterr().out
    assert main(["show", str(tmp_path), "--tensors"]) == 0
    assert r"model/\x1b[31mup[bold]" in capsys.readouterr().out


def test_rm_removes_the_steps_that_were_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(path.stat().st_size for step in (10, 20) for path in folder(run_dir, step).iterdir())
    words = ["rm", str(run_dir), "--step", "10", "--step", "20"]
    assert main([*words, "--dry-run"]) == 0
    assert f"would free {size / 1000:.1f} kB; nothing was removed" in capsys.readouterr().out
    assert steps(run_dir) == [10, 20, 30]
    with pytest.raises(UserError, match="no terminal to ask at, so give --yes"):
        main(words)
    assert steps(run_dir) == [10, 20, 30]
    assert main([*words, "--yes"]) == 0
    assert f"removed, {size / 1000:.1f} kB freed" in capsys.readouterr().out
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [folder_name(30)]


@pytest.mark.parametrize(("answer", "status", "left"), [("y", 0, [20, 30]), ("", 1, [10, 20, 30])])
def test_rm_asks_at_a_terminal(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int, left: list[int]
) -> None:
    questions = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or answer)
    assert main(["rm", str(run_dir), "--step", "10"]) == status
    assert len(questions) == 1
    assert steps(run_dir) == left


def test_rm_keeps_the_last_that_was_verified(run_dir: Path) -> None:
    for step in (20, 30):
        (folder(run_dir, step) / VERIFIED).unlink()
    with pytest.raises(UserError, match=r"step 10 is the last checkpoint of .* that was verified"):
        main(["rm", str(run_dir), "--step", "10", "--yes"])
    assert steps(run_dir) == [10, 20, 30]
    assert main(["verify", str(run_dir)]) == 0
    assert main(["rm", str(run_dir), "--step", "10", "--yes"]) == 0
    assert steps(run_dir) == [20, 30]


def test_rm_keeps_the_last_that_looks_whole(run_dir: Path) -> None:
    for step in (10, 20, 30):
        (folder(run_dir, step) / VERIFIED).unlink()
    cut(folder(run_dir, 10) / file_name(0))
    words = ["rm", str(run_dir), "--step", "20", "--step", "30", "--yes"]
    with pytest.raises(UserError, match="step 30 is the last whole checkpoint"):
        main(words)
    assert main([*words, "--force"]) == 0
    assert steps(run_dir) == [10]


def test_rm_of_what_is_damaged(run_dir: Path) -> None:
    cut(folder(run_dir, 10) / file_name(0))
    (folder(run_dir, 20) / NAME).unlink()
    save(run_dir, state_of(40), tensors(), Mesh.single(), keep=9)
    set_aside(folder(run_dir, 30))
    assert main(["rm", str(run_dir), "--damaged", "--yes"]) == 0
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [folder_name(40)]
    assert main(["rm", str(run_dir), "--damaged", "--yes"]) == 0


def test_rm_without_a_choice_or_of_a_step_that_is_not_there_removes_nothing(run_dir: Path) -> None:
    with pytest.raises(UserError, match="say what shall go"):
        main(["rm", str(run_dir), "--yes"])
    with pytest.raises(UserError, match=r"no checkpoint of step 15 \(steps there: 10, 20, 30\)"):
        main(["rm", str(run_dir), "--step", "10", "--step", "15", "--yes"])
    assert steps(run_dir) == [10, 20, 30]


def test_a_run_that_trains_keeps_its_saves_and_is_not_disturbed(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = left_over(run_dir)
    with Claim(run_dir / "lock") as claim:
        owner = (run_dir / "lock").read_text()
        assert asked(capsys, "ls", str(run_dir))["trained_by"] == owner.strip()
        with pytest.raises(UserError, match=rf"is being trained by process {os.getpid()} on "):
            main(["rm", str(run_dir), "--leftovers", "--step", "10", "--yes", "--force"])
        assert left.exists()
        assert steps(run_dir) == [10, 20, 30]
        assert main(["rm", str(run_dir), "--step", "10", "--yes"]) == 0
        assert steps(run_dir) == [20, 30]
        claim.check()
        assert (run_dir / "lock").read_text() == owner
    assert asked(capsys, "ls", str(run_dir))["trained_by"] is None
    assert main(["rm", str(run_dir), "--leftovers", "--yes"]) == 0
    assert not left.exists()
    Claim(run_dir / "lock").close()


def test_leftovers_where_nobody_can_tell_who_trains_need_force(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = left_over(run_dir)
    (run_dir / "lock").write_text("process 1 on elsewhere\n")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert main(["ls", str(run_dir)]) == 0
    assert "lock: nobody can tell whether a process trains there: No locks available" in capsys.readouterr().err
    words = ["rm", str(run_dir), "--leftovers", "--yes"]
    with pytest.raises(UserError, match="where none does, --force removes the leftovers"):
        main(words)
    assert left.exists()
    assert main([*words, "--force"]) == 0
    assert not left.exists()


@contextmanager
def as_somebody_else(run_dir: Path) -> Iterator[None]:
    """Who may read a run and not write there; the superuser, who may do all, becomes nobody."""
    for path in (run_dir, *run_dir.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in (run_dir, *run_dir.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_the_run_of_somebody_else_is_read_and_not_changed(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as folder_of_all:
        Path(folder_of_all).chmod(0o755)
        run_dir = Path(shutil.copytree(original, Path(folder_of_all) / "run"))
        (folder(run_dir, 10) / VERIFIED).unlink()
        (run_dir / "lock").write_text("process 1 on elsewhere\n")
        flip(folder(run_dir, 20) / file_name(0))
        with as_somebody_else(run_dir):
            states = {one["step"]: one["state"] for one in asked(capsys, "ls", str(run_dir))["checkpoints"]}
            assert states == {10: "looks whole", 20: "verified", 30: "verified"}
            assert asked(capsys, "show", str(run_dir))["step"] == 30
            assert main(["verify", str(run_dir)]) == 1
            assert re.findall(r"step (\d+): damaged", capsys.readouterr().out) == ["20"]
            with pytest.raises(UserError, match=r"cannot be removed: Permission denied"):
                main(["rm", str(run_dir), "--step", "10", "--yes"])
        assert steps(run_dir) == [10, 20, 30]
        assert not is_verified(folder(run_dir, 10))


def test_no_command_imports_torch(run_dir: Path) -> None:
    left_over(run_dir)
    program = f"""
import sys
from launch.cli import main
assert main(["checkpoint", "ls", {str(run_dir)!r}]) == 0
assert main(["checkpoint", "show", {str(run_dir)!r}]) == 0
assert main(["checkpoint", "verify", {str(run_dir)!r}]) == 0
assert main(["checkpoint", "rm", {str(run_dir)!r}, "--step", "10", "--leftovers", "--yes"]) == 0
assert main(["checkpoint", "rm", {str(run_dir)!r}, "--step", "10"]) == 2
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"limoe: error: {run_dir}: no checkpoint of step 10 (steps there: 20, 30)\n"


def test_the_example_of_the_documentation_reads_tensors_of_many_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (path,) = re.findall(r'Path\("(.*?)"\)', program)
    run_dir, step = Path(path).parents[1], int(Path(path).name.removeprefix("step-"))
    values = {name: shard.tensor for name, shard in tensors().items()}
    parts = [
        {
            name: box(whole[a:b].clone(), tuple(whole.shape), a, *[0] * (whole.dim() - 1))
            for name, whole in values.items()
        }
        for a, b in ((0, 1), (1, 3), (3, 8))
    ]
    write_ranks(tmp_path / run_dir, step, *parts)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(program, found)
    assert set(found["tensors"]) == set(values)
    for name, whole in values.items():
        assert np.array_equal(found["tensors"][name], whole.numpy())
