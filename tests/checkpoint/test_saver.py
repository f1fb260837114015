"""A save goes on behind training's back, is whole or not there, and what goes wrong is told and costs nothing else."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from limoe_dist.checkpoint import catalog, disk, saver
from limoe_dist.checkpoint.reader import Reader, open_checkpoint
from limoe_dist.checkpoint.saver import Saver
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Checkpoint
from limoe_dist.parallel.collectives import vote
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from tests.checkpoint.planted import RANK_0, RANK_1, mixed
from tests.support.checkpoints import CPU, a_state, save
from tests.support.ranks import RanksPool

ALONE = Mesh.single()
MOST_S = 30.0
"""After which a test gives up what never comes; none takes a hundredth of it."""


def saver_of(run_dir: Path, shards: dict[str, Shard], **settings: int | bool) -> tuple[Saver, list[str]]:
    """A saver in one process, and the lines that it tells."""
    told: list[str] = []
    return Saver(run_dir, shards, Checkpoint(**settings), ALONE, CPU, tell=told.append), told


def save_one(run_dir: Path, step: int, **settings: int | bool) -> Path:
    return save(run_dir, a_state(step), mixed(step), ALONE, **settings)


def steps(run_dir: Path) -> list[int]:
    return [catalog.step_of(folder) for folder in catalog.checkpoints(run_dir)]


def names(run_dir: Path) -> list[str]:
    """What lies beside one another in the directory of checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def values(run_dir: Path, step: int) -> float:
    """A number of a checkpoint, after all of it was verified."""
    return open_checkpoint(run_dir, ALONE, CPU, step).whole("model/scalar").item()


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + MOST_S
    while not done():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


class Gate:
    """In place of disk.write: every write waits until the gate is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        write = disk.write

        def gated(descriptor: int, data: memoryview) -> int:
            assert self.open.wait(MOST_S)
            return write(descriptor, data)

        monkeypatch.setattr(disk, "write", gated)


def failing(error: Exception, *, on: str = "") -> Callable[[int, memoryview], int]:
    """In place of disk.write: half of the bytes, and then the error; on: only in files of this name."""
    write = disk.write
    half: set[int] = set()

    def write_half(descriptor: int, data: memoryview) -> int:
        if on not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return write(descriptor, data)
        if descriptor in half:
            half.remove(descriptor)
            raise error
        half.add(descriptor)
        return write(descriptor, data[: len(data) // 2])

    return write_half


FULL = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")


def test_a_save_makes_a_verified_checkpoint_and_says_so(tmp_path: Path) -> None:
    shards = mixed()
    one, told = saver_of(tmp_path, shards)
    one.begin(a_state(3), shards)
    one.finish()
    assert one.last is not None
    assert not one.failure
    folder = tmp_path / "checkpoints" / "step-00000003"
    assert one.last.folder == folder
    assert names(tmp_path) == ["step-00000003"]
    assert {path.name for path in folder.iterdir()} == {RANK_0, "manifest.json", "state.json", "verified"}
    assert one.last.num_bytes == (folder / RANK_0).stat().st_size
    (line,) = told
    assert line.startswith(f"step 3: checkpoint {folder} (0.0 MB in ")
    plain = load_file(folder / RANK_0)
    assert all(torch.equal(plain[name], shard.tensor) for name, shard in shards.items())
    assert Reader(folder, ALONE, CPU).state == a_state(3)


def test_training_changes_its_tensors_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, shards = Gate(monkeypatch), mixed(1)
    one, _ = saver_of(tmp_path, shards)
    one.begin(a_state(1), shards)
    # Not a byte is written, and training goes on.
    for _ in range(3):
        assert one.flags() == (1, 0)
        one.advance(1, 0)
    for shard in shards.values():
        shard.tensor.fill_(-1)
    gate.open.set()
    one.finish()
    reader = open_checkpoint(tmp_path, ALONE, CPU)
    for name, shard in mixed(1).items():
        assert torch.equal(reader.whole(name), shard.tensor), name


def test_the_next_save_waits_for_the_former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    one, _ = saver_of(tmp_path, mixed(1))
    one.begin(a_state(1), mixed(1))
    # Long after a `begin` that does not wait would have come back.
    threading.Timer(0.3, gate.open.set).start()
    one.begin(a_state(2), mixed(2))
    assert gate.open.is_set()
    assert steps(tmp_path) == [1]
    assert catalog.is_verified(catalog.checkpoint_folder(tmp_path, 1))
    one.finish()
    assert (values(tmp_path, 1), values(tmp_path, 2)) == tuple(mixed(n)["model/scalar"].tensor.item() for n in (1, 2))


def test_in_a_hurry_the_former_is_whole_but_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, verify = threading.Event(), saver.verify

    def slow(*given: object) -> list[str]:
        assert reading.wait(MOST_S)
        return verify(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(saver, "verify", slow)
    one, _ = saver_of(tmp_path, mixed(1), keep=1)
    one.begin(a_state(1), mixed(1))
    one.begin(a_state(2), mixed(2), hurry=True)
    assert steps(tmp_path) == [1]
    one.finish(read_back=False)
    reading.set()
    assert steps(tmp_path) == [1, 2]
    assert not [folder for folder in catalog.checkpoints(tmp_path) if catalog.is_verified(folder)]


def test_every_save_is_written_from_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, places = disk.write, []

    def noted(descriptor: int, data: memoryview) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(RANK_0):
            places.append(np.frombuffer(data, np.uint8).ctypes.data)
        return write(descriptor, data)

    monkeypatch.setattr(disk, "write", noted)
    one, _ = saver_of(tmp_path, mixed())
    for step in (1, 2, 3):
        one.begin(a_state(step), mixed(step))
    one.finish()
    assert len(places) == 3
    assert len(set(places)) == 1


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = disk.write
    monkeypatch.setattr(disk, "write", lambda descriptor, data: write(descriptor, data[:100]))
    save_one(tmp_path, 1)
    assert values(tmp_path, 1) == mixed(1)["model/scalar"].tensor.item()


@pytest.mark.parametrize("on", [RANK_0, "state.json", "manifest.json"])
@pytest.mark.parametrize("error", [FULL, BROKEN], ids=["full", "broken"])
def test_a_failing_disk_costs_one_save_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: OSError, on: str
) -> None:
    one, told = saver_of(tmp_path, mixed(), keep=1)
    one.begin(a_state(1), mixed(1))
    one.finish()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write", failing(error, on=on))
        one.begin(a_state(2), mixed(2))
        one.finish()
    assert "a checkpoint could not be saved" in one.failure
    assert f"{on}: {error.strerror}" in one.failure
    assert ("; make room there" in one.failure) == (error is FULL)
    said = capsys.readouterr().err
    assert said == f"limoe: warning: {one.failure}; training goes on, and the next save will be tried\n"
    assert len(told) == 1
    until(lambda: names(tmp_path) == ["step-00000001"])
    assert open_checkpoint(tmp_path, ALONE, CPU).state.step == 1

    one.begin(a_state(3), mixed(3))
    one.finish()
    assert not one.failure
    assert steps(tmp_path) == [3]
    assert values(tmp_path, 3) == mixed(3)["model/scalar"].tensor.item()


def test_a_failure_is_told_at_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "write", failing(FULL))
    one, _ = saver_of(tmp_path, mixed())
    one.begin(a_state(1), mixed())
    until(lambda: one.flags() == (0, 1))
    assert capsys.readouterr().err == ""
    one.advance(*one.flags())
    assert "No space left on device" in capsys.readouterr().err
    assert one.flags() == (0, 0)


@pytest.mark.parametrize("path", ["checkpoints", ""])
def test_a_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    # A file in its place: that stops root too.
    run_dir = tmp_path / "run"
    (run_dir / path).parent.mkdir(exist_ok=True)
    (run_dir / path).write_text("")
    one, _ = saver_of(run_dir, mixed())
    one.begin(a_state(1), mixed())
    one.finish()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"limoe: warning: a checkpoint could not be saved: {run_dir}/checkpoints")
    assert "Not a directory" in line or "File exists" in line


def test_a_directory_that_only_others_may_write_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(disk, "make_folder", denied)
    one, _ = saver_of(tmp_path, mixed())
    one.begin(a_state(1), mixed())
    one.finish()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"limoe: warning: a checkpoint could not be saved: {tmp_path}/checkpoints/.saving-00000001-")
    assert line.endswith(": Permission denied; training goes on, and the next save will be tried")


@pytest.mark.parametrize("asked", [1, 2])
def test_where_another_run_took_the_directory_this_one_ends_and_saves_nothing(tmp_path: Path, asked: int) -> None:
    """asked: the time at which the answer is no: before this rank writes, or before the checkpoint gets its name."""
    save_one(tmp_path, 1)
    theirs = tmp_path / "checkpoints" / ".saving-00000001-0a"
    theirs.mkdir()
    answers = iter([None] * (asked - 1))

    def check() -> None:
        if next(answers, "no") == "no":
            raise UserError("the directory is now being trained by process 7")

    one = Saver(tmp_path, mixed(), Checkpoint(), ALONE, CPU, check_owner=check)
    one.begin(a_state(2), mixed(2))
    with pytest.raises(UserError, match="could not be saved: the directory is now being trained by process 7"):
        one.finish()
    # What this save left goes; a save of the other run's stays.
    until(lambda: names(tmp_path) == [theirs.name, "step-00000001"])


def test_nothing_is_removed_where_reading_back_finds_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = disk.rename

    def rename_and_flip(source: Path, target: Path) -> None:
        rename(source, target)
        data = bytearray((target / RANK_0).read_bytes())
        data[-1] ^= 1
        (target / RANK_0).write_bytes(data)

    one, _ = saver_of(tmp_path, mixed(), keep=1)
    one.begin(a_state(1), mixed(1))
    one.finish()
    with monkeypatch.context() as patch:
        patch.setattr(disk, "rename", rename_and_flip)
        one.begin(a_state(2), mixed(2))
        one.finish()
    assert "a checkpoint was not verified: read back" in one.failure
    assert f"{RANK_0} was changed after it was written: its checksum differs" in capsys.readouterr().err
    assert steps(tmp_path) == [1, 2]
    assert [catalog.is_verified(folder) for folder in catalog.checkpoints(tmp_path)] == [True, False]
    assert open_checkpoint(tmp_path, ALONE, CPU).state.step == 1
    # The next one is whole: now the others may go.
    one.begin(a_state(3), mixed(3))
    one.finish()
    assert steps(tmp_path) == [3]


def test_without_reading_back_nothing_counts_as_verified(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_one(tmp_path, step, keep=1, read_back=False)
    assert steps(tmp_path) == [3]
    assert not catalog.is_verified(catalog.checkpoint_folder(tmp_path, 3))
    # One that a run went on from was verified when it was read: it stays until a newer one is.
    open_checkpoint(tmp_path, ALONE, CPU)
    for step in (4, 5):
        save_one(tmp_path, step, keep=1, read_back=False)
    assert steps(tmp_path) == [3, 5]


def test_only_what_the_settings_ask_for_is_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_one(tmp_path, step, keep=2, keep_every=3)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 7)]


def test_a_save_of_the_same_step_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = save_one(tmp_path, 3)
    (folder / "stray").write_text("x")
    assert save(tmp_path, a_state(3), mixed(9), ALONE) == folder
    assert not (folder / "stray").exists()
    assert values(tmp_path, 3) == mixed(9)["model/scalar"].tensor.item()
    assert names(tmp_path) == ["step-00000003"]


def test_what_a_killed_save_left_does_not_disturb_and_goes(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".saving-00000003-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "rank-00007.safetensors").write_bytes(b"half")
    save_one(tmp_path, 3)
    assert names(tmp_path) == ["step-00000003"]
    assert not (catalog.checkpoint_folder(tmp_path, 3) / "rank-00007.safetensors").exists()


def test_what_failed_saves_left_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "checkpoints" / ".saving-00000003-0123456789abcdef"
    left.mkdir(parents=True)
    (left / RANK_0).write_bytes(b"half of a save that was killed")
    monkeypatch.setattr(disk, "write", failing(FULL))
    one, _ = saver_of(tmp_path, mixed())
    one.begin(a_state(4), mixed())
    one.finish()
    assert "No space left on device" in one.failure
    until(lambda: names(tmp_path) == [])


def raised(one: Saver, mesh: Mesh) -> tuple[str, int | None]:
    """What `advance` raises in one of the next steps of training, and who tells it."""
    for _ in range(2000):
        try:
            one.advance(*vote(mesh.world, CPU, *one.flags()))
        except UserError as error:
            return str(error), error.told_by
        time.sleep(0.005)
    return "nothing", None


def save_with_a_fault_on_rank_1(run_dir: str, error: Exception) -> tuple[str, int | None, str, str]:
    """On a rank: what was raised, who tells it, what this rank said, and the failure that it keeps."""
    mesh, said = Mesh.build(tp=1, ep=1), io.StringIO()
    shards = mixed(mesh.rank)
    mine = {f"{name}/{mesh.rank}": shard for name, shard in shards.items()}
    save(Path(run_dir), a_state(1), mine, mesh)
    fault = failing(error) if mesh.rank == 1 else disk.write
    with mock.patch.object(disk, "write", fault), redirect_stderr(said):
        one = Saver(Path(run_dir), mine, Checkpoint(), mesh, CPU)
        one.begin(a_state(2), mine)
        if isinstance(error, OSError):
            one.finish()
            text, teller = "nothing", None
        else:
            text, teller = raised(one, mesh)
    # The saver is of use again, whatever happened.
    one.begin(a_state(3), mine)
    one.finish()
    return text, teller, said.getvalue(), one.failure


def test_an_error_that_is_not_the_disks_ends_training_on_all_ranks(ranks2: RanksPool, tmp_path: Path) -> None:
    others, own = ranks2.run(save_with_a_fault_on_rank_1, str(tmp_path), RuntimeError("planted"))
    assert others[:3] == ("a checkpoint could not be saved: rank 1 found a fault", 1, "")
    assert own[0].startswith(f"a checkpoint could not be saved: {tmp_path}/checkpoints/.saving-00000002-")
    assert own[0].endswith(": RuntimeError: planted")
    assert own[1] == 1
    # Where it comes from is a matter for who mends the code.
    assert "in write_half" in own[2]
    assert (others[3], own[3]) == ("", "")
    until(lambda: names(tmp_path) == ["step-00000001", "step-00000003"])


def test_a_disk_that_is_full_on_one_rank_ends_no_training(ranks2: RanksPool, tmp_path: Path) -> None:
    others, own = ranks2.run(save_with_a_fault_on_rank_1, str(tmp_path), FULL)
    assert others == ("nothing", None, "", "")
    assert own[:2] == ("nothing", None)
    assert own[2].count("\n") == 1
    assert f"{RANK_1}: No space left on device; make room there" in own[2]
    until(lambda: names(tmp_path) == ["step-00000001", "step-00000003"])


def save_where_rank_1_sees_another_disk(run_dir: str) -> str:
    mesh = Mesh.build(tp=1, ep=1)
    mine = {f"{name}/{mesh.rank}": shard for name, shard in mixed().items()}
    one = Saver(Path(run_dir) / f"of-rank-{mesh.rank}", mine, Checkpoint(), mesh, CPU)
    with mock.patch.object(saver, "SEEN_S", 0.2):
        one.begin(a_state(1), mine)
        with pytest.raises(UserError) as raised:
            one.finish()
    return str(raised.value)


def test_where_ranks_do_not_share_a_file_system_that_is_said(ranks2: RanksPool, tmp_path: Path) -> None:
    own, others = ranks2.run(save_where_rank_1_sees_another_disk, str(tmp_path))
    assert f"{RANK_1} was written by another rank, and this host does not see it" in own
    assert "must be on a file system that all hosts share" in own
    assert others.endswith("rank 0 found a fault")
    assert steps(tmp_path / "of-rank-0") == steps(tmp_path / "of-rank-1") == []


def test_a_save_is_made_whole_where_training_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    one, _ = saver_of(tmp_path, mixed(1))
    one.begin(a_state(1), mixed(1))
    threading.Timer(0.1, gate.open.set).start()
    one.rescue()
    assert steps(tmp_path) == [1]
    # Nothing goes on: there is nothing to rescue.
    one.rescue()
    assert values(tmp_path, 1) == mixed(1)["model/scalar"].tensor.item()


def test_a_save_in_a_hurry_is_not_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal comes while older checkpoints are being removed: the last save begins beside that."""
    remove, begun, hurried = disk.remove, threading.Event(), threading.Event()

    def slow(*folders: Path) -> None:
        begun.set()
        assert hurried.wait(60)
        remove(*folders)

    one, _ = saver_of(tmp_path, mixed(), keep=1)
    one.begin(a_state(1), mixed(1))
    one.finish()
    monkeypatch.setattr(disk, "remove", slow)
    one.begin(a_state(2), mixed(2))
    while not begun.is_set():
        one.go_on()
    one.begin(a_state(3), mixed(3), hurry=True)
    while one.flags()[0]:
        time.sleep(0.01)
    hurried.set()
    one.finish(read_back=False)
    assert one.failure == ""
    assert open_checkpoint(tmp_path, ALONE, CPU).state.step == 3


def test_what_is_on_the_disk_of_state_json_is_read_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = disk.rename

    def rename_and_flip(source: Path, target: Path) -> None:
        rename(source, target)
        data = bytearray((target / "state.json").read_bytes())
        data[len(data) // 2] ^= 1
        (target / "state.json").write_bytes(data)

    one, _ = saver_of(tmp_path, mixed(), keep=1)
    one.begin(a_state(1), mixed(1))
    one.finish()
    monkeypatch.setattr(disk, "rename", rename_and_flip)
    one.begin(a_state(2), mixed(2))
    one.finish()
    assert "state.json was changed after it was written" in one.failure
    assert steps(tmp_path) == [1, 2]


def test_a_signal_is_not_kept_waiting_by_a_checkpoint_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(saver, "verify", lambda *_: released.wait(60) and [])
    one = Saver(tmp_path, mixed(), Checkpoint(), ALONE, CPU, stopped=lambda: True, tell=lambda text: None)
    monkeypatch.setattr(saver, "PATIENCE_S", 0.05)
    one.begin(a_state(1), mixed(1))
    one.finish()
    assert steps(tmp_path) == [1]
    assert not released.is_set()
    released.set()
