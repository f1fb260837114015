"""The options of `limoe eval` and all that can be wrong with them, before torch is imported or a rank starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limoe_dist.analysis.pruned import Modality, refuse_other_modality
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import load_manifest, manifest_place
from limoe_dist.data.places import exists

if TYPE_CHECKING:
    from limoe_dist.eval.classes import ClassNames


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


@dataclass(frozen=True)
class Inputs:
    """What can be checked before a rank starts, and was."""

    run: Run
    data: str
    classes: list[ClassNames] | None
    neighbours: str | None
    learned: str
    """manifest.json of the pictures that few-shot learns from; else empty."""


def check(options: Options) -> Inputs:
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
    load_manifest(data)
    classes, neighbours, learned = None, None, ""
    if isinstance(options, ZeroShotOptions):
        run = with_settings(run, "eval", templates=options.templates or run.eval.templates)
        classes, neighbours = _check_zeroshot(options, run)
    elif isinstance(options, FewShotOptions):
        learned = _check_fewshot(options, run)
    elif isinstance(options, RetrievalOptions):
        run = with_settings(run, "eval", captions=options.captions or run.eval.captions)
    elif isinstance(options, ContrastiveOptions) and options.minibatch is not None:
        if options.minibatch < 2:
            raise UserError(f"--minibatch={options.minibatch}: must be 2 or more: one pair leaves no choice")
        run = with_settings(run, "eval", minibatch=options.minibatch)
    if options.tokenizer:
        run = with_settings(run, "data", tokenizer=options.tokenizer)
    run = with_settings(run, "eval", batch_pairs=options.batch_pairs or run.eval.batch_pairs)
    return Inputs(run, data, classes, neighbours, learned)


def _check_zeroshot(options: ZeroShotOptions, run: Run) -> tuple[list[ClassNames] | None, str | None]:
    from limoe_dist.eval.classes import check_templates, read_class_file

    check_templates(run.eval.templates)
    neighbours = options.neighbours or run.data.manifest
    if neighbours == "none":
        neighbours = ""
    elif not exists(manifest_place(neighbours)):
        raise UserError(
            f'the nearest neighbour in pixels needs the training pictures, and "{neighbours}" is not there: '
            "give --neighbours MANIFEST, or --neighbours none to leave it out"
        )
    else:
        load_manifest(neighbours)
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
    load_manifest(learned)
    return learned


def with_settings(run: Run, section: str, **settings: Any) -> Run:
    """The run with other settings in one section."""
    return run.model_copy(update={section: getattr(run, section).model_copy(update=settings)})
