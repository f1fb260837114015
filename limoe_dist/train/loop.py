"""Training, from top to bottom: data, model, optimizer, restore, then step, log, save, evaluate, and the stop vote."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.loader import Batch, Loader
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel import apex
from limoe_dist.parallel.collectives import all_or_none, vote
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.display import Display, say_anywhere
from limoe_dist.train.evaluation import evaluate
from limoe_dist.train.folder import begin, forget_replaced, new_run_problem, note_end, replaced_file
from limoe_dist.train.inputs import open_inputs
from limoe_dist.train.metrics import Log, Window
from limoe_dist.train.preemption import StopFlag
from limoe_dist.train.restart import Restart
from limoe_dist.train.step import Examples, StepResult, training_step


@dataclass(frozen=True)
class Outcome:
    step: int
    """Optimizer steps that are done and saved."""
    signal: int
    """The signal that ended the run early, or 0."""


def train(
    run: Run, out: Path, *, mesh: Mesh, device: torch.device, resume: bool, stop_after: int | None = None
) -> Outcome:
    """Trains in `out` until train.steps, a signal, or the step `stop_after`, and ends with a checkpoint.

    Every rank calls it. Raises UserError, on all ranks, for what the user can mend: what was saved is left alone, and
    the newest checkpoint stands.
    """
    with StopFlag() as stop:
        inputs = open_inputs(run, mesh, device)
        with all_or_none(mesh.world, device):
            if mesh.rank == 0 and not resume and (problem := new_run_problem(out)):
                raise UserError(problem)
            apex.check(run.parallel.kernels, device)
        model = build_model(run, mesh=mesh, device=device)
        engine = make_engine(model, run, mesh)
        restart = Restart(run, out, engine, inputs, mesh, device)
        first_step = restart.restore() if resume else 0
        taken = None if first_step else restart.initialise()
        claim = None
        with all_or_none(mesh.world, device):
            if mesh.rank == 0:
                claim = begin(out, run, inputs.tokenizer.path)
                restart.check_nothing_new()
                if not first_step:
                    forget_replaced(out)
            log = Log(out, run, first_step=first_step, writes=mesh.rank == 0)
            if (missed := restart.missed(log.newest_positions())) is not None:
                log.positions(missed)
        display = Display(steps=run.train.steps, first_step=first_step, shows=mesh.rank == 0)
        if resume:
            display.say(f"going on from step {first_step}" if first_step else "no checkpoint yet: beginning at step 0")
        for line in (*inputs.told, *filter(None, [restart.batch_note()])):
            display.say(line)
        if taken is not None:
            display.say(taken.text(inputs.tokenizer_hash))
        restart.open_saver(claim, stop, display.say)
        window = Window(run, mesh, device)
        step, saved, signal = first_step, first_step, 0
        end = min(run.train.steps, stop_after or run.train.steps)

        def evaluate_now() -> None:
            results = evaluate(model, run, inputs, mesh=mesh, device=device, between=restart.saver.go_on)
            log.evaluation({"step": step} | results.to_json())
            display.say(f"step {step}: {results.line()}")

        def evaluation_due() -> bool:
            return inputs.validation is not None and (step == run.train.steps or _due(step, run.eval.every_steps))

        # A garbage collection in the middle of a step makes all ranks wait for one: what lives until here is left out.
        gc.collect()
        gc.freeze()
        try:
            # A run that was stopped between a checkpoint and its evaluation makes up for it.
            if step and evaluation_due() and not any(vote(mesh.world, device, log.has_evaluation(step))):
                evaluate_now()
            for batch in _batches(run, restart, first_step=step, end=end):
                examples = Examples(batch.images, batch.tokens, batch.valid)
                result = training_step(model, engine, examples, step=batch.step, run=run, mesh=mesh)
                _check_finite(result, batch.step, out)
                window.add(result)
                restart.count_rows(batch.checksum)
                step = batch.step + 1
                display.step(step)
                for bad in batch.replaced:
                    say_anywhere(f"rank {mesh.rank}: row {bad.key} was replaced: {bad.reason}")

                # What ranks see apart they act on together: a signal, the clock, and how far a save is.
                flags = (stop.received, restart.due_by_the_clock(), *restart.saver.flags())
                signal, clock, *saving = vote(mesh.world, device, *flags)
                restart.saver.advance(*saving)
                last = step == end or signal != 0
                if last or _due(step, run.log.every_steps):
                    figures = window.summary(step=step, scale=model.scale)
                    log.metrics(figures)
                    display.figures(figures)
                if last or clock or _due(step, run.checkpoint.every_steps):
                    restart.save(step, hurry=signal != 0)
                    log.positions(restart.consumed(saved, step))
                    saved = step
                if evaluation_due() and not signal:
                    evaluate_now()
                window.restart_clock()
                if last:
                    break
            restart.finish(hurry=signal != 0)
            if mesh.rank == 0:
                note_end(out, step=step, signal=signal)
        except UserError as error:
            # Raised by all ranks together, it must not cost the save that goes on.
            if error.told_by is not None:
                restart.saver.rescue()
            raise
        finally:
            display.close()
            log.close()
            inputs.close()
            if claim is not None:
                claim.close()
    return Outcome(step=step, signal=signal)


def _batches(run: Run, restart: Restart, *, first_step: int, end: int) -> Iterator[Batch]:
    """The batches of steps first_step to end - 1; where one rank's data fails, all ranks raise UserError."""
    mesh, inputs, device = restart.mesh, restart.inputs, restart.device
    if first_step >= end:
        return
    with Loader(
        run,
        inputs.train,
        inputs.tokenizer,
        rank=mesh.rank,
        world=mesh.world.size,
        first_step=first_step,
        first_pair=restart.first_pair,
        device=device,
        quarantined=restart.quarantined,
        replaced=replaced_file(restart.out, mesh.rank),
    ) as loader:
        while True:
            with all_or_none(mesh.world, device):
                batch = next(loader, None)
            if batch is None:
                return
            yield batch


def _check_finite(result: StepResult, step: int, out: Path) -> None:
    """The norm is the same on all ranks, so they raise together, before anything of this step is saved."""
    if not torch.isfinite(result.grad_norm):
        raise UserError(
            f"step {step + 1}: the gradient is not finite; no checkpoint in {out} holds this step. "
            "Try a smaller optim.lr or a longer optim.warmup_steps in a new run",
            told_by=0,
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
