"""All that a start of a run holds, from its data to its log: opened by all ranks together, and closed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from limoe_dist.checkpoint import catalog
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.loader import Batch, Loader
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel import apex
from limoe_dist.parallel.collectives import all_or_none, vote
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import ledger
from limoe_dist.train.display import Display, say_anywhere
from limoe_dist.train.evaluation import evaluate
from limoe_dist.train.folder import Claim, Ended, begin, forget_replaced, new_run_problem, note_end, replaced_file
from limoe_dist.train.guard import Guard
from limoe_dist.train.heartbeat import Heartbeat
from limoe_dist.train.inputs import Inputs, open_inputs
from limoe_dist.train.ledger import Event
from limoe_dist.train.metrics import Log, Window
from limoe_dist.train.preemption import StopFlag, status_after
from limoe_dist.train.restart import Restart
from limoe_dist.train.step import Examples, StepResult, training_step
from limoe_dist.train.votes import Ballot

LISTEN_EVERY = 8
"""Forward passes of an evaluation between two votes on whether to stop."""


class _Stopped(Exception):
    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class Training:
    """One start of a run, on one rank. Its methods are collectives, but for those that say or note something."""

    def __init__(
        self, run: Run, out: Path, inputs: Inputs, *, mesh: Mesh, device: torch.device, resume: bool, stop: StopFlag
    ) -> None:
        """Builds the model, and fills it from the newest checkpoint, from train.init_from, or from the seed."""
        self.run, self.out, self.inputs, self.mesh, self.device, self.stop = run, out, inputs, mesh, device, stop
        with all_or_none(mesh.world, device):
            if mesh.rank == 0 and not resume and (problem := new_run_problem(out)):
                raise UserError(problem)
            apex.check(run.parallel.kernels, device)
        self.model = build_model(run, mesh=mesh, device=device)
        self.engine = make_engine(self.model, run, mesh)
        self.restart = Restart(run, out, self.engine, inputs, mesh, device)
        self.first_step = self.restart.restore() if resume else 0
        taken = None if self.first_step else self.restart.initialise()
        self.guard = Guard(run.guard, device)
        self.claim: Claim | None = None
        with all_or_none(mesh.world, device):
            if mesh.rank == 0:
                self.claim = begin(out, run, inputs.tokenizer.path)
        try:
            self._take_up(resume, taken.text(inputs.tokenizer_hash) if taken else "")
        except UserError as error:
            self.note_end(status=error.status, reason=str(error))
            if self.claim is not None:
                self.claim.close()
            raise

    def _take_up(self, resume: bool, taken: str) -> None:
        """The directory is ours: opens what is written there."""
        run, mesh = self.run, self.mesh
        with all_or_none(mesh.world, self.device):
            if mesh.rank == 0:
                self.restart.check_nothing_new()
                if not self.first_step:
                    forget_replaced(self.out)
        self.display = Display(steps=run.train.steps, first_step=self.first_step, shows=mesh.rank == 0)
        self.log = self._opened_log()
        self.window = Window(run, mesh, self.device)
        self.heartbeat = Heartbeat(
            self.out,
            mesh=mesh,
            device=self.device,
            step=self.first_step,
            steps=run.train.steps,
            straggler_factor=run.log.straggler_factor,
        )
        self._tell_start(resume, taken)
        self.restart.open_saver(self.claim, self.stop, self.display.say)

    def _tell_start(self, resume: bool, taken: str) -> None:
        if resume and not self.first_step:
            self.display.say("no checkpoint yet: beginning at step 0")
        elif resume:
            self.display.say(f"going on from step {self.first_step}")
        for line in filter(None, [*self.inputs.told, self.restart.batch_note(), taken]):
            self.display.say(line)

    def _opened_log(self) -> Log:
        """The log as it was at the step of the checkpoint; the guard's memory too."""
        restart = self.restart
        with all_or_none(self.mesh.world, self.device):
            log = Log(self.out, self.run, first_step=restart.step, writes=self.mesh.rank == 0)
            if (missed := restart.missed(log.newest_positions())) is not None:
                log.positions(missed)
        self.guard.remember(restart.watched)
        return log

    def batches(self, end: int) -> Iterator[Batch]:
        """Those of the steps until `end` are done; where one rank's data fails, all ranks raise UserError.

        A batch that is left out is followed by another for the same step.
        """
        restart = self.restart
        while restart.step < end:
            with Loader(
                self.run,
                self.inputs.train,
                self.inputs.tokenizer,
                rank=self.mesh.rank,
                world=self.mesh.world.size,
                first_step=restart.step,
                first_pair=restart.pairs,
                device=self.device,
                quarantined=restart.quarantined,
                replaced=replaced_file(self.out, self.mesh.rank),
            ) as loader:
                while restart.step < end:
                    with all_or_none(self.mesh.world, self.device):
                        batch = next(loader, None)
                    if batch is None:
                        break
                    for bad in batch.replaced:
                        say_anywhere(f"rank {self.mesh.rank}: row {bad.key} was replaced: {bad.reason}")
                    yield batch

    def try_step(self, batch: Batch) -> StepResult:
        """The step after those that are done, on this batch, with this rank's word in the vote."""
        restart = self.restart
        ballot = Ballot(
            non_finite=False,
            signal=self.stop.received,
            clock=restart.due_by_the_clock(),
            saving=restart.saver.flags(),
        )
        examples = Examples(batch.images, batch.tokens, batch.valid)
        return training_step(
            self.model,
            self.engine,
            examples,
            step=restart.step,
            run=self.run,
            mesh=self.mesh,
            guard=self.guard,
            ballot=ballot,
        )

    def count(self, result: StepResult, batch: Batch) -> None:
        """The step is done."""
        self.window.add(result)
        self.restart.count_rows(batch.checksum)
        self.restart.step += 1
        self.display.step(self.restart.step)
        self.heartbeat.step(self.restart.step)

    def leave_out(self, event: Event) -> None:
        """The step was multiplied by zero: the next batch is for the same step."""
        self.engine.steps = self.restart.step
        self.note(event.passing(*self.restart.leave_out()))
        self.heartbeat.beat()

    def go_back(self, event: Event, *, behind: int) -> Event | None:
        """Goes on from the newest checkpoint, past the data before step `behind`; an event where it has to stop."""
        self.heartbeat.phase("start")
        old = self.restart.step
        span = self.restart.go_back(self.run.guard.rollback_batches, behind=behind)
        if span is None and event.kind == "collapse":
            self.note(event.told("there is no checkpoint to go back to", action="note"))
            return None
        if span is None:
            event = self.guard.skipped(event.told("there is no checkpoint to go back to: this batch is left out"))
            if event.action == "stop":
                return event
            self.leave_out(event)
            return None
        to_step = self.restart.step
        if problem := self.guard.goes_back(to_step=to_step):
            return event.told(problem, action="stop")
        self.log.close()
        self.log = self._opened_log()
        self.window = Window(self.run, self.mesh, self.device)
        self.heartbeat.went_back(to_step)
        self.note(
            event.passing(*span).told(f"back from step {old} to the checkpoint of step {to_step}", to_step=to_step)
        )
        return None

    def note(self, event: Event) -> None:
        """A line in the ledger, and for whoever watches."""
        if self.mesh.rank == 0:
            ledger.append(self.out, event)
        self.display.say(f"guard: {event.text} ({event.action})")

    def log_figures(self) -> dict[str, Any]:
        """A line of metrics about the steps since the last one."""
        pace = self.heartbeat.pace()
        figures = self.window.summary(step=self.restart.step, scale=self.model.scale) | pace.figures
        self.log.metrics(figures)
        self.display.figures(figures)
        if pace.told:
            self.display.say(pace.told)
        return figures

    def look(self, figures: dict[str, Any]) -> Event | None:
        """What the guard wants after a line of metrics, where that is more than a note."""
        event = self.guard.look(figures, step=self.restart.step)
        if event is not None and event.action == "note":
            self.note(event)
            return None
        return event

    def save(self, *, hurry: bool) -> None:
        self.heartbeat.phase("save")
        self.log.positions(self.restart.save(watched=self.guard.watched(), hurry=hurry))

    def evaluation_due(self) -> bool:
        step, every = self.restart.step, self.run.eval.every_steps
        return self.inputs.validation is not None and (step == self.run.train.steps or due(step, every))

    def evaluate(self) -> int:
        """An evaluation of the step that is done; the signal that broke it off, or 0."""
        self.heartbeat.phase("evaluate")
        self._passes = 0
        model, run, inputs = self.model, self.run, self.inputs
        try:
            results = evaluate(model, run, inputs, mesh=self.mesh, device=self.device, between=self._between_passes)
        except _Stopped as stopped:
            self.display.say(f"step {self.restart.step}: the evaluation was broken off; a resumed run makes it")
            return stopped.signal
        self.log.evaluation({"step": self.restart.step} | results.to_json())
        self.display.say(f"step {self.restart.step}: {results.line()}")
        return 0

    def _between_passes(self) -> None:
        """At the same moments on all ranks. Raises _Stopped, on all, where one was told to stop."""
        self.restart.saver.go_on()
        self.heartbeat.beat()
        self._passes += 1
        if self._passes % LISTEN_EVERY == 0:
            (signal,) = vote(self.mesh.world, self.device, self.stop.received)
            if signal:
                raise _Stopped(signal)

    def make_up_for_evaluation(self) -> int:
        """A run that was stopped between a checkpoint and its evaluation makes it now; as `evaluate`."""
        done = self.log.has_evaluation(self.restart.step)
        if self.restart.step and self.evaluation_due() and not any(vote(self.mesh.world, self.device, done)):
            return self.evaluate()
        return 0

    def note_end(self, *, signal: int = 0, status: int | None = None, reason: str = "") -> None:
        """Says in the run's directory that this start ended by itself."""
        if self.mesh.rank == 0 and self.claim is not None:
            there = catalog.checkpoints(self.out)
            step = catalog.step_of(there[-1]) if there else 0
            status = status_after(signal) if status is None else status
            note_end(self.out, Ended(step=step, signal=signal, status=status, reason=reason))

    def close(self) -> None:
        self.display.close()
        self.log.close()
        if self.claim is not None:
            self.claim.close()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def opened(
    run: Run, out: Path, *, mesh: Mesh, device: torch.device, resume: bool, stop: StopFlag
) -> Iterator[Training]:
    """A start of a run inside a `with`; an error that all ranks raise together costs no save that goes on."""
    inputs = open_inputs(run, mesh, device)
    try:
        training = Training(run, out, inputs, mesh=mesh, device=device, resume=resume, stop=stop)
        try:
            yield training
        except UserError as error:
            if error.told_by is not None:
                training.restart.saver.rescue()
            training.note_end(status=error.status, reason=str(error))
            raise
        finally:
            training.close()
    finally:
        inputs.close()
