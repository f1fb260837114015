"""What zero-shot classification chooses between: the concepts of a manifest, or a file with one class a line.

Needs neither torch nor DALI: a command checks a class file before it starts ranks.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from limoe_dist.config import templates as template_sets
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
    return classes_of_concepts(concepts, place=shards.path)


def read_class_file(path: Path) -> list[ClassNames]:
    """Classes in the order of the lines; "," parts the names of a class. docs/evaluation.md has the format.

    Raises UserError where the file cannot be read as UTF-8 (a byte order mark is passed over), a line or a name is
    blank, a name holds a tab or another control character or nothing but punctuation, or a name comes twice: two names
    are one where `normalised` or `canonical` makes them equal, since their prompts would be.
    """
    try:
        # Line ends become "\n"; splitlines() would also part lines at rarer characters, within a name.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"class file {path}: byte {error.start} is not UTF-8: save it as UTF-8, one class a line"
        ) from None
    except OSError as error:
        raise UserError(f"class file {path}: cannot be read: {error}") from None
    if not text:
        raise UserError(f"class file {path}: is empty: write one class a line")
    line_of: dict[str, int] = {}
    return [
        _class_of_line(line, number, line_of, path)
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1)
    ]


def _class_of_line(line: str, number: int, line_of: dict[str, int], path: Path) -> ClassNames:
    """line_of: where each name was met so far, by its normalised and its canonical spelling."""
    names = tuple(name.strip() for name in line.split(","))
    if not all(names):
        raise UserError(
            f'class file {path}: line {number} is "{line}": every line is a class, its names parted by ",", '
            "none of them blank"
        )
    for name in names:
        if "\t" in name:
            raise UserError(
                f"class file {path}: line {number} holds a tab: there are no columns: "
                'write names alone, a class a line, further names of it after ","'
            )
        if control := next((each for each in name if unicodedata.category(each) == "Cc"), None):
            raise UserError(
                f"class file {path}: line {number} holds the control character U+{ord(control):04X}: "
                "save it as plain text in UTF-8"
            )
        if not canonical(name):
            raise UserError(
                f'class file {path}: line {number}: "{name}" is nothing but punctuation, which prompts leave out: '
                "write its name in words"
            )
        spellings = (normalised(name), f"canonical {canonical(name)}")
        if earlier := next((line_of[each] for each in spellings if each in line_of), None):
            alike = "" if normalised(name) in line_of else f' (both are "{canonical(name)}" in prompts)'
            raise UserError(
                f'class file {path}: "{name}" is in line {earlier} and again in line {number}{alike}: '
                "a name belongs to one class, once"
            )
        line_of |= dict.fromkeys(spellings, number)
    return names


def canonical(text: str, *, keep: str = "") -> str:
    """As big_vision writes class names and templates in prompts: lower case, "_" a blank, no ASCII punctuation, every
    run of white space one blank, none at the ends. keep: a string that stays as it is, "{}" in a template.
    """
    parts = text.replace("_", " ").split(keep) if keep else [text.replace("_", " ")]
    bare = keep.join(part.translate(_NO_PUNCTUATION) for part in parts)
    return " ".join(bare.lower().split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


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
    """Raises UserError for no template, and for one that is neither a set's name nor has the place for a class name."""
    if problems := template_sets.problems(templates):
        raise UserError("\n".join(problems), told_by=0)
