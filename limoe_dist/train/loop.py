"""Training, from top to bottom: data, model, optimizer, restore, then step, log, save, evaluate, and the vote."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

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
        halt = _Halt(signal=training.make_up_for_evaluation())
        while not halt.signal:
            halt = _steps(training, end)
            if halt.event is None or halt.event.action != "rollback":
                break
            refused = training.go_back(halt.event, behind=_behind(training, halt.event))
            halt = _Halt(halt.signal, refused)
            if refused is not None:
                break
        training.heartbeat.phase("save")
        if halt.event is not None:
            _stop(training, halt.event)
        training.restart.finish(hurry=halt.signal != 0)
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
            figures = training.log_figures()
            event = event if _ends_steps(event) else training.look(figures)
        halts = _ends_steps(event)
        wanted = ends or halts or judged.ballot.clock or due(step, run.checkpoint.every_steps)
        # What is gone back from is not kept.
        goes_back = event is not None and event.action == "rollback"
        if step > restart.saved and wanted and not goes_back:
            training.save(hurry=signal != 0)
        if judged.kept and not signal and not halts and training.evaluation_due():
            signal = training.evaluate()
            if signal and step > restart.saved:
                training.save(hurry=True)
        training.window.restart_clock()
        training.heartbeat.phase("train")
        if signal or halts:
            return _Halt(signal, event if halts else None)
    return _Halt()


def _stop(training: Training, event: Event) -> NoReturn:
    """The end of a run that its guard stops: on record first, whatever becomes of the last save."""
    training.note(event)
    text = f"{event.text}; {_advice(event, training.out)}"
    try:
        training.restart.finish(hurry=False)
    except UserError as error:
        text += f"; and {error}"
    raise UserError(text, told_by=0, status=GUARDED)


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
