"""What zero-shot classification chooses between: the concepts of a manifest, or a file with one class a line.

Needs neither torch nor DALI: a command checks a class file before it starts ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from limoe_dist.config.errors import UserError, nearest
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import normalised

ClassNames = tuple[str, ...]
"""All names of one class, its first name first."""

NO_CLASS = -1


def concepts_of(shards: ShardSet) -> list[str]:
    """The concept of every row, in the order of the rows; empty where a row has none."""
    return [shards.row(number).concept for number in range(len(shards))]


def classes_of_concepts(concepts: Iterable[str], *, place: str) -> list[ClassNames]:
    """One class for each distinct concept, sorted. Concepts that the tokenizer takes for equal are one.

    place: the manifest, for the message. Raises UserError where no row has a concept.
    """
    first_seen: dict[str, str] = {}
    for concept in concepts:
        if name := normalised(concept):
            first_seen.setdefault(name, concept)
    if not first_seen:
        raise UserError(
            f'{place}: no row has a concept, so there are no classes: fill the column "concept" when packing',
            told_by=0,
        )
    return [(first_seen[name],) for name in sorted(first_seen)]


def classes_of_run(run: Run, train: ShardSet, shards: ShardSet) -> list[ClassNames]:
    """The classes that eval.classes asks for, where no class file is given. Raises as `classes_of_concepts` does."""
    concepts = concepts_of(shards)
    if run.eval.classes == "trained":
        concepts += concepts_of(train)
    return classes_of_concepts(concepts, place=str(shards.path))


def read_class_file(path: Path) -> list[ClassNames]:
    """Classes in the order of the lines; "," parts the names of a class.

    Raises UserError where the file cannot be read, a line or a name is blank, or a name comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class file {path}: cannot be read: {error}") from None
    if not lines:
        raise UserError(f"class file {path}: is empty: write one class a line")
    line_of: dict[str, int] = {}
    classes = []
    for number, line in enumerate(lines, start=1):
        names = tuple(name.strip() for name in line.split(","))
        if not all(names):
            raise UserError(
                f'class file {path}: line {number} is "{line}": every line is a class, its names parted by ",", '
                "none of them blank"
            )
        for name in names:
            if earlier := line_of.get(normalised(name)):
                raise UserError(
                    f'class file {path}: "{name}" is in line {earlier} and again in line {number}: '
                    "a name belongs to one class, once"
                )
            line_of[normalised(name)] = number
        classes.append(names)
    return classes


def class_numbers(concepts: Sequence[str], classes: Sequence[ClassNames]) -> list[int]:
    """Which class each concept belongs to, by any of the class's names; NO_CLASS where none has it."""
    number_of = {normalised(name): number for number, names in enumerate(classes) for name in names}
    return [number_of.get(normalised(concept), NO_CLASS) for concept in concepts]


def true_classes(concepts: Sequence[str], classes: Sequence[ClassNames], *, place: str) -> list[int]:
    """The class of each row; NO_CLASS for a row without a concept.

    Raises UserError where a row's concept is none of the classes: it would count as wrong whatever the model says.
    """
    numbers = class_numbers(concepts, classes)
    lost = sorted({c for c, number in zip(concepts, numbers, strict=True) if number == NO_CLASS and normalised(c)})
    if lost:
        known = [name for names in classes for name in names]
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise UserError(
            f'{place}: concept "{lost[0]}"{more} is in none of the {len(classes)} classes{nearest(lost[0], known)}: '
            'add it to the class file, as a line or as a further name after ","',
            told_by=0,
        )
    if all(number == NO_CLASS for number in numbers):
        raise UserError(f'{place}: no row has a concept: fill the column "concept" when packing', told_by=0)
    return numbers


def check_templates(templates: Sequence[str]) -> None:
    """Raises UserError for no template, and for one without the place for the class name."""
    if not templates:
        raise UserError('eval.templates is empty: give at least one, for example "a photo of a {}"', told_by=0)
    for template in templates:
        if "{}" not in template:
            raise UserError(f'eval.templates: "{template}" must hold {{}} where the class name goes', told_by=0)
