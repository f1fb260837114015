"""`limoe eval`: zero-shot, few-shot, retrieval or contrastive accuracy of a checkpoint, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from launch.eval_options import (
    TASKS,
    FewShotOptions,
    Inputs,
    Options,
    RetrievalOptions,
    ZeroShotOptions,
    check,
    with_settings,
)
from launch.progress import progress_bars
from launch.run_tokenizer import open_run_tokenizer
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically
from limoe_dist.config.schema import Run
from limoe_dist.data.mixture import entries_of

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.data.tokenizer import Tokenizer
    from limoe_dist.eval.embed import Embedder, Progress
    from limoe_dist.model.tower import Limoe
    from limoe_dist.parallel.mesh import Mesh


def main(argv: list[str]) -> int:
    """Runs `limoe eval`; returns its exit status. Lets UserError pass."""
    try:
        options: Options = tyro.extras.subcommand_cli_from_dict(
            TASKS,
            prog="limoe eval",
            description="Evaluates a checkpoint of a run: every row of the shards once, on any number of ranks.",
            args=argv or ["--help"],
        )
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    inputs = check(options)

    from limoe_dist.checkpoint.catalog import latest_checkpoint

    # Told once, before ranks start that would each tell it.
    checkpoint = latest_checkpoint(Path(options.run), options.checkpoint)
    if not isinstance(options, FewShotOptions):
        open_run_tokenizer(inputs.run, checkpoint)
    if options.ranks > 1 and not _launched():
        from launch.ranks import run_local

        return run_local(["eval", *argv], ranks=options.ranks, threads=inputs.run.parallel.threads, grace_s=_GRACE_S)
    _evaluate(options, inputs)
    return 0


_GRACE_S = 5.0
"""There is nothing to save when an evaluation is stopped."""


def _launched() -> bool:
    from limoe_dist.parallel.place import discover

    return discover(os.environ).found_by != "alone"


@dataclass(frozen=True)
class Subject:
    """What is evaluated, loaded on this rank."""

    run: Run
    step: int
    model: Limoe
    tokenizer: Tokenizer | None
    """None where the task reads no text."""
    shards: ShardSet
    mesh: Mesh
    device: torch.device
    progress: Progress

    def embedder(self) -> Embedder:
        from limoe_dist.eval.embed import Embedder

        assert self.tokenizer is not None
        return Embedder(
            self.model,
            self.run,
            self.shards,
            self.tokenizer,
            mesh=self.mesh,
            device=self.device,
            progress=self.progress,
        )


def _evaluate(options: Options, inputs: Inputs) -> None:
    """The part that every rank runs. Rank 0 shows and writes the result."""
    from launch.ranks import agreement
    from limoe_dist.parallel.bootstrap import start
    from limoe_dist.parallel.place import discover

    run = _laid_out(inputs.run, discover(os.environ).world)
    files = {"--data": inputs.data, "--neighbours": inputs.neighbours or "", "data.tokenizer": run.data.tokenizer}
    files |= {"--train": inputs.learned}
    told: dict[str, object] = {"limoe eval": type(options).__name__, "--checkpoint": options.checkpoint}
    told |= {"--classes": inputs.classes}
    if isinstance(options, ZeroShotOptions):
        told |= {"--prompts": options.prompts}
    elif isinstance(options, FewShotOptions):
        told |= {"--shots": options.shots, "--seeds": options.seeds, "--l2": options.l2}
        told |= {"--short-classes": options.short_classes}
    agree = agreement(run, files=files, options=told)
    with start(run.parallel, os.environ, agree=agree) as (mesh, device), progress_bars(mesh.rank == 0) as progress:
        subject = _loaded(options, run, inputs.data, mesh, device, progress)
        if isinstance(options, ZeroShotOptions):
            task, (content, table) = "zeroshot", _zeroshot(subject, inputs, options.prompts)
        elif isinstance(options, FewShotOptions):
            task, (content, table) = "fewshot", _fewshot(subject, inputs, options)
        elif isinstance(options, RetrievalOptions):
            task, (content, table) = "retrieval", _retrieval(subject)
        else:
            task, (content, table) = "contrastive", _contrastive(subject)
    if mesh.rank == 0:
        where = {"run": options.run, "preset": run.preset, "step": subject.step, "data": subject.shards.path}
        path = Path(options.json or Path(options.run) / f"eval-{task}-{subject.step}.json")
        _show(table, path, {"task": task} | where | {"ranks": mesh.world.size} | content)


def _loaded(options: Options, run: Run, data: str, mesh: Mesh, device: torch.device, progress: Progress) -> Subject:
    from limoe_dist.checkpoint.reader import load_weights, open_checkpoint
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.data.manifest import verify_shards
    from limoe_dist.model.tower import build_model
    from limoe_dist.parallel.collectives import all_or_none

    checkpoint = open_checkpoint(Path(options.run), mesh, device, options.checkpoint)
    model = build_model(run, mesh=mesh, device=device)
    load_weights(checkpoint, model, mesh)
    with all_or_none(mesh.world, device):
        tokenizer = None
        if not isinstance(options, FewShotOptions):
            tokenizer = open_run_tokenizer(run, checkpoint.checkpoint)
        shards = ShardSet(data, data=run.data)
        verify_shards(shards.manifest, shards.folder, rank=mesh.rank, world=mesh.world.size)
    return Subject(run, checkpoint.state.step, model, tokenizer, shards, mesh, device, progress)


def _zeroshot(
    of: Subject, inputs: Inputs, prompts: Literal["auto", "canonical", "written"]
) -> tuple[dict[str, Any], Table]:
    from launch.eval_tables import zeroshot_table
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.eval.classes import classes_of_run
    from limoe_dist.eval.pixels import pixel_nearest_neighbour
    from limoe_dist.eval.zeroshot import zeroshot_of

    mesh, device, progress = of.mesh, of.device, of.progress
    classes = inputs.classes
    if classes is None and of.run.eval.classes == "trained":
        trained = ShardSet(*(entry.path for entry in entries_of(of.run.data)), data=of.run.data)
        classes = classes_of_run(of.run, trained, of.shards)
    if prompts == "auto":
        prompts = "written" if inputs.classes is None else "canonical"
    found = zeroshot_of(of.embedder(), classes=classes, prompts=prompts)
    content, neighbour = {"zeroshot": found.to_json()}, None
    if inputs.neighbours is not None:
        # A run on a mixture was trained on all of it.
        mixed = of.run.data.mixture and inputs.neighbours == of.run.data.manifest
        searched = [entry.path for entry in entries_of(of.run.data)] if mixed else [inputs.neighbours]
        training = ShardSet(*searched, data=of.run.data)
        neighbour = pixel_nearest_neighbour(
            of.run, training, of.shards, mesh=mesh, device=device, classes=classes, progress=progress
        )
        where = {"training_data": searched if mixed else inputs.neighbours}
        content["pixel_nearest_neighbour"] = where | neighbour.to_json()
        if neighbour.training_rows == 0:
            # No training picture belongs to a class: there is no neighbour to compare with.
            neighbour = None
    return content, zeroshot_table(found, neighbour, step=of.step)


def _fewshot(of: Subject, inputs: Inputs, options: FewShotOptions) -> tuple[dict[str, Any], Table]:
    from launch.eval_tables import fewshot_table
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.data.manifest import verify_shards
    from limoe_dist.eval.fewshot import Shots, fewshot
    from limoe_dist.parallel.collectives import all_or_none

    with all_or_none(of.mesh.world, of.device):
        training = ShardSet(inputs.learned, data=of.run.data)
        verify_shards(training.manifest, training.folder, rank=of.mesh.rank, world=of.mesh.world.size)
    shots = Shots(options.shots, options.seeds, options.l2, options.short_classes)
    found = fewshot(of.model, of.run, training, of.shards, shots, mesh=of.mesh, device=of.device, progress=of.progress)
    content = {"fewshot": {"training_data": str(training.path)} | found.to_json()}
    return content, fewshot_table(found, step=of.step)


def _retrieval(of: Subject) -> tuple[dict[str, Any], Table]:
    from launch.eval_tables import retrieval_table
    from limoe_dist.eval.retrieval import retrieval_of

    found = retrieval_of(of.embedder())
    return {"retrieval": found.to_json()}, retrieval_table(found, step=of.step)


def _contrastive(of: Subject) -> tuple[dict[str, Any], Table]:
    from launch.eval_tables import contrastive_table
    from limoe_dist.eval.contrastive import contrastive_of

    found = contrastive_of(of.embedder())
    return {"contrastive": found.to_json()}, contrastive_table(found, step=of.step)


def _laid_out(run: Run, world: int) -> Run:
    """The run's tp and ep, or the largest that also divide the number of ranks; kernels of whatever device is here."""
    tp, ep = math.gcd(run.parallel.tp, world), math.gcd(run.parallel.ep, world)
    return with_settings(run, "parallel", tp=tp, ep=ep, kernels="auto")


def _show(table: Table, path: Path, result: dict[str, Any]) -> None:
    from rich.console import Console

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error}") from None
    Console(highlight=False).print(table)
    print(f"written: {path}")
