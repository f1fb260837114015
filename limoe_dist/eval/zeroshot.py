"""Zero-shot classification: a picture belongs to the class whose prompts lie nearest to it.

Protocol of LiT (arXiv 2111.07991), which LIMoE's evaluation follows (section 3.1): every name of a class goes into
every template, the embeddings are averaged and brought back to length 1, and the largest dot product wins. Prompts are
as written, or canonical as in big_vision: without punctuation, as `limoe eval zeroshot --classes FILE` makes them.

Shapes: R pictures, K classes, X prompts, P embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.config.templates import expanded
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.equations.contrastive import normalize
from limoe_dist.eval.classes import (
    NO_CLASS,
    ClassNames,
    canonical,
    check_templates,
    classes_of_concepts,
    concepts_of,
    true_classes,
)
from limoe_dist.eval.embed import Embedder, Progress, silent
from limoe_dist.eval.ranking import chance_frac, evenly_spread, hit_fracs, nearest_keys
from limoe_dist.model.tower import Limoe
from limoe_dist.parallel.mesh import Mesh

PromptStyle = Literal["written", "canonical"]
"""As the templates and names are written; or both as `canonical` makes them."""


@dataclass(frozen=True)
class Guess:
    """One picture and the classes that it was taken for."""

    row: int
    key: str
    concept: str
    first: tuple[str, ...]
    """Up to five class names, best first."""


@dataclass(frozen=True)
class ZeroShot:
    rows: int
    """Pictures that were classified: each good row with a concept, once."""
    classes: int
    top1: float
    top5: float
    """Shares of the rows, 0 to 1."""
    chance_top1: float
    chance_top5: float
    """What guessing gives."""
    bad_rows: int
    """Rows whose picture could not be decoded."""
    pictureless_rows: int
    """Rows that hold no picture."""
    unnamed_rows: int
    """Rows without a concept."""
    templates: tuple[str, ...]
    """As eval.templates names them."""
    templates_used: int
    """Templates behind them: clip stands for 80."""
    prompts: PromptStyle
    capacity: str
    """moe.eval_capacity; with "paper", embeddings depend on the batch that they are in."""
    examples: tuple[Guess, ...]
    """Some of the rows, evenly spread."""
    row_R: Tensor = field(repr=False, compare=False)
    """(rows,) int64 on the CPU: the rows that were classified."""
    first_R5: Tensor = field(repr=False, compare=False)
    """(rows, min(5, K)) int64 on the CPU: the classes that each was taken for, best first."""

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "classes": self.classes,
            "top1": self.top1,
            "top5": self.top5,
            "chance_top1": self.chance_top1,
            "chance_top5": self.chance_top5,
            "bad_rows": self.bad_rows,
            "pictureless_rows": self.pictureless_rows,
            "unnamed_rows": self.unnamed_rows,
            "templates": list(self.templates),
            "templates_used": self.templates_used,
            "prompts": self.prompts,
            "capacity": self.capacity,
            "examples": [vars(guess) | {"first": list(guess.first)} for guess in self.examples],
        }


def zeroshot(
    model: Limoe,
    run: Run,
    shards: ShardSet,
    tokenizer: Tokenizer,
    *,
    mesh: Mesh,
    device: torch.device,
    classes: Sequence[ClassNames] | None = None,
    prompts: PromptStyle = "written",
    progress: Progress = silent,
) -> ZeroShot:
    """Classifies every picture of the manifest; the same result on every rank. A collective over all ranks.

    classes: None takes the manifest's distinct concepts. Raises UserError where a row's concept is no class, no row
    has a concept, no picture can be decoded, a template has no {} or an embedding is not finite.
    """
    embedder = Embedder(model, run, shards, tokenizer, mesh=mesh, device=device, progress=progress)
    return zeroshot_of(embedder, classes=classes, prompts=prompts)


def zeroshot_of(
    embedder: Embedder, *, classes: Sequence[ClassNames] | None = None, prompts: PromptStyle = "written"
) -> ZeroShot:
    """As `zeroshot`, with the embeddings that other tasks may have asked for already."""
    shards, run, device = embedder.shards, embedder.run, embedder.device
    concepts = concepts_of(shards)
    place = shards.path
    if classes is None:
        classes = classes_of_concepts(concepts, place=place)
    class_R = torch.tensor(true_classes(concepts, classes, place=place), device=device)
    made = class_prompts(classes, run.eval.templates, style=prompts)
    text_XP = embedder.texts(made.texts)
    class_KP = class_embeddings(text_XP, made.class_X.to(device), len(classes))
    pictures = embedder.pictures
    used_R = (class_R != NO_CLASS) & pictures.good_R
    if not used_R.any():
        raise UserError(f"{place}: no row has both a concept and a picture that can be decoded: pack again", told_by=0)
    row = used_R.nonzero()[:, 0]
    first_R5 = nearest_keys(pictures.image_RP[row], class_KP, 5)
    top1, top5 = hit_fracs(first_R5, class_R[row], torch.arange(len(classes), device=device), (1, 5))
    return ZeroShot(
        rows=len(row),
        classes=len(classes),
        top1=top1,
        top5=top5,
        chance_top1=chance_frac(len(classes), 1, 1),
        chance_top5=chance_frac(len(classes), 1, 5),
        bad_rows=embedder.undecodable(),
        pictureless_rows=embedder.rows.pictureless,
        unnamed_rows=int((class_R == NO_CLASS).sum()),
        templates=run.eval.templates,
        templates_used=len(expanded(run.eval.templates)),
        prompts=prompts,
        capacity=run.moe.eval_capacity,
        examples=_examples(shards, row, first_R5, classes),
        row_R=row.cpu(),
        first_R5=first_R5.cpu(),
    )


@dataclass(frozen=True)
class Prompts:
    texts: tuple[str, ...]
    """X of them: the names of a class in every template, class by class."""
    class_X: Tensor
    """(X,) int64: the class of each."""


def class_prompts(
    classes: Sequence[ClassNames], templates: Sequence[str], *, style: PromptStyle = "written"
) -> Prompts:
    """Every name of every class in every template, a set's name standing for its templates.

    Raises UserError for no template, for one without {}, and where names become empty or equal in canonical prompts.
    """
    check_templates(templates)
    templates = expanded(templates)
    if style == "canonical":
        templates, classes = [canonical(each, keep="{}") for each in templates], _canonical_names(classes)
    made = [
        (template.replace("{}", name), number)
        for number, names in enumerate(classes)
        for name in names
        for template in templates
    ]
    return Prompts(texts=tuple(text for text, _ in made), class_X=torch.tensor([number for _, number in made]))


def _canonical_names(classes: Sequence[ClassNames]) -> list[ClassNames]:
    """A class file cannot have what is refused here; the concepts of shards can."""
    written: dict[str, str] = {}
    for names in classes:
        for name in names:
            short = canonical(name)
            if not short or short in written:
                fault = f'the same as "{written[short]}"' if short else "nothing"
                raise UserError(
                    f'canonical prompts leave out punctuation, and class "{name}" is then {fault}: '
                    "use --prompts written, or a class file",
                    told_by=0,
                )
            written[short] = name
    return [tuple(canonical(name) for name in names) for names in classes]


def class_embeddings(text_XP: Tensor, class_X: Tensor, num_classes: int) -> Tensor:
    """(K, P): the mean of each class's prompts, brought back to length 1. text_XP: rows of length 1."""
    # The sum points where the mean does.
    sum_KP = text_XP.new_zeros(num_classes, text_XP.shape[1]).index_add_(0, class_X, text_XP)
    return normalize(sum_KP)


def _examples(shards: ShardSet, row: Tensor, first_R5: Tensor, classes: Sequence[ClassNames]) -> tuple[Guess, ...]:
    guesses = []
    for i in evenly_spread(len(row)):
        found = shards.row(int(row[i]))
        names = tuple(classes[number][0] for number in first_R5[i].tolist())
        guesses.append(Guess(row=found.number, key=found.key, concept=found.concept, first=names))
    return tuple(guesses)
