"""Training in a directory: resumed it is the run that never stopped, bit for bit; faults leave what is there alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from limoe_dist.checkpoint import disk
from limoe_dist.checkpoint.catalog import checkpoints, latest_checkpoint
from limoe_dist.checkpoint.manifest import File, encode, read_manifest
from limoe_dist.checkpoint.state import read_state
from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.schema import Checkpoint, Data, Eval, Log, Parallel, Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import loop, metrics
from limoe_dist.train.folder import Claim, Ended, begin, read_end
from limoe_dist.train.loop import Outcome, train
from limoe_dist.train.preemption import StopFlag
from limoe_dist.train.restart import Restart
from limoe_dist.train.step import StepResult
from tests.support.cases import small_run
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "validation", rows=24, shards=1)
    return write_shards(folder / "train", rows=64)


def run_on(data: Path, *, steps: int = 6) -> Run:
    run = small_run("fp32", steps=steps)
    return run.model_copy(
        update={
            "data": Data(manifest=str(data), validation=str(data.parent.parent / "validation" / "manifest.json")),
            "optim": run.optim.model_copy(update={"cooldown_steps": 2}),
            "parallel": Parallel(ep=2),
            "eval": Eval(every_steps=4, batch_pairs=8),
            "checkpoint": Checkpoint(every_steps=2),
            "log": Log(every_steps=1, tensorboard=True),
        }
    )


def on_ranks(text: str, out: str, resume: bool, stop_after: int | None) -> Outcome:
    run = Run.model_validate_json(text)
    return train(run, Path(out), mesh=Mesh.build(tp=1, ep=2), device=CPU, resume=resume, stop_after=stop_after)


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(out)]


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


def test_metrics_tell_what_the_issue_of_a_run_needs(ranks2: RanksPool, tmp_path: Path, data: Path) -> None:
    out = tmp_path / "run"
    ranks2.run(on_ranks, run_on(data, steps=8).model_dump_json(), str(out), False, 2)
    line = lines(out)[-1]
    assert set(line["blocks"]) == {"1", "3"}
    block = line["blocks"]["1"]
    assert {"success_image", "success_text", "entropy_image", "entropy_text", "experts_image", "importance"} <= set(
        block
    )
    # 16 pairs with 16 image tokens each: what experts kept is what was asked for times the success rate.
    assert sum(image for image, _ in block["kept"]) == pytest.approx(256 * block["success_image"])
    assert 0 < block["success_image"] < 1
    assert {"loss", "contrastive", "lr", "grad_norm", "temperature", "memory_bytes", "pairs_per_s", "aux_z"} <= set(
        line
    )
    assert line["loss"] == pytest.approx(line["contrastive"] + line["aux"])
    assert list((out / "tensorboard").iterdir())
    kept, asked = Run.model_validate_json((out / "run.json").read_text()), run_on(data, steps=8)
    # The run has its own copy of the vocabulary; all else is as asked.
    assert kept.data.tokenizer == str(out / "tokenizer.model")
    assert kept.model_copy(update={"data": asked.data}) == asked


def test_one_process_trains_as_two_ranks_do(ranks2: RanksPool, tmp_path: Path, data: Path) -> None:
    run = run_on(data)
    ranks2.run(on_ranks, run.model_dump_json(), str(tmp_path / "two"), False, 4)
    train(run, tmp_path / "one", mesh=Mesh.single(), device=CPU, resume=False, stop_after=4)
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        # The same groups, the same pictures, the same noise; sums in another order: 1e-5 in float32.
        assert one[1] == pytest.approx(two[1], abs=1e-5)
        assert one[2] == pytest.approx(two[2], rel=1e-5)


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
    assert read_end(out) is None
    monkeypatch.undo()
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=True) == Outcome(6, 0)


def test_what_was_copied_before_an_error_of_all_ranks_is_still_saved(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_on(data), tmp_path / "run"
    make_folder, after = disk.make_folder, threading.Event()

    def late(path: Path) -> None:
        # The save of step 2 has not begun to write when step 3 fails.
        after.wait(timeout=60)
        make_folder(path)

    def third_step_fails(result: StepResult, step: int, out: Path) -> None:
        if step == 2:
            after.set()
            raise UserError("step 3: the gradient is not finite", told_by=0)

    monkeypatch.setattr(disk, "make_folder", late)
    monkeypatch.setattr(loop, "_check_finite", third_step_fails)
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


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        warn("lost")
        outcome = train(run_on(data), tmp_path / "run", mesh=Mesh.single(), device=CPU, resume=False, stop_after=3)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert outcome == Outcome(3, 0)


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
    assert read_end(out) == Ended(step=6, signal=0)


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
    assert lines(out, "positions.jsonl")[1:] == [
        {"step": 2, "from_step": 1, "first": 16, "end": 42, "quarantined": [[20, 30]]},
        {"step": 3, "from_step": 2, "first": 42, "end": 58},
    ]
    state = read_state(latest_checkpoint(out))
    assert (state.position, state.quarantined) == (58, ((20, 30),))
    assert losses(out)[1][1] != pytest.approx(undisturbed_second_loss(run, tmp_path), abs=1e-3)


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


def a_signal_on_one_rank(text: str, out: str) -> Outcome:
    mesh = Mesh.build(tp=1, ep=2)
    run = Run.model_validate_json(text)
    if mesh.rank == 1:
        # It arrives while the first batch is on its way; rank 0 gets none.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
    return train(run, Path(out), mesh=mesh, device=CPU, resume=False)


def test_a_signal_to_one_rank_ends_all_after_the_same_step_with_a_checkpoint(
    ranks2: RanksPool, tmp_path: Path, data: Path
) -> None:
    out = tmp_path / "run"
    outcomes = ranks2.run(a_signal_on_one_rank, run_on(data, steps=5000).model_dump_json(), str(out))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].signal == signal.SIGTERM
    assert 0 < outcomes[0].step < 5000
    assert latest_checkpoint(out).name == f"step-{outcomes[0].step:08d}"


def test_a_directory_in_which_a_run_trains_is_refused(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    alone(run, out)
    with (
        begin(out, run, data.parent / "tokenizer.model"),
        pytest.raises(UserError, match="is being trained by process"),
    ):
        alone(run, out, resume=True)
    assert alone(run, out, resume=True) == Outcome(1, 0)


def test_without_locks_the_last_that_came_owns_the_directory(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run, out, began = run_on(data), tmp_path / "run", []
    open_saver = Restart.open_saver

    def another_comes(restart: Restart, claim: Claim, stop: StopFlag, tell: Callable[[str], None]) -> None:
        open_saver(restart, claim, stop, tell)
        began.append(begin(out, run, data.parent / "tokenizer.model"))

    monkeypatch.setattr(Restart, "open_saver", another_comes)
    with pytest.raises(UserError, match=r"is now being trained by process .*; this one ends, and what it has saved"):
        train(run, out, mesh=Mesh.single(), device=CPU, resume=False)
    assert not checkpoints(out)
    began[0].check()


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
    assert read_end(out) == Ended(step=2, signal=0)


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    train(run, out, mesh=Mesh.single(), device=CPU, resume=False, stop_after=4)
    (out / "evaluations.jsonl").write_text("")
    train(run, out, mesh=Mesh.single(), device=CPU, resume=True, stop_after=4)
    assert [line["step"] for line in lines(out, "evaluations.jsonl")] == [4]
    train(run, out, mesh=Mesh.single(), device=CPU, resume=True)
    assert [line["step"] for line in lines(out, "evaluations.jsonl")] == [4, 6]


def test_a_gradient_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path: Path, data: Path) -> None:
    run = run_on(data)
    broken = run.model_copy(update={"image": run.image.model_copy(update={"std": 1e-38})})
    with pytest.raises(UserError, match="step 1: the gradient is not finite"):
        train(broken, tmp_path / "run", mesh=Mesh.single(), device=CPU, resume=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


def alone(run: Run, out: Path, *, resume: bool = False) -> Outcome:
    return train(run, out, mesh=Mesh.single(), device=CPU, resume=resume, stop_after=1)


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    alone(run, out)
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}
    with pytest.raises(UserError, match="holds a run already: go on with `limoe train --resume"):
        alone(run, out)
    assert {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        alone(run, tmp_path / "other")


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


def test_a_shard_whose_checksum_is_wrong_is_named_before_a_run_begins(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", rows=64)
    write_shards(tmp_path / "validation", rows=24, shards=1)
    shard = tmp_path / "shards" / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run = run_on(manifest).model_copy(update={"data": Data(manifest=str(manifest))})
    with pytest.raises(UserError, match=r"shard-00001\.arrow: its checksum is not the one in the manifest"):
        alone(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_rows_without_concepts_are_measured_by_retrieval_alone(tmp_path: Path, data: Path) -> None:
    write_shards(tmp_path / "plain", rows=24, shards=1, concepts=False)
    run = run_on(data, steps=4)
    run = run.model_copy(
        update={"data": run.data.model_copy(update={"validation": str(tmp_path / "plain" / "manifest.json")})}
    )
    train(run, tmp_path / "run", mesh=Mesh.single(), device=CPU, resume=False)
    (line,) = lines(tmp_path / "run", "evaluations.jsonl")
    assert "zeroshot" not in line
    assert line["retrieval"]["rows"] == 24


def bad_data_on_ranks(text: str, out: str) -> str:
    try:
        on_ranks(text, out, False, None)
    except UserError as error:
        return str(error)
    return "trained"


def test_too_many_bad_rows_on_one_rank_end_all_ranks(ranks2: RanksPool, tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", rows=64, pictures=dict.fromkeys(range(0, 64, 2), b"no picture"))
    run = run_on(manifest, steps=400).model_copy(update={"data": Data(manifest=str(manifest))})
    told = sorted(ranks2.run(bad_data_on_ranks, run.model_dump_json(), str(tmp_path / "run")))
    assert any("rows read so far are bad, more than data.max_bad_frac=0.01" in text for text in told)
    assert "trained" not in told


def test_broken_pictures_and_empty_captions_are_replaced_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_shards(tmp_path / "shards", rows=64, pictures={3: b"no picture"}, captions={40: ["  "]})
    run = run_on(manifest, steps=4).model_copy(update={"data": Data(manifest=str(manifest), max_bad_frac=0.5)})
    assert train(run, tmp_path / "run", mesh=Mesh.single(), device=CPU, resume=False).step == 4
    printed = capsys.readouterr().out
    assert "row row-3 was replaced" in printed
    assert "row row-40 was replaced" in printed


def test_a_run_that_was_killed_before_its_settings_were_written_may_begin_again(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    out.mkdir()
    for name in ("lock", "tokenizer.tmp", ".run.json.123.tmp"):
        (out / name).write_text("cut")
    assert alone(run, out) == Outcome(1, 0)


def test_a_line_that_finds_the_disk_full_is_lost_with_a_warning_and_spoils_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(log=Log(tensorboard=False))
    log = metrics.Log(tmp_path, run, first_step=0, writes=True)
    log.metrics({"step": 1})
    # The second line reaches the disk in part: what a file system does that becomes full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len('{"step": 1}\n') + 4, resource.RLIM_INFINITY))
    try:
        log.metrics({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.metrics({"step": 3})
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
    assert "metrics.jsonl: the line of step 2 is lost: File too large" in capsys.readouterr().err
