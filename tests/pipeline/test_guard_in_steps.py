"""The guard in training steps and real runs: the loss it sees, what a skip leaves alone, what a resumed run judges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from limoe_dist.checkpoint.catalog import latest_checkpoint
from limoe_dist.checkpoint.state import Watched, read_state
from limoe_dist.config.schema import Checkpoint, Data, Guard, Log, Run
from limoe_dist.data.loader import Batch
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import guard as guard_module
from limoe_dist.train import ledger
from limoe_dist.train.loop import train
from limoe_dist.train.step import Examples, StepResult, training_step
from limoe_dist.train.training import Training
from tests.pipeline.plain_guard import z_score
from tests.support.cases import BATCH, batch, slice_of, small_run
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards
from tests.train.small import CPU, lines

CONTRASTIVE = math.log(BATCH)
"""Contrastive loss of pairs that are all alike: every logit is the same, in both directions."""
AUXILIARY = 2 * 0.04 * (math.log(8) ** 2 + 2 * math.log(8)) / 6
"""Auxiliary loss of 2 routers of zeros: z is (log 8)^2, both local entropies are log 8, importance and global are 0."""


def known_run(*, microbatch_pairs: int = 0) -> Run:
    small = small_run("fp64", pad="token")
    return small.model_copy(
        update={
            "moe": small.moe.model_copy(update={"noise_std": 0.0, "load": 0.0, "capacity_factor": 8.0}),
            "train": small.train.model_copy(update={"microbatch_pairs": microbatch_pairs}),
        }
    )


def judged_known_step(microbatch_pairs: int) -> dict[str, Any]:
    """What the guard finds in a step whose loss is known, after 8 losses of 3."""
    mesh = Mesh.build(tp=1, ep=1) if dist.is_initialized() else Mesh.single()
    run = known_run(microbatch_pairs=microbatch_pairs)
    model = build_model(run, mesh=mesh, device=CPU)
    with torch.no_grad():
        for block in run.moe.blocks:
            model.blocks[block].moe.router.zero_()
    engine = make_engine(model, run, mesh)
    guard = guard_module.Guard(Guard(spike="skip", spike_window=8, spike_z=1e9), CPU)
    guard.remember(Watched(losses=(3.0,) * 8, bad_lines=0))
    images, tokens, valid = (column[:1].repeat_interleave(BATCH, 0) for column in batch(0, torch.float64))
    examples = Examples(*slice_of((images, tokens, valid), mesh))
    result = training_step(model, engine, examples, step=0, run=run, mesh=mesh, guard=guard)
    assert result.verdict is not None
    judged = guard.read(result.verdict)
    return {
        "loss": judged.loss,
        "z": judged.z,
        "norm": judged.grad_norm,
        "shares": (result.losses.contrastive.item(), result.losses.aux.item()),
        "watched": guard.watched().losses,
    }


def check_known(found: dict[str, Any], *, share: float) -> None:
    whole = CONTRASTIVE + AUXILIARY
    assert found["loss"] == pytest.approx(whole, rel=1e-9)
    assert found["z"] == pytest.approx((whole - 3) / 0.003, rel=1e-9)
    assert found["watched"] == pytest.approx([3.0] * 7 + [whole], rel=1e-9)
    assert found["shares"] == pytest.approx((CONTRASTIVE * share, AUXILIARY * share), rel=1e-9)


@pytest.mark.parametrize("microbatch_pairs", [0, 4])
def test_the_guard_sees_the_contrastive_and_the_auxiliary_loss(microbatch_pairs: int) -> None:
    check_known(judged_known_step(microbatch_pairs), share=1.0)


@pytest.mark.parametrize("microbatch_pairs", [0, 4])
def test_the_guard_sees_the_losses_of_all_ranks(ranks2: RanksPool, microbatch_pairs: int) -> None:
    one, two = judged_known_step(microbatch_pairs), ranks2.run(judged_known_step, microbatch_pairs)
    for found in two:
        check_known(found, share=0.5)
        assert found["norm"] == pytest.approx(one["norm"], rel=1e-9)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), rows=64)


def real_run(data: Path, guard: Guard, *, steps: int = 16, **optim: Any) -> Run:
    run = small_run("fp64", steps=steps)
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"depth": 2, "width": 16, "mlp_dim": 16}),
            "moe": run.moe.model_copy(update={"blocks": (1,)}),
            "data": Data(manifest=str(data)),
            "optim": run.optim.model_copy(update={"warmup_steps": 3, "timescale": 4, "cooldown_steps": 2} | optim),
            "checkpoint": Checkpoint(every_steps=50, keep=5),
            "guard": guard,
            "log": Log(every_steps=1, tensorboard=False),
        }
    )


def go(run: Run, out: Path, *, until: int | None = None, resume: bool = False) -> None:
    train(run, out, mesh=Mesh.single(), device=CPU, resume=resume, stop_after=until)


def test_a_resumed_run_judges_every_loss_as_a_run_that_never_stopped(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[float, float]] = []
    read = guard_module.Guard.read

    def read_and_note(guard: guard_module.Guard, verdict: guard_module.Verdict) -> guard_module.Judged:
        found = read(guard, verdict)
        judged.append((found.loss, found.z))
        return found

    monkeypatch.setattr(guard_module.Guard, "read", read_and_note)
    run, out = real_run(data, Guard(spike="off", spike_window=8), lr=3e-2), tmp_path / "run"
    # Stops before the window is full, and after it has gone round to a middle place.
    for until in (5, 11, 13, 16):
        go(run, out, until=until, resume=until > 5)
        losses = [loss for loss, _ in judged]
        assert len(losses) == until
        assert read_state(latest_checkpoint(out)).watched.losses == tuple(losses[-8:])
    for step, (loss, z) in enumerate(judged):
        if step < 8:
            assert math.isnan(z)
        else:
            assert z == pytest.approx(z_score(loss, losses[step - 8 : step]), rel=1e-12), step
    # What the log shows is the loss that was judged.
    assert [line["loss"] for line in lines(out)] == pytest.approx(losses, rel=1e-6)


def test_bad_lines_are_counted_on_by_a_resumed_run(tmp_path: Path, data: Path) -> None:
    # No modality ever gets all of its slots here.
    run = real_run(data, Guard(min_success=1.0, max_dead_frac=1.0, collapse_lines=3))
    out, found = tmp_path / "run", []
    for until in (2, 3, 4, 7):
        go(run, out, until=until, resume=until > 2)
        found.append((read_state(latest_checkpoint(out)).watched.bad_lines, [e["step"] for e in ledger.read(out)]))
    assert found == [(2, []), (3, [3]), (4, [3]), (7, [3])]


def with_bad_batches(positions: set[int]) -> Any:
    """try_step, but that batches which begin at these positions hold a NaN."""
    honest = Training.try_step

    def try_step(training: Training, batch: Batch) -> StepResult:
        if training.restart.position in positions:
            batch.images[0, 0, 0, 0] = torch.nan
        return honest(training, batch)

    return try_step


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_skip_moves_neither_schedule_nor_bias_correction(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    run = real_run(data, Guard(), steps=6, lr=1e-2, name=optimizer)
    skipped, never = tmp_path / "skipped", tmp_path / "never"
    # The batches of steps 2 and 5, by positions: 16 is skipped, 5 reads from 80 on.
    monkeypatch.setattr(Training, "try_step", with_bad_batches({16, 80}))
    go(run, skipped)
    monkeypatch.undo()
    # A run that passes over the same data and never met a bad batch.
    go(run, never, until=1)
    for first in (16, 80):
        ledger.append(never, ledger.Event("spike", "skip", 1, "planted").passing(first, first + 16))
    go(run, never, resume=True)
    found, wanted = lines(skipped), lines(never)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in found] == [line[name] for line in wanted], name
    # (t + 1) / 4, then 1 / sqrt(1 + (t - 3) / 4), times 2 / 2 and 1 / 2.
    rates = [0.25, 0.5, 0.75, 1.0, 1 / math.sqrt(1.25), 1 / math.sqrt(1.5) / 2]
    assert [line["lr"] for line in found] == pytest.approx([1e-2 * rate for rate in rates], rel=1e-6)
    assert [(event["step"], event["first"], event["end"]) for event in ledger.read(skipped)] == [
        (2, 16, 32),
        (5, 80, 96),
    ]
    for out in (skipped, never):
        state = read_state(latest_checkpoint(out))
        assert (state.step, state.position, state.quarantined) == (6, 128, ((16, 32), (80, 96)))
