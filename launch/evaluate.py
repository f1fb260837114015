"""`limoe eval zeroshot` and `limoe eval retrieval`: a checkpoint of a run against shards, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run, write_atomically
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import load_manifest

if TYPE_CHECKING:
    from rich.table import Table

    from limoe_dist.eval.classes import ClassNames
    from limoe_dist.eval.embed import Progress
    from limoe_dist.eval.pixels import PixelNeighbour
    from limoe_dist.eval.retrieval import Retrieval
    from limoe_dist.eval.zeroshot import ZeroShot


@dataclass(frozen=True)
class Options:
    run: str
    """Directory of a trained run."""
    data: str = ""
    """manifest.json of the shards to evaluate on; empty: the run's data.validation."""
    checkpoint: int | None = None
    """Step of the checkpoint; by default the newest whole one."""
    tokenizer: str = ""
    """The run's SentencePiece model, where it is no longer beside the run's training manifest."""
    batch_pairs: int | None = None
    """Pictures or texts per rank and forward pass; by default the run's eval.batch_pairs."""
    ranks: int = 1
    """Ranks to start on this machine; under torchrun, Slurm or MPI the launcher decides. Any number will do:
    tp and ep are the run's where they divide it, else their largest common divisors with it."""
    json: str = ""
    """File for the result; by default RUN/eval-<task>-<step>.json."""


@dataclass(frozen=True)
class ZeroShotOptions(Options):
    """Classify pictures by the prompts of their classes: top-1 and top-5, chance, and the nearest neighbour in pixels.

    The nearest neighbour is computed in the same call, over the training pictures of the same classes: it is what
    needs no learning. Exit status 2 where a setting or file has to be mended.
    """

    classes: str = ""
    """Text file with one class a line, its names parted by ","; empty: the distinct concepts of the shards."""
    templates: tuple[str, ...] = field(default=())
    """Prompts with {} for the class name, as in --templates "{}" "a photo of a {}"; empty: the run's eval.templates."""
    neighbours: str = ""
    """manifest.json of the pictures for the nearest neighbour; empty: the run's data.manifest; "none" leaves it out."""


@dataclass(frozen=True)
class RetrievalOptions(Options):
    """Find each picture's text among all texts, and each text's picture among all pictures: R@1, R@5 and R@10.

    A picture's text is its first caption; equal captions are one text, found where any picture that carries it is.
    Exit status 2 where a setting or file has to be mended.
    """


TASKS = {"zeroshot": ZeroShotOptions, "retrieval": RetrievalOptions}


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
    inputs = _check(options)
    if options.ranks > 1 and not _launched():
        from launch.ranks import run_local

        return run_local(
            ["eval", *argv], ranks=options.ranks, threads=inputs.run.parallel.threads, grace_s=_GRACE_S
        )
    _evaluate(options, inputs)
    return 0


_GRACE_S = 5.0
"""There is nothing to save when an evaluation is stopped."""


def _launched() -> bool:
    from limoe_dist.parallel.bootstrap import discover

    return discover(os.environ).found_by != "alone"


@dataclass(frozen=True)
class Inputs:
    """What can be checked before a rank starts, and was."""

    run: Run
    data: str
    classes: list[ClassNames] | None
    neighbours: str | None


def _check(options: Options) -> Inputs:
    """Raises UserError for all that the options alone have wrong."""
    if options.ranks < 1:
        raise UserError(f"--ranks={options.ranks}: must be 1 or more")
    if options.batch_pairs is not None and options.batch_pairs < 1:
        raise UserError(f"--batch-pairs={options.batch_pairs}: must be 1 or more")
    file = Path(options.run) / "run.json"
    if not file.is_file():
        raise UserError(f"--run {options.run}: there is no run.json: this is not the directory of a run")
    run = load_run(file)
    data = options.data or run.data.validation
    if not data:
        raise UserError("--data is missing, and the run has no data.validation: give the manifest.json of some shards")
    load_manifest(Path(data))
    classes, neighbours = None, None
    if isinstance(options, ZeroShotOptions):
        run = _with(run, "eval", templates=options.templates or run.eval.templates)
        classes, neighbours = _check_zeroshot(options, run)
    if options.tokenizer:
        run = _with(run, "data", tokenizer=options.tokenizer)
    return Inputs(_with(run, "eval", batch_pairs=options.batch_pairs or run.eval.batch_pairs), data, classes, neighbours)


def _check_zeroshot(options: ZeroShotOptions, run: Run) -> tuple[list[ClassNames] | None, str | None]:
    from limoe_dist.eval.classes import check_templates, read_class_file

    check_templates(run.eval.templates)
    neighbours = options.neighbours or run.data.manifest
    if neighbours == "none":
        neighbours = ""
    elif not (Path(neighbours) / "manifest.json" if Path(neighbours).is_dir() else Path(neighbours)).is_file():
        raise UserError(
            f'the nearest neighbour in pixels needs the training pictures, and "{neighbours}" is not there: '
            "give --neighbours MANIFEST, or --neighbours none to leave it out"
        )
    else:
        load_manifest(Path(neighbours))
    return read_class_file(Path(options.classes)) if options.classes else None, neighbours or None


def _with(run: Run, section: str, **settings: Any) -> Run:
    """The run with other settings in one section."""
    return run.model_copy(update={section: getattr(run, section).model_copy(update=settings)})


def _evaluate(options: Options, inputs: Inputs) -> None:
    """The part that every rank runs. Rank 0 shows and writes the result."""
    from limoe_dist.checkpoint.storage import load_weights, read_state
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.eval.pixels import pixel_nearest_neighbour
    from limoe_dist.eval.retrieval import retrieval
    from limoe_dist.eval.zeroshot import zeroshot
    from limoe_dist.model.tower import build_model
    from limoe_dist.parallel.bootstrap import discover, start

    run = _laid_out(inputs.run, discover(os.environ).world)
    with start(run.parallel, os.environ) as (mesh, device), _progress(mesh.rank == 0) as progress:
        checkpoint = _agreed_checkpoint(options, mesh, device)
        state = read_state(checkpoint)
        tokenizer = _open_tokenizer(run, expected=state.tokenizer, checkpoint=checkpoint)
        model = build_model(run, mesh=mesh, device=device)
        load_weights(checkpoint, model, mesh)
        shards = ShardSet(inputs.data)
        result: dict[str, Any] = {
            "task": "zeroshot" if isinstance(options, ZeroShotOptions) else "retrieval",
            "run": options.run,
            "preset": run.preset,
            "step": state.step,
            "data": str(shards.path),
            "ranks": mesh.world.size,
        }
        if isinstance(options, ZeroShotOptions):
            found = zeroshot(
                model, run, shards, tokenizer, mesh=mesh, device=device, classes=inputs.classes, progress=progress
            )
            result["zeroshot"], neighbour = found.to_json(), None
            if inputs.neighbours is not None:
                neighbour = pixel_nearest_neighbour(
                    run,
                    ShardSet(inputs.neighbours),
                    shards,
                    mesh=mesh,
                    device=device,
                    classes=inputs.classes,
                    progress=progress,
                )
                result["pixel_nearest_neighbour"] = {"training_data": inputs.neighbours} | neighbour.to_json()
            table = _zeroshot_table(found, neighbour, step=state.step)
        else:
            both = retrieval(model, run, shards, tokenizer, mesh=mesh, device=device, progress=progress)
            result["retrieval"], table = both.to_json(), _retrieval_table(both, step=state.step)
        rank = mesh.rank
    if rank == 0:
        path = Path(options.json or Path(options.run) / f"eval-{result['task']}-{state.step}.json")
        _show(table, path, result)
