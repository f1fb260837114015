"""Training, from top to bottom: data, model, optimizer, restore, then step, log, save, evaluate, and the stop vote."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from limoe_dist.checkpoint.logical import Shard, model_shards, optimizer_shards
from limoe_dist.checkpoint.storage import State, latest_checkpoint, load, read_state, save, versions
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import fingerprint
from limoe_dist.config.schema import Run
from limoe_dist.data.loader import Batch, Loader
from limoe_dist.model.tower import Limoe, build_model
from limoe_dist.optim.adamw import AdamW
from limoe_dist.parallel.collectives import raise_together
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.display import Display
from limoe_dist.train.evaluation import evaluate
from limoe_dist.train.folder import claim, new_run_problem
from limoe_dist.train.inputs import Inputs, open_inputs
from limoe_dist.train.metrics import Log, Window
from limoe_dist.train.preemption import StopFlag
from limoe_dist.train.step import training_step


@dataclass(frozen=True)
class Outcome:
    step: int
    """Optimizer steps that are done and saved."""
    signal: int
    """The signal that ended the run early, or 0."""


def train(
    run: Run, out: Path, *, mesh: Mesh, device: torch.device, resume: bool, stop_after: int | None = None
) -> Outcome:
    """Trains in `out` until train.steps, a signal, or the step `stop_after`; always ends with a checkpoint.

    Every rank calls it. Raises UserError, on all ranks, for what the user can mend; nothing is overwritten then.
    """
    stop = StopFlag()
    inputs = open_inputs(run, mesh, device)
    if not resume:
        problem = new_run_problem(out) if mesh.rank == 0 else None
        raise_together([problem] if problem else [], mesh.world, device)
    model = build_model(run, mesh=mesh, device=device)
    optimizer = AdamW(model, run.optim)
    first_step = _restore(run, out, model, optimizer, inputs, mesh) if resume else 0
    if not resume and mesh.rank == 0:
        claim(out, run)
    log = Log(out, run, first_step=first_step, writes=mesh.rank == 0)
    display = Display(steps=run.train.steps, first_step=first_step, shows=mesh.rank == 0)
    window = Window(run, mesh, device)
    step, saved, signal = first_step, first_step, 0
    # Garbage collection in the middle of a step makes all ranks wait for one; what lives until here lives on.
    gc.collect()
    gc.freeze()
    try:
        with Loader(
            run, inputs.train, inputs.tokenizer, rank=mesh.rank, world=mesh.world.size, first_step=step, device=device
        ) as loader:
            for batch in _together(loader, mesh, device):
                window.add(training_step(model, optimizer, batch, run=run, mesh=mesh, device=device))
                step = batch.step + 1
                display.step(step)
                for bad in batch.replaced:
                    print(f"rank {mesh.rank}: row {bad.key} was replaced: {bad.reason}", flush=True)

                signal = stop.vote(mesh, device)
                last = step == run.train.steps or step == stop_after or signal != 0
                if last or step % run.log.every_steps == 0:
                    figures = window.summary(step=step, temperature=model.log_scale)
                    log.metrics(figures)
                    display.figures(figures)
                if last or _due(step, run.checkpoint.every_steps):
                    folder = _save(run, out, step, model, optimizer, inputs, mesh)
                    log.positions(first_step=saved, step=step, batch_pairs=run.train.batch_pairs)
                    saved = step
                    display.say(f"step {step}: checkpoint {folder}")
                if inputs.validation is not None and (
                    step == run.train.steps or (not last and _due(step, run.eval.every_steps))
                ):
                    results = evaluate(model, run, inputs, mesh=mesh, device=device)
                    log.evaluation({"step": step} | results.to_json())
                    display.say(f"step {step}: {results.line()}")
                if last:
                    break
    finally:
        display.close()
        log.close()
        stop.close()
    return Outcome(step=step, signal=signal)


def _together(loader: Loader, mesh: Mesh, device: torch.device) -> Iterator[Batch]:
    """The loader's batches; where one rank's data fails, all ranks raise UserError instead of waiting for it."""
    while True:
        batch, problems = None, []
        try:
            batch = next(loader, None)
        except UserError as error:
            problems = [str(error)]
        raise_together(problems, mesh.world, device)
        if batch is None:
            return
        yield batch


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _tensors(model: Limoe, optimizer: AdamW, mesh: Mesh) -> dict[str, Shard]:
    return model_shards(model, mesh) | optimizer_shards(optimizer.state(), mesh)


def _save(run: Run, out: Path, step: int, model: Limoe, optimizer: AdamW, inputs: Inputs, mesh: Mesh) -> Path:
    state = State(
        step=step,
        position=step * run.train.batch_pairs,
        fingerprint=fingerprint(run),
        data=inputs.data_hash,
        tokenizer=inputs.tokenizer_hash,
        versions=versions(),
    )
    return save(out, state, _tensors(model, optimizer, mesh), mesh, keep=run.checkpoint.keep)


def _restore(run: Run, out: Path, model: Limoe, optimizer: AdamW, inputs: Inputs, mesh: Mesh) -> int:
    """Fills model and optimizer from the newest whole checkpoint; returns the number of steps that are done."""
    checkpoint = latest_checkpoint(out)
    state = read_state(checkpoint)
    for name, before, now in (
        ("settings", state.fingerprint, fingerprint(run)),
        ("training shards", state.data, inputs.data_hash),
        ("vocabulary", state.tokenizer, inputs.tokenizer_hash),
    ):
        if before != now:
            raise UserError(
                f"{checkpoint} was made with other {name} ({before[:12]} there, {now[:12]} now): "
                "a resumed run keeps what decides its results",
                shared=True,
            )
    load(checkpoint, _tensors(model, optimizer, mesh), mesh)
    optimizer.steps = state.step
    return state.step
