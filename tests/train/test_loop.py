"""Training in a directory: resumed it is the run that never stopped, bit for bit; faults leave what is there alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from limoe_dist.checkpoint.storage import latest_checkpoint
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Checkpoint, Data, Eval, Log, Parallel, Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.folder import Ended, begin, read_end
from limoe_dist.train.loop import Outcome, train
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
