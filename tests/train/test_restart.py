"""Resumed, a run is the run that never stopped, bit for bit; what a save or a start meets costs no finished work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from data_prep.inspection.audit import audit
from limoe_dist.checkpoint import disk
from limoe_dist.checkpoint.catalog import checkpoints, latest_checkpoint
from limoe_dist.checkpoint.manifest import File, encode, read_manifest
from limoe_dist.checkpoint.state import read_state
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Checkpoint, Run
from limoe_dist.data.loader import Batch
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.folder import Ended, read_end, resume_problems
from limoe_dist.train.loop import Outcome, train
from limoe_dist.train.restart import Restart
from limoe_dist.train.step import StepResult
from limoe_dist.train.training import Training
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards
from tests.train.small import CPU, alone, lines, losses, on_ranks, run_on


def test_a_resumed_run_is_the_run_that_never_stopped(ranks2: RanksPool, tmp_path: Path, data: Path) -> None:
    text = run_on(data).model_dump_json()
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    assert ranks2.run(on_ranks, text, str(through), False, None) == [Outcome(6, 0)] * 2
    assert ranks2.run(on_ranks, text, str(stopped), False, 3) == [Outcome(3, 0)] * 2
    assert ranks2.run(on_ranks, text, str(stopped), True, None) == [Outcome(6, 0)] * 2

    assert losses(stopped) == losses(through)
    assert len(losses(through)) == 6
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        ours, theirs = (load_file(latest_checkpoint(out) / name) for out in (stopped, through))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # What was consumed is on record, without a gap: 16 pairs a step.
    assert [(line["first"], line["end"]) for line in lines(stopped, "positions.jsonl")] == [
        (0, 32),
        (32, 48),
        (48, 64),
        (64, 96),
    ]
    # Evaluated on the way at step 4, and at the end.
    assert [line["step"] for line in lines(through, "evaluations.jsonl")] == [4, 6]
    assert lines(through, "evaluations.jsonl")[0]["zeroshot"]["rows"] == 24


def test_a_run_that_goes_on_on_other_ranks_sees_the_same_samples_and_losses(
    ranks2: RanksPool, tmp_path: Path, data: Path
) -> None:
    run, out = run_on(data), tmp_path / "moved"
    ranks2.run(on_ranks, run.model_dump_json(), str(tmp_path / "through"), False, None)
    ranks2.run(on_ranks, run.model_dump_json(), str(out), False, 2)
    # Half the pairs at once, as on two ranks: the gradient stays that of the whole batch.
    halves = run.model_copy(update={"train": run.train.model_copy(update={"microbatch_pairs": 8})})
    train(halves, out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=4)
    ranks2.run(on_ranks, run.model_dump_json(), str(out), True, None)
    for (step, loss, norm), (at, wanted, wanted_norm) in zip(losses(out), losses(tmp_path / "through"), strict=True):
        assert step == at
        # The bound of sums in another order in float32; a sample more or less changes the second digit.
        assert loss == pytest.approx(wanted, abs=2e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-4)
    assert [(line["first"], line["end"]) for line in lines(out, "positions.jsonl")] == [(0, 32), (32, 64), (64, 96)]


def test_a_damaged_newest_checkpoint_costs_its_steps_and_no_more(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_on(data), tmp_path / "run"
    train(run, tmp_path / "through", mesh=Mesh.single(), device=CPU, resume=False)
    train(run, out, mesh=Mesh.single(), device=CPU, resume=False, stop_after=4)
    file = latest_checkpoint(out) / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    capsys.readouterr()
    train(run, out, mesh=Mesh.single(), device=CPU, resume=True)
    said = capsys.readouterr()
    assert "the checkpoint of step 4 is damaged" in said.err
    assert "going back to the checkpoint of step 2" in said.err
    assert "going on from step 2" in said.out
    assert losses(out) == losses(tmp_path / "through")
    ours, theirs = (latest_checkpoint(folder) / "rank-00000.safetensors" for folder in (out, tmp_path / "through"))
    assert ours.read_bytes() == theirs.read_bytes()
    # What was damaged was put aside, and went when a later checkpoint was verified.
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_a_run_whose_only_checkpoint_lost_its_manifest_does_not_begin_again_unasked(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    alone(run, out)
    (latest_checkpoint(out) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no whole checkpoint, but .*step-00000001 lacks its manifest\.json"):
        alone(run, out, resume=True)


def test_a_full_disk_is_told_and_the_run_goes_on(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_on(data), tmp_path / "run"
    write, full = disk.write, []

    def fails_once(descriptor: int, block: memoryview) -> int:
        if "step-00000002" in os.listdir(out / "checkpoints") and not full:
            full.append(True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, block)

    monkeypatch.setattr(disk, "write", fails_once)
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=False) == Outcome(6, 0)
    said = capsys.readouterr().err
    assert "warning: a checkpoint could not be saved" in said
    assert "No space left on device; make room there; training goes on" in said
    assert [path.name for path in checkpoints(out)] == ["step-00000002", "step-00000006"]


def test_a_last_save_that_fails_ends_the_run_with_an_error(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_on(data), tmp_path / "run"
    sync = disk.sync

    def fails(descriptor: int) -> None:
        if "step-00000004" in os.listdir(out / "checkpoints"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(disk, "sync", fails)
    with pytest.raises(UserError, match=r"could not be saved: .*Input/output error; older checkpoints stand"):
        train(run, out, mesh=Mesh.single(), device=CPU, resume=False)
    assert latest_checkpoint(out).name == "step-00000004"
    ended = read_end(out)
    assert ended is not None
    assert (ended.step, ended.status) == (4, 2)
    assert "could not be saved" in ended.reason
    monkeypatch.undo()
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=True) == Outcome(6, 0)


def test_what_was_copied_before_an_error_of_all_ranks_is_still_saved(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_on(data), tmp_path / "run"
    make_folder, after, try_step = disk.make_folder, threading.Event(), Training.try_step

    def late(path: Path) -> None:
        # The save of step 2 has not begun to write when step 3 fails.
        after.wait(timeout=60)
        make_folder(path)

    def third_step_fails(training: Training, batch: Batch) -> StepResult:
        if batch.step == 2:
            after.set()
            raise UserError("step 3 failed", told_by=0)
        return try_step(training, batch)

    monkeypatch.setattr(disk, "make_folder", late)
    monkeypatch.setattr(Training, "try_step", third_step_fails)
    with pytest.raises(UserError, match="step 3"):
        train(run, out, mesh=Mesh.single(), device=CPU, resume=False)
    assert [path.name for path in checkpoints(out)] == ["step-00000002"]


def test_what_another_process_saved_while_a_run_was_being_resumed_is_not_lost(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, later = run_on(data), tmp_path / "run", tmp_path / "later"
    train(run, out, mesh=Mesh.single(), device=CPU, resume=False, stop_after=2)
    shutil.copytree(out, later)
    train(run, later, mesh=Mesh.single(), device=CPU, resume=True, stop_after=4)
    restore = Restart.restore

    def while_the_other_ends(restart: Restart) -> int:
        step = restore(restart)
        shutil.copytree(latest_checkpoint(later), out / "checkpoints" / "step-00000004")
        return step

    monkeypatch.setattr(Restart, "restore", while_the_other_ends)
    with pytest.raises(UserError, match="step-00000004 was saved by another process while this one started: resume"):
        train(run, out, mesh=Mesh.single(), device=CPU, resume=True)
    monkeypatch.undo()
    assert len(losses(out)) == 2
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=5) == Outcome(5, 0)


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failure_of_the_run(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*folders: Path) -> None:
        if folders:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folders[0]))

    monkeypatch.setattr(disk, "remove", busy)
    run, out = run_on(data), tmp_path / "run"
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=False) == Outcome(6, 0)
    assert "old checkpoints stay:" in capsys.readouterr().err
    assert read_end(out) == Ended(step=6, signal=0, status=0)


def test_minutes_make_a_checkpoint_due(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    by_clock = run.model_copy(update={"checkpoint": Checkpoint(every_steps=0, every_minutes=1e-9, keep=9)})
    train(by_clock, out, mesh=Mesh.single(), device=CPU, resume=False, stop_after=3)
    assert [path.name for path in checkpoints(out)] == [f"step-0000000{step}" for step in (1, 2, 3)]


def test_quarantined_positions_stay_out_of_a_run_that_goes_on(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    alone(run, out)
    folder = latest_checkpoint(out)
    edit(folder, quarantined=[[20, 30]])
    train(run, out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=3)
    # Step 2 reads 16 to 19 and 30 to 41, step 3 the next 16.
    ledger = lines(out, "positions.jsonl")[1:]
    assert [{name: value for name, value in line.items() if name != "rows"} for line in ledger] == [
        {"step": 2, "from_step": 1, "first": 16, "end": 42, "quarantined": [[20, 30]]},
        {"step": 3, "from_step": 2, "first": 42, "end": 58},
    ]
    found = audit(out)
    assert (found.faults, found.checked) == ([], 3)
    assert found.notes == ["positions 20 to 29 were jumped over (quarantined after a rollback), in steps 2 to 2"]
    state = read_state(latest_checkpoint(out))
    assert (state.position, state.quarantined) == (58, ((20, 30),))
    assert losses(out)[1][1] != pytest.approx(undisturbed_second_loss(run, tmp_path), abs=1e-3)


def test_a_line_that_a_kill_left_unwritten_is_made_up_for(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    alone(run, out)
    (out / "positions.jsonl").unlink()
    train(run, out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=2)
    first, second = lines(out, "positions.jsonl")
    assert first == {"step": 1, "from_step": 0, "first": 0, "end": 16}
    assert (second["first"], second["end"]) == (16, 32)
    found = audit(out)
    assert (found.faults, found.checked, found.unchecked) == ([], 1, 1)


def test_a_run_that_is_older_than_windows_goes_on_with_whole_sources(tmp_path: Path, data: Path) -> None:
    def with_window(rows: int) -> Run:
        run = run_on(data)
        return run.model_copy(update={"data": run.data.model_copy(update={"window_rows": rows})})

    out = tmp_path / "run"
    alone(with_window(0), out)
    old = ("data.window_rows", "data.block_shards")
    folder = latest_checkpoint(out)
    edit(folder, settings={name: value for name, value in read_state(folder).settings.items() if name not in old})
    content = json.loads((out / "run.json").read_text())
    content["data"] = {name: value for name, value in content["data"].items() if f"data.{name}" not in old}
    (out / "run.json").write_text(json.dumps(content))
    # 64 rows: a window of 16 would read the rest of the epoch in another order, one of 64 or more in the same.
    assert [resume_problems(out, with_window(rows)) for rows in (0, 16, 64)] == [[], [], []]
    with pytest.raises(UserError, match=r"data\.window_rows=16, but .* has 0: a resumed run keeps"):
        train(with_window(16), out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=2)
    train(with_window(64), out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=2)
    assert resume_problems(out, with_window(0))
    assert audit(out).faults == []


def test_lines_about_replaced_rows_go_where_a_run_begins_again(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    (out / "replaced").mkdir(parents=True)
    (out / "run.json").write_text(run.model_dump_json())
    stale = {"position": 3, "row": 999, "key": "k", "reason": "of other data", "stand_in": 1}
    (out / "replaced" / "rank-00007.jsonl").write_text(json.dumps(stale) + "\n")
    train(run, out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=1)
    assert audit(out).faults == []


def edit(checkpoint: Path, **changes: object) -> None:
    """The checkpoint with other values in state.json, whole again."""
    state = checkpoint / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | changes))
    manifest = read_manifest(checkpoint)
    content = state.read_bytes()
    entry = File(name="state.json", bytes=len(content), xxh3=xxhash.xxh3_128(content).hexdigest())
    files = (*(file for file in manifest.files if file.name != "state.json"), entry)
    (checkpoint / "manifest.json").write_bytes(encode(manifest.model_copy(update={"files": files})))


def undisturbed_second_loss(run: Run, tmp_path: Path) -> float:
    out = tmp_path / "undisturbed"
    train(run, out, mesh=Mesh.single(), device=CPU, resume=False, stop_after=2)
    return losses(out)[1][1]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    train(run, tmp_path / "whole", mesh=Mesh.single(), device=CPU, resume=False, stop_after=2)
    out.mkdir()
    (out / "run.json").write_text(run.model_dump_json())
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=2) == Outcome(2, 0)
    assert losses(out) == losses(tmp_path / "whole")


def test_a_step_that_is_already_done_is_no_reason_to_train_on(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    train(run, out, mesh=Mesh.single(), device=CPU, resume=False, stop_after=2)
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=2) == Outcome(2, 0)
    assert len(losses(out)) == 2
    assert read_end(out) == Ended(step=2, signal=0, status=0)


@pytest.mark.parametrize(
    ("seed", "rows", "other"), [(8, 64, r"train\.seed=8, but .* has 7"), (7, 80, "made with other training shards")]
)
def test_a_run_does_not_go_on_with_what_decides_its_results_changed(
    tmp_path: Path, data: Path, seed: int, rows: int, other: str
) -> None:
    run, out = run_on(data), tmp_path / "run"
    alone(run, out)
    manifest = data if rows == 64 else write_shards(tmp_path / "shards", rows=rows)
    changed = run.model_copy(
        update={
            "train": run.train.model_copy(update={"seed": seed}),
            "data": run.data.model_copy(update={"manifest": str(manifest)}),
        }
    )
    with pytest.raises(UserError, match=other):
        alone(changed, out, resume=True)


def test_another_vocabulary_is_refused_at_resume(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    alone(run, out)
    write_shards(tmp_path / "shards", rows=64, vocab_size=28)
    changed = run.model_copy(
        update={"data": run.data.model_copy(update={"tokenizer": str(tmp_path / "shards" / "tokenizer.model")})}
    )
    with pytest.raises(UserError, match="made with other vocabulary"):
        alone(changed, out, resume=True)
