"""`limoe eval zeroshot` and `limoe eval retrieval`: a checkpoint of a run against shards, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
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
    import torch
    from rich.progress import TaskID
    from rich.table import Table

    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.data.tokenizer import Tokenizer
    from limoe_dist.eval.classes import ClassNames
    from limoe_dist.eval.embed import Progress
    from limoe_dist.model.tower import Limoe
    from limoe_dist.parallel.mesh import Mesh


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


TASKS: dict[str, Callable[..., Options]] = {"zeroshot": ZeroShotOptions, "retrieval": RetrievalOptions}


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

    from limoe_dist.checkpoint.catalog import latest_checkpoint

    # Told once, before ranks start that would each tell it.
    open_run_tokenizer(inputs.run, latest_checkpoint(Path(options.run), options.checkpoint))
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
    run = _with(run, "eval", batch_pairs=options.batch_pairs or run.eval.batch_pairs)
    return Inputs(run, data, classes, neighbours)


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


@dataclass(frozen=True)
class Subject:
    """What is evaluated, loaded on this rank."""

    run: Run
    step: int
    model: Limoe
    tokenizer: Tokenizer
    shards: ShardSet
    mesh: Mesh
    device: torch.device
    progress: Progress


def _evaluate(options: Options, inputs: Inputs) -> None:
    """The part that every rank runs. Rank 0 shows and writes the result."""
    from launch.ranks import agreement
    from limoe_dist.parallel.bootstrap import start
    from limoe_dist.parallel.place import discover

    run = _laid_out(inputs.run, discover(os.environ).world)
    files = {"--data": inputs.data, "--neighbours": inputs.neighbours or "", "data.tokenizer": run.data.tokenizer}
    told = {"limoe eval": type(options).__name__, "--checkpoint": options.checkpoint, "--classes": inputs.classes}
    agree = agreement(run, files=files, options=told)
    with start(run.parallel, os.environ, agree=agree) as (mesh, device), progress_bars(mesh.rank == 0) as progress:
        subject = _loaded(options, run, inputs.data, mesh, device, progress)
        if isinstance(options, ZeroShotOptions):
            task, (content, table) = "zeroshot", _zeroshot(subject, inputs)
        else:
            task, (content, table) = "retrieval", _retrieval(subject)
    if mesh.rank == 0:
        where = {"run": options.run, "preset": run.preset, "step": subject.step, "data": str(subject.shards.path)}
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
        tokenizer = open_run_tokenizer(run, checkpoint.checkpoint)
        shards = ShardSet(data)
        verify_shards(shards.manifest, shards.folder, rank=mesh.rank, world=mesh.world.size)
    return Subject(run, checkpoint.state.step, model, tokenizer, shards, mesh, device, progress)


def _zeroshot(of: Subject, inputs: Inputs) -> tuple[dict[str, Any], Table]:
    from launch.eval_tables import zeroshot_table
    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.eval.classes import classes_of_run
    from limoe_dist.eval.pixels import pixel_nearest_neighbour
    from limoe_dist.eval.zeroshot import zeroshot

    mesh, device, progress = of.mesh, of.device, of.progress
    classes = inputs.classes
    if classes is None and of.run.eval.classes == "trained":
        classes = classes_of_run(of.run, ShardSet(of.run.data.manifest), of.shards)
    found = zeroshot(
        of.model, of.run, of.shards, of.tokenizer, mesh=mesh, device=device, classes=classes, progress=progress
    )
    content, neighbour = {"zeroshot": found.to_json()}, None
    if inputs.neighbours is not None:
        training = ShardSet(inputs.neighbours)
        neighbour = pixel_nearest_neighbour(
            of.run, training, of.shards, mesh=mesh, device=device, classes=classes, progress=progress
        )
        content["pixel_nearest_neighbour"] = {"training_data": inputs.neighbours} | neighbour.to_json()
        if neighbour.training_rows == 0:
            # No training picture belongs to a class: there is no neighbour to compare with.
            neighbour = None
    return content, zeroshot_table(found, neighbour, step=of.step)


def _retrieval(of: Subject) -> tuple[dict[str, Any], Table]:
    from launch.eval_tables import retrieval_table
    from limoe_dist.eval.retrieval import retrieval

    found = retrieval(of.model, of.run, of.shards, of.tokenizer, mesh=of.mesh, device=of.device, progress=of.progress)
    return {"retrieval": found.to_json()}, retrieval_table(found, step=of.step)


def _laid_out(run: Run, world: int) -> Run:
    """The run's tp and ep, or the largest that also divide the number of ranks; kernels of whatever device is here."""
    tp, ep = math.gcd(run.parallel.tp, world), math.gcd(run.parallel.ep, world)
    return _with(run, "parallel", tp=tp, ep=ep, kernels="auto")


def open_run_tokenizer(run: Run, checkpoint: Path) -> Tokenizer:
    """The vocabulary that the checkpoint was trained with. Raises UserError for another one."""
    from limoe_dist.checkpoint.state import read_state
    from limoe_dist.data.manifest import sha256_of
    from limoe_dist.data.tokenizer import Tokenizer, open_tokenizer

    if run.data.tokenizer:
        tokenizer = Tokenizer(run.data.tokenizer, length=run.text.length, vocab_limit=run.text.vocab_size)
    else:
        path = Path(run.data.manifest)
        path = path / "manifest.json" if path.is_dir() else path
        if not path.is_file():
            raise UserError(
                f"the run's tokenizer is beside its training manifest, and {path} is not there: "
                "give --tokenizer FILE, the SentencePiece model that the run was trained with",
                told_by=0,
            )
        tokenizer = open_tokenizer(run, load_manifest(path), path.parent)
    found, expected = sha256_of(tokenizer.path), read_state(checkpoint).tokenizer
    if found != expected:
        raise UserError(
            f"tokenizer {tokenizer.path}: sha256 is {found[:12]}..., but {checkpoint} was trained with "
            f"{expected[:12]}...: the same text would be other tokens; give --tokenizer FILE, the run's own",
            told_by=0,
        )
    return tokenizer


@contextmanager
def progress_bars(shows: bool) -> Iterator[Progress]:
    """A bar for each kind of work, on a terminal only; it is wiped away at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console, transient=True, disable=not (shows and console.is_terminal)) as bars:

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield advance


def _show(table: Table, path: Path, result: dict[str, Any]) -> None:
    from rich.console import Console

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error}") from None
    Console(highlight=False).print(table)
    print(f"written: {path}")
