"""Bad batches in a real run: left out, gone back from, or the end, the same on 1 and on 4 ranks, and on record."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from data_prep.inspection.audit import audit
from limoe_dist.checkpoint import disk
from limoe_dist.checkpoint.catalog import latest_checkpoint
from limoe_dist.checkpoint.state import read_state
from limoe_dist.config.errors import UserError
from limoe_dist.config.exit_codes import GO_ON, GUARDED
from limoe_dist.config.schema import Checkpoint, Data, Guard, Log, Parallel, Run
from limoe_dist.data.loader import Batch
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import ledger
from limoe_dist.train.folder import read_end
from limoe_dist.train.ledger import Event
from limoe_dist.train.loop import train
from limoe_dist.train.step import StepResult
from limoe_dist.train.training import Training
from tests.support.cases import BATCH, small_run
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards
from tests.train.small import CPU, lines

Harm = Literal["nan", "leap"]
STEPS = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 12 batches an epoch: the second epoch has other neighbours.
    return write_shards(tmp_path_factory.mktemp("shards"), rows=192)


def run_of(data: Path, guard: Guard, *, ranks: int) -> Run:
    run = small_run("fp64", steps=STEPS)
    return run.model_copy(
        update={
            "data": Data(manifest=str(data)),
            "optim": run.optim.model_copy(update={"lr": 1e-2, "cooldown_steps": 2}),
            "parallel": Parallel(ep=2 if ranks > 1 else 1),
            "checkpoint": Checkpoint(every_steps=5, keep=5),
            "guard": guard,
            "log": Log(every_steps=1, tensorboard=False),
        }
    )


def harmed(positions: set[int], harm: Harm) -> Any:
    """try_step, but that the batches which begin at these positions of the data are bad ones."""
    honest = Training.try_step

    def try_step(training: Training, batch: Batch) -> StepResult:
        if training.restart.position not in positions:
            return honest(training, batch)
        if harm == "leap":
            # A far too sharp temperature, until the weights are gathered from their masters again.
            with torch.no_grad():
                training.model.log_scale += 4.6
        elif training.mesh.rank == 0:
            batch.images[0, 0, 0, 0] = torch.nan
        return honest(training, batch)

    return try_step


def on_ranks(text: str, out: str, positions: list[int], harm: Harm, resume: bool, until: int | None) -> Any:
    return go(Run.model_validate_json(text), Path(out), Mesh.build(tp=1, ep=2), positions, harm, resume, until)


def go(run: Run, out: Path, mesh: Mesh, positions: list[int], harm: Harm, resume: bool, until: int | None) -> Any:
    """The step at the end, or what ended it."""
    honest, Training.try_step = Training.try_step, harmed({*positions}, harm)  # type: ignore[method-assign]
    try:
        return train(run, out, mesh=mesh, device=CPU, resume=resume, stop_after=until).step
    except UserError as error:
        return error.status, str(error)
    finally:
        Training.try_step = honest  # type: ignore[method-assign]


@dataclass(frozen=True)
class Both:
    """The same run on one rank and on four."""

    ranks4: RanksPool
    data: Path
    one: Path
    four: Path

    def go(
        self, guard: Guard, positions: list[int], harm: Harm, *, resume: bool = False, until: int | None = None
    ) -> Any:
        """What all five gave."""
        alone = go(run_of(self.data, guard, ranks=1), self.one, Mesh.single(), positions, harm, resume, until)
        text = run_of(self.data, guard, ranks=4).model_dump_json()
        found = self.ranks4.run(on_ranks, text, str(self.four), positions, harm, resume, until)
        assert [str(each).replace("/four", "/one") for each in found] == [str(alone)] * 4
        return alone

    def events(self) -> list[dict[str, Any]]:
        """The ledger: the same but for the time and the last digits."""
        one, four = ledger.read(self.one), ledger.read(self.four)
        for a, b in zip(one, four, strict=True):
            numbers = {"loss", "grad_norm", "z"} & {*a}
            assert {name: a[name] for name in numbers} == pytest.approx({name: b[name] for name in numbers}, rel=1e-6)
            rest = {*a} - numbers - {"time"}
            assert {name: a[name] for name in rest} == {name: b[name] for name in rest}
        return one

    def losses(self) -> dict[int, float]:
        one, four = ({line["step"]: line["loss"] for line in lines(out)} for out in (self.one, self.four))
        assert one == pytest.approx(four, rel=1e-9)
        return one

    def account(self) -> None:
        """Every row that was used was read at its position, and no other was."""
        for out in (self.one, self.four):
            assert audit(out).faults == []


@pytest.fixture
def both(ranks4: RanksPool, tmp_path: Path, data: Path) -> Both:
    return Both(ranks4, data, tmp_path / "one", tmp_path / "four")


def passing_over(data: Path, folder: Path, guard: Guard, *spans: tuple[int, int]) -> dict[int, float]:
    """The losses of a run that no batch harms, and that passes over these positions behind its first checkpoint."""
    run, out = run_of(data, guard, ranks=1), folder / "told"
    go(run, out, Mesh.single(), [], "nan", False, 5)
    for first, end in spans:
        ledger.append(out, Event("spike", "skip", 1, "told").passing(first, end))
    assert go(run, out, Mesh.single(), [], "nan", True, None) == STEPS
    return {line["step"]: line["loss"] for line in lines(out)}


def test_a_batch_that_is_not_finite_is_left_out_and_the_run_goes_on_as_if_it_had_not_been(
    both: Both, tmp_path: Path
) -> None:
    # The batch of step 8, and the one that stands in for it.
    bad = [7 * BATCH, 8 * BATCH]
    assert both.go(Guard(), bad, "nan") == STEPS
    events = both.events()
    assert [(event["kind"], event["action"], event["step"]) for event in events] == [("non_finite", "skip", 8)] * 2
    assert [(event["first"], event["end"]) for event in events] == [(112, 128), (128, 144)]
    assert sorted(both.losses()) == list(range(1, STEPS + 1))
    assert both.losses() == passing_over(both.data, tmp_path, Guard(), (112, 144))
    assert read_state(latest_checkpoint(both.one)).quarantined == ((112, 144),)
    both.account()


def test_a_leap_takes_the_run_back_to_its_checkpoint_and_past_the_data(both: Both, tmp_path: Path) -> None:
    guard = Guard(spike="rollback", spike_window=8, rollback_batches=2, spike_z=20.0)
    # Found at step 13: back to step 10, and past the batches of steps 12 and 13.
    assert both.go(guard, [12 * BATCH], "leap") == STEPS
    (event,) = both.events()
    assert (event["kind"], event["action"], event["step"], event["to_step"]) == ("spike", "rollback", 13, 10)
    assert (event["first"], event["end"]) == (11 * BATCH, 13 * BATCH)
    losses = both.losses()
    assert losses == passing_over(both.data, tmp_path, guard, (11 * BATCH, 13 * BATCH))
    state = read_state(latest_checkpoint(both.four))
    assert state.quarantined == ((11 * BATCH, 13 * BATCH),)
    # The guard compares with the last 8 losses that count: those of the undone steps are forgotten.
    assert state.watched.losses == pytest.approx([losses[step] for step in range(STEPS - 7, STEPS + 1)])
    both.account()


def test_what_was_passed_over_is_passed_over_again_by_a_run_that_was_killed(both: Both) -> None:
    guard = Guard(spike="rollback", spike_window=8, rollback_batches=2, spike_z=20.0)
    assert both.go(guard, [12 * BATCH], "leap", until=13) == 13
    for out in (both.one, both.four):
        # As a kill before the next save would have left it: back at the checkpoint before the leap.
        shutil.rmtree(latest_checkpoint(out))
        assert latest_checkpoint(out).name == "step-00000010"
        assert read_state(latest_checkpoint(out)).quarantined == ()
    before = both.losses()
    assert both.go(guard, [12 * BATCH], "leap", resume=True) == STEPS
    assert len(both.events()) == 1
    after = both.losses()
    assert {step: after[step] for step in range(1, 14)} == before
    both.account()


def test_a_stop_saves_what_there_is_and_says_why(both: Both) -> None:
    status, text = both.go(Guard(non_finite="stop"), [7 * BATCH], "nan")
    assert status == GUARDED
    assert "step 8: the loss is not finite; all events are in" in text
    for out in (both.one, both.four):
        ended = read_end(out)
        assert ended is not None
        assert (ended.step, ended.status, latest_checkpoint(out).name) == (7, GUARDED, "step-00000007")
    # The data have been mended.
    assert both.go(Guard(non_finite="stop"), [], "nan", resume=True) == STEPS
    both.account()


def test_going_back_again_and_again_ends_the_run(both: Both) -> None:
    guard = Guard(spike="rollback", spike_window=8, rollback_batches=1, spike_z=20.0, max_rollbacks=2)
    # Whatever comes at step 12 leaps.
    status, text = both.go(guard, [(11 + more) * BATCH for more in range(5)], "leap")
    assert status == GUARDED
    assert "went back to step 10 guard.max_rollbacks=2 times already" in text
    assert [event["action"] for event in both.events()] == ["rollback", "rollback", "stop"]


def test_without_a_checkpoint_to_go_back_to_the_batch_is_left_out(both: Both) -> None:
    assert both.go(Guard(non_finite="rollback"), [2 * BATCH], "nan", until=4) == 4
    (event,) = both.events()
    assert (event["action"], event["first"], event["end"]) == ("skip", 2 * BATCH, 3 * BATCH)
    both.account()


def test_a_leap_that_is_noted_is_trained_on(both: Both) -> None:
    assert both.go(Guard(spike_window=8, spike_z=20.0), [12 * BATCH], "leap") == STEPS
    (event,) = both.events()
    assert (event["kind"], event["action"], event["step"]) == ("spike", "note", 13)
    assert "first" not in event
    assert both.losses()[13] > 5 * both.losses()[12]
    both.account()


def signalled(steps: set[int], number: int) -> Any:
    """try_step, but that this process has received a signal before the steps of these numbers, from 0."""
    honest = Training.try_step

    def try_step(training: Training, batch: Batch) -> StepResult:
        if training.restart.step in steps and training.mesh.rank == training.mesh.world.size - 1:
            signal.raise_signal(number)
        return honest(training, batch)

    return try_step


def stopped_in(text: str, out: str, step: int, positions: list[int], harm: Harm) -> Any:
    """On a rank: `go`, with SIGUSR2 to the last rank in that step."""
    mesh = Mesh.build(tp=1, ep=2) if dist.is_initialized() else Mesh.single()
    honest, Training.try_step = Training.try_step, signalled({step}, signal.SIGUSR2)  # type: ignore[method-assign]
    try:
        return go(Run.model_validate_json(text), Path(out), mesh, positions, harm, out.endswith("again"), None)
    finally:
        Training.try_step = honest  # type: ignore[method-assign]


def test_a_signal_in_the_step_of_a_leap_does_not_save_what_is_gone_back_from(both: Both) -> None:
    guard = Guard(spike="rollback", spike_window=8, rollback_batches=2, spike_z=20.0)
    text = run_of(both.data, guard, ranks=4).model_dump_json()
    both.ranks4.run(stopped_in, text, str(both.four), 12, [12 * BATCH], "leap")
    stopped_in(run_of(both.data, guard, ranks=1).model_dump_json(), str(both.one), 12, [12 * BATCH], "leap")
    for out in (both.one, both.four):
        ended = read_end(out)
        assert ended is not None
        assert (ended.status, ended.step, latest_checkpoint(out).name) == (GO_ON, 10, "step-00000010")
    (event,) = both.events()
    assert (event["action"], event["first"], event["end"]) == ("rollback", 11 * BATCH, 13 * BATCH)
    assert both.go(guard, [], "leap", resume=True) == STEPS
    both.account()


def test_a_stop_of_the_guard_weighs_more_than_a_signal(both: Both) -> None:
    text = run_of(both.data, Guard(non_finite="stop"), ranks=1).model_dump_json()
    status, told = stopped_in(text, str(both.one), 7, [7 * BATCH], "nan")
    assert (status, "the loss is not finite" in told) == (GUARDED, True)
    (event,) = ledger.read(both.one)
    assert event["action"] == "stop"


def test_a_save_between_two_batches_that_are_left_out_loses_none_of_them(both: Both) -> None:
    # Stopped in the step of the first: its checkpoint knows one of the two neighbours.
    text = run_of(both.data, Guard(), ranks=1).model_dump_json()
    stopped_in(text, str(both.one), 7, [7 * BATCH, 8 * BATCH], "nan")
    assert read_state(latest_checkpoint(both.one)).quarantined == ((7 * BATCH, 8 * BATCH),)
    assert go(run_of(both.data, Guard(), ranks=1), both.one, Mesh.single(), [8 * BATCH], "nan", True, None) == STEPS
    assert read_state(latest_checkpoint(both.one)).quarantined == ((7 * BATCH, 9 * BATCH),)
    assert audit(both.one).faults == []


def test_batches_without_a_checkpoint_behind_them_are_counted_too(both: Both) -> None:
    guard = Guard(non_finite="rollback", max_skips=3)
    status, text = both.go(guard, [number * BATCH for number in range(40)], "nan")
    assert status == GUARDED
    assert "guard.max_skips=3 batches in a row were of no use" in text
    assert [event["action"] for event in both.events()] == ["skip", "skip", "stop"]


def test_a_run_that_begins_again_passes_over_what_its_ledger_tells(both: Both) -> None:
    assert go(run_of(both.data, Guard(), ranks=1), both.one, Mesh.single(), [2 * BATCH], "nan", False, 4) == 4
    shutil.rmtree(both.one / "checkpoints")
    (both.one / "positions.jsonl").unlink()
    assert go(run_of(both.data, Guard(), ranks=1), both.one, Mesh.single(), [], "nan", True, None) == STEPS
    assert read_state(latest_checkpoint(both.one)).quarantined == ((2 * BATCH, 3 * BATCH),)
    assert audit(both.one).faults == []


def test_a_collapse_that_goes_back_comes_again_until_it_ends_the_run(both: Both) -> None:
    # No modality ever gets all of its slots here: every line tells of a collapse.
    guard = Guard(collapse="rollback", min_success=1.0, collapse_lines=2, rollback_batches=1, max_rollbacks=2)
    status, text = both.go(guard, [], "nan")
    assert status == GUARDED
    assert "guard.max_rollbacks=2 times already" in text
    actions = [event["action"] for event in both.events()]
    # At steps 2 and 4 there is no checkpoint yet; then the run goes back to that of step 5.
    assert actions == ["note", "note", "rollback", "rollback", "stop"]


def test_a_last_save_that_fails_does_not_hide_why_the_guard_stopped(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "write", fails)
    run = run_of(both.data, Guard(non_finite="stop"), ranks=1)
    status, text = go(run, both.one, Mesh.single(), [7 * BATCH], "nan", False, None)
    assert status == GUARDED
    assert "No space left on device" in text
    assert [event["action"] for event in ledger.read(both.one)] == ["stop"]
