"""Training in a directory: the same on any ranks, ended by a signal, and faults leave what is there alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from limoe_dist.checkpoint.catalog import checkpoints, latest_checkpoint
from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.exit_codes import GUARDED
from limoe_dist.config.parse import load_run
from limoe_dist.config.schema import Checkpoint, Data, Eval, Guard, Log, Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import ledger, loop, metrics
from limoe_dist.train.folder import Claim, Ended, begin, read_end
from limoe_dist.train.loop import Outcome, train
from limoe_dist.train.preemption import StopFlag
from limoe_dist.train.restart import Restart
from limoe_dist.train.training import Training
from tests.ranks.test_guard import harmed
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards
from tests.train.small import CPU, alone, lines, losses, on_ranks, run_on


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
    kept, asked = load_run(out / "run.json"), run_on(data, steps=8)
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


def test_a_batch_that_is_left_out_brings_no_second_evaluation_of_its_step(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_on(data)
    # The batch behind step 4, after which the run is evaluated.
    monkeypatch.setattr(Training, "try_step", harmed({4 * run.train.batch_pairs}, "nan"))
    train(run, tmp_path, mesh=Mesh.single(), device=CPU, resume=False)
    assert [event["step"] for event in ledger.read(tmp_path)] == [5]
    assert [line["step"] for line in lines(tmp_path, "evaluations.jsonl")] == [4, 6]


@pytest.mark.parametrize(("kind", "behind"), [("spike", 8), ("non_finite", 8), ("collapse", 7)])
def test_a_rollback_passes_over_the_batch_of_its_event_and_none_that_was_not_read(kind: str, behind: int) -> None:
    # After 7 steps a leap is of the batch of the eighth, and a collapse is seen at the line about the seventh.
    training: Any = SimpleNamespace(restart=SimpleNamespace(step=7))
    event: Any = SimpleNamespace(kind=kind)
    assert loop._behind(training, event) == behind


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
    broken = run.model_copy(
        update={"image": run.image.model_copy(update={"std": 1e-38}), "guard": Guard(non_finite="stop")}
    )
    with pytest.raises(UserError, match="step 1: the loss is not finite") as stopped:
        train(broken, tmp_path / "run", mesh=Mesh.single(), device=CPU, resume=False)
    assert stopped.value.status == GUARDED
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert read_end(tmp_path / "run") == Ended(0, 0, GUARDED, str(stopped.value))


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
    assert "metrics.jsonl: the line of step 2 cannot be written: File too large" in capsys.readouterr().err


def test_a_line_of_the_ledger_that_finds_the_disk_full_is_written_with_the_next(tmp_path: Path) -> None:
    log = metrics.Log(tmp_path, Run(log=Log(tensorboard=False)), first_step=0, writes=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, resource.RLIM_INFINITY))
    try:
        log.positions({"step": 1})
        log.positions({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.positions({"step": 3})
    log.positions({"step": 4})
    assert [line["step"] for line in lines(tmp_path, "positions.jsonl")] == [1, 2, 3, 4]


def test_a_log_that_cannot_be_opened_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = metrics.Log(tmp_path, Run(log=Log(tensorboard=False)), first_step=0, writes=True)
    log.positions({"step": 1})

    def none_left(*given: object, **named: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "open", none_left)
    log.positions({"step": 2})
    monkeypatch.undo()
    assert [line["step"] for line in lines(tmp_path, "positions.jsonl")] == [1]
    log.positions({"step": 3})
    assert [line["step"] for line in lines(tmp_path, "positions.jsonl")] == [1, 2, 3]


def test_a_signal_breaks_off_an_evaluation_which_a_resumed_run_makes(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = run_on(data, steps=8), tmp_path / "run"
    # Twelve passes of 2 of the 24 pictures, and as many of texts.
    run = run.model_copy(
        update={"eval": Eval(every_steps=4, batch_pairs=2), "checkpoint": Checkpoint(every_steps=3), "guard": Guard()}
    )
    between = Training._between_passes

    def told_to_stop(training: Training) -> None:
        signal.raise_signal(signal.SIGUSR2)
        between(training)

    monkeypatch.setattr(Training, "_between_passes", told_to_stop)
    outcome = train(run, out, mesh=Mesh.single(), device=CPU, resume=False)
    # The step was not to be saved, but for the signal.
    assert outcome == Outcome(4, signal.SIGUSR2)
    assert latest_checkpoint(out).name == "step-00000004"
    assert not (out / "evaluations.jsonl").exists()
    monkeypatch.undo()
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=True) == Outcome(8, 0)
    assert [line["step"] for line in lines(out, "evaluations.jsonl")] == [4, 8]


def test_a_start_that_fails_in_its_directory_says_how_it_ended(tmp_path: Path, data: Path) -> None:
    run, out = run_on(data), tmp_path / "run"
    train(run, out, mesh=Mesh.single(), device=CPU, resume=False, stop_after=4)
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        train(run, out, mesh=Mesh.single(), device=CPU, resume=True)
    ended = read_end(out)
    assert ended is not None
    assert (ended.status, ended.step) == (2, 4)
    # Nobody holds the directory any more.
    (out / "metrics.jsonl").rmdir()
    assert train(run, out, mesh=Mesh.single(), device=CPU, resume=True) == Outcome(6, 0)
