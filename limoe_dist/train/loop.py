"""Training, from top to bottom: data, model, optimizer, restore, then step, log, save, evaluate, and the vote."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from limoe_dist.config.errors import UserError
from limoe_dist.config.exit_codes import GUARDED
from limoe_dist.config.schema import Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.ledger import Event
from limoe_dist.train.preemption import StopFlag
from limoe_dist.train.training import Training, due, opened


@dataclass(frozen=True)
class Outcome:
    step: int
    """Optimizer steps that are done and saved."""
    signal: int
    """The signal that ended the run early, or 0."""


@dataclass(frozen=True)
class _Halt:
    """Why the steps came to an end."""

    signal: int = 0
    event: Event | None = None
    """With a rollback or a stop."""


def train(
    run: Run,
    out: Path,
    *,
    mesh: Mesh,
    device: torch.device,
    resume: bool,
    stop_after: int | None = None,
    stop: StopFlag | None = None,
) -> Outcome:
    """Trains in `out` until train.steps, a signal, or the step `stop_after`, and ends with a checkpoint.

    stop: a flag that may be set already. Every rank calls it. Raises UserError, on all ranks, for what the user can
    mend, and with status GUARDED where the guard stops the run: what was saved is left alone, and the newest
    checkpoint stands.
    """
    end = min(run.train.steps, stop_after or run.train.steps)
    with (
        stop or StopFlag() as stop,
        opened(run, out, mesh=mesh, device=device, resume=resume, stop=stop) as training,
    ):
        # A garbage collection in the middle of a step makes all ranks wait for one: what lives until here is left out.
        gc.collect()
        gc.freeze()
        training.make_up_for_evaluation()
        while True:
            halt = _steps(training, end)
            if halt.event is None or halt.event.action != "rollback":
                break
            if (refused := training.go_back(halt.event, behind=_behind(training, halt.event))) is not None:
                halt = _Halt(event=refused)
                break
        training.heartbeat.phase("save")
        hurry = halt.signal != 0
        training.restart.finish(hurry=hurry)
        if halt.event is not None:
            training.note(halt.event)
            raise UserError(f"{halt.event.text}; {_advice(halt.event, out)}", told_by=0, status=GUARDED)
        training.note_end(signal=halt.signal)
        return Outcome(step=training.restart.step, signal=halt.signal)


def _steps(training: Training, end: int) -> _Halt:
    """Steps from where the run stands until `end` are done, a signal comes, or the guard wants an end of them."""
    run, restart, guard = training.run, training.restart, training.guard
    training.heartbeat.phase("train")
    for batch in training.batches(end):
        result = training.try_step(batch)
        assert result.verdict is not None
        judged = guard.read(result.verdict)
        restart.saver.advance(*judged.ballot.saving)
        event = guard.decide(judged, step=restart.step + 1)
        if judged.kept:
            training.count(result, batch)
        elif event is not None and event.action == "skip":
            training.leave_out(event)
        if event is not None and event.action == "note":
            training.note(event)

        step, signal = restart.step, judged.ballot.signal
        ends = signal != 0 or _ends_steps(event) or step == end
        if training.window.steps and (ends or (judged.kept and due(step, run.log.every_steps))):
            collapse = guard.look(training.log_figures(), step=step)
            if collapse is not None and collapse.action == "note":
                training.note(collapse)
            event = event if _ends_steps(event) else collapse
        halts = _ends_steps(event)
        # What is gone back from is not kept.
        goes_back = halts and event is not None and event.action == "rollback" and not signal
        wanted = ends or halts or judged.ballot.clock or due(step, run.checkpoint.every_steps)
        if step > restart.saved and wanted and not goes_back:
            training.save(hurry=signal != 0)
        if judged.kept and not signal and not halts and training.evaluation_due():
            training.evaluate()
        training.window.restart_clock()
        training.heartbeat.phase("train")
        if signal:
            return _Halt(signal=signal)
        if halts:
            return _Halt(event=event)
    return _Halt()


def _ends_steps(event: Event | None) -> bool:
    return event is not None and event.action in ("rollback", "stop")


def _behind(training: Training, event: Event) -> int:
    """The step, from 0, before whose data a rollback is: a batch that was left out counts, though its step is not."""
    return training.restart.step + (event.kind != "collapse")


def _advice(event: Event, out: Path) -> str:
    what = {
        "non_finite": "Try a smaller optim.lr or a longer optim.warmup_steps in a new run",
        "spike": "Look at the data of these positions, or go on with --guard.spike rollback",
        "collapse": "Try larger weights of the entropy losses (moe.global_text, moe.local_text) in a new run",
    }[event.kind]
    return f"all events are in {out / 'guard.jsonl'}, and the newest checkpoint stands. {what}"
