"""`limoe eval`: zero-shot, few-shot, retrieval or contrastive accuracy of a checkpoint, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from limoe_dist.analysis.pruned import Modality, refuse_other_modality
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run, write_atomically
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import load_manifest
from limoe_dist.data.mixture import entries_of

if TYPE_CHECKING:
    import torch
    from rich.progress import TaskID
    from rich.table import Table

    from limoe_dist.data.arrow import ShardSet
    from limoe_dist.data.tokenizer import Tokenizer
    from limoe_dist.eval.classes import ClassNames
    from limoe_dist.eval.embed import Embedder, Progress
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
    needs no learning. Rows need a picture and a concept, no caption. Class files and how prompts are made:
    docs/evaluation.md. Exit status 2 where a setting or file has to be mended.
    """

    classes: str = ""
    """Class file: text in UTF-8 with one class a line and nothing else, no header, numbers or columns. "," parts the
    names of a class, as in: tabby cat, tabby. All of its names are averaged; the first is shown. The concept of every
    evaluated row must be one of the names. Blank lines and names that come twice are refused. Empty: the distinct
    concepts of the shards (see also the run's eval.classes)."""
    templates: tuple[str, ...] = field(default=())
    """Prompts with {} for the class name, as in --templates "{}" "a photo of a {}"; clip stands for CLIP's 80; empty:
    the run's eval.templates."""
    prompts: Literal["auto", "canonical", "written"] = "auto"
    """canonical: class names and templates in lower case, without punctuation, "_" a blank; written: as they are;
    auto: canonical with a class file, written for the concepts of the shards."""
    neighbours: str = ""
    """manifest.json of the pictures for the nearest neighbour; empty: the run's data.manifest; "none" leaves it out."""


@dataclass(frozen=True)
class FewShotOptions(Options):
    """Learn classes from a few pictures each, without texts: a linear classifier on the features of the frozen tower.

    LIMoE's 10-shot: features are averaged over a picture's tokens, before the projection; the classifier is a ridge
    regression to -1 and 1 in closed form, on standardised features and a constant, drawn anew for each seed. Rows need
    a picture and a concept, no caption. Exit status 2 where a setting or file has to be mended.
    """

    train: str = ""
    """manifest.json of the pictures to learn from, with concepts; empty: the run's data.manifest."""
    shots: int = 10
    """Training pictures of each class."""
    seeds: int = 3
    """Draws of them; the result is the mean, beside it the standard deviation."""
    l2: tuple[float, ...] = (1024.0,)
    """Penalties of the ridge; the first is the result, further ones are shown beside it. big_vision takes 2^10."""
    short_classes: Literal["skip", "use"] = "skip"
    """Classes with fewer than --shots training pictures: skip leaves them out, with their evaluated pictures; use
    learns from all that they have."""


@dataclass(frozen=True)
class RetrievalOptions(Options):
    """Find each picture's text among all texts, and each text's picture among all pictures: R@1, R@5 and R@10.

    With --captions all, the protocol for COCO, every caption is asked for, and a picture has found its text where any
    of its captions comes first. Equal captions are one text, found where any picture that carries it is.
    Rows without a picture or without a caption are left out and counted.
    Exit status 2 where a setting or file has to be mended.
    """

    captions: Literal["first", "all"] | None = None
    """The first caption of each row alone, or all of them; by default the run's eval.captions."""


@dataclass(frozen=True)
class ContrastiveOptions(Options):
    """In minibatches, let each picture choose its caption and each caption its picture: the mean of both accuracies.

    The validation accuracy of LIMoE's Table 3, in minibatches of 1,024 pairs in the order of the manifest. The last
    incomplete one is left out, which is said; where all rows are fewer, they are one minibatch.
    Exit status 2 where a setting or file has to be mended.
    """

    minibatch: int | None = None
    """Pairs to choose between; by default the run's eval.minibatch."""


TASKS: dict[str, Callable[..., Options]] = {
    "zeroshot": ZeroShotOptions,
    "fewshot": FewShotOptions,
    "retrieval": RetrievalOptions,
    "contrastive": ContrastiveOptions,
}


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
class Inputs:
    """What can be checked before a rank starts, and was."""

    run: Run
    data: str
    classes: list[ClassNames] | None
    neighbours: str | None
    learned: str
    """manifest.json of the pictures that few-shot learns from; else empty."""


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
    needs: tuple[Modality, ...] = ("image",) if isinstance(options, FewShotOptions) else ("image", "text")
    refuse_other_modality(Path(options.run), run, "this evaluation", needs)
    data = options.data or run.data.validation
    if not data:
        raise UserError("--data is missing, and the run has no data.validation: give the manifest.json of some shards")
    load_manifest(Path(data))
    classes, neighbours, learned = None, None, ""
    if isinstance(options, ZeroShotOptions):
        run = _with(run, "eval", templates=options.templates or run.eval.templates)
        classes, neighbours = _check_zeroshot(options, run)
    elif isinstance(options, FewShotOptions):
        learned = _check_fewshot(options, run)
    elif isinstance(options, RetrievalOptions):
        run = _with(run, "eval", captions=options.captions or run.eval.captions)
    elif isinstance(options, ContrastiveOptions) and options.minibatch is not None:
        if options.minibatch < 2:
            raise UserError(f"--minibatch={options.minibatch}: must be 2 or more: one pair leaves no choice")
        run = _with(run, "eval", minibatch=options.minibatch)
    if options.tokenizer:
        run = _with(run, "data", tokenizer=options.tokenizer)
    run = _with(run, "eval", batch_pairs=options.batch_pairs or run.eval.batch_pairs)
    return Inputs(run, data, classes, neighbours, learned)


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


def _check_fewshot(options: FewShotOptions, run: Run) -> str:
    """The manifest to learn from."""
    for name, value in (("--shots", options.shots), ("--seeds", options.seeds)):
        if value < 1:
            raise UserError(f"{name}={value}: must be 1 or more")
    if not options.l2:
        raise UserError("--l2 is empty: give at least one penalty, for example --l2 1024")
    if wrong := [value for value in options.l2 if not (value > 0 and math.isfinite(value))]:
        raise UserError(f"--l2={wrong[0]:g}: a penalty must be above 0 and finite, for example 1024")
    learned = options.train or run.data.manifest
    if not learned:
        raise UserError("--train is missing, and the run has no data.manifest: give the manifest.json of some shards")
    load_manifest(Path(learned))
    return learned


def _with(run: Run, section: str, **settings: Any) -> Run:
    """The run with other settings in one section."""
    return run.model_copy(update={section: getattr(run, section).model_copy(update=settings)})


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
        tokenizer = None
        if not isinstance(options, FewShotOptions):
            tokenizer = open_run_tokenizer(run, checkpoint.checkpoint)
        shards = ShardSet(data)
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
        classes = classes_of_run(of.run, ShardSet(*(entry.path for entry in entries_of(of.run.data))), of.shards)
    if prompts == "auto":
        prompts = "written" if inputs.classes is None else "canonical"
    found = zeroshot_of(of.embedder(), classes=classes, prompts=prompts)
    content, neighbour = {"zeroshot": found.to_json()}, None
    if inputs.neighbours is not None:
        # A run on a mixture was trained on all of it.
        mixed = of.run.data.mixture and inputs.neighbours == of.run.data.manifest
        searched = [entry.path for entry in entries_of(of.run.data)] if mixed else [inputs.neighbours]
        training = ShardSet(*searched)
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
        training = ShardSet(inputs.learned)
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
