"""Class folders, as ImageNet's: pictures alone, whose concept is what the names file calls their folder.

A names file is text, "n01440764 tench, Tinca tinca" in each line (blank or tab behind the folder's name, as ImageNet's
LOC_synset_mapping.txt), or JSON: {"n01440764": "tench, Tinca tinca"}, {"n01440764": ["tench", "Tinca tinca"]}, or
{"0": ["n01440764", "tench"]}, keras' imagenet_class_index.json. Several names are joined by ", ". Without a names file
the concept is the folder's name with blanks for _.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.sources import files as source_files
from data_prep.sources.columns import key_problem
from data_prep.sources.picture_folder import PictureFolder
from data_prep.sources.source import BLOCK_ROWS, Block, License, Sample
from data_prep.sources.tar_rows import PICTURES
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

LARGEST_NAMES = 64 << 20


@dataclass(frozen=True)
class ClassFolder:
    folder: str
    concept: str
    count: int
    names: bytes = field(repr=False)
    """Of its pictures, below the folder, sorted, NUL between them: ImageNet's fourteen million fit as bytes."""

    def pictures(self) -> list[str]:
        return os.fsdecode(self.names).split("\0")


@dataclass(frozen=True)
class Classes:
    """Class folders as a Source."""

    name: str
    place: str
    classes: tuple[ClassFolder, ...] = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)
    """file: the class; first: in it."""
    licenses: Mapping[str, License]

    def fingerprint(self) -> str:
        names = (f"{one.folder}/{picture}" for one in self.classes for picture in one.pictures())
        concepts = (f"{one.folder}\0{one.concept}" for one in self.classes)
        return source_files.fingerprint_of(["classes", *concepts, *PictureFolder(self.place).marks(names)])

    def read(self, block: Block) -> Iterator[Sample]:
        pictures = PictureFolder(self.place)
        one = self.classes[block.file]
        for number, name in enumerate(one.pictures()[block.first : block.first + block.rows], start=block.first):
            path = f"{one.folder}/{name}"
            image, problem = b"", key_problem(path)
            if not problem:
                try:
                    image = pictures.read(path)
                except ValueError as reason:
                    problem = str(reason)
            # With its suffix, for a.jpg and a.png may lie side by side. No key of a whole row has two slashes together.
            key = path if not key_problem(path) else f"{block.file}//{number}"
            shown = path.encode("utf-8", "backslashreplace").decode()
            yield Sample(key, image, (), concept=one.concept, problem=problem, place=places.join(self.place, shown))


def open_classes(place: str, *, names_file: str, name: str) -> Classes:
    """place: the folder of the class folders; pictures lie in them at any depth. names_file: see the module; "" none.

    Raises UserError where there are no class folders, a class has no name in the file, or its lines are broken.
    """
    if not places.is_remote(place) and not places.is_folder(place):
        raise UserError(f"--source classes:{place}: there is no such folder")
    found = _remote(place) if places.is_remote(place) else _local(place)
    if not found:
        raise UserError(
            f"--source classes:{place}: no folder in it holds pictures ({', '.join(PICTURES)}): name the folder "
            "whose folders are the classes"
        )
    concepts = read_names(names_file) if names_file else {one: one.replace("_", " ") for one in found}
    if missing := sorted(set(found) - set(concepts)):
        raise UserError(
            f"{names_file}: has no name for {missing[0]}"
            + (f" and {len(missing) - 1} other classes" if len(missing) > 1 else "")
            + f" of {place}: add a line such as: {missing[0]} tench, Tinca tinca"
        )
    classes = tuple(
        ClassFolder(one, concepts[one], len(files), os.fsencode("\0".join(sorted(files))))
        for one, files in sorted(found.items())
    )
    runs = source_files.block_runs((one.count for one in classes), BLOCK_ROWS)
    return Classes(name, place, classes, tuple(Block(*run) for run in runs), source_files.licenses_beside(place))


def _local(place: str) -> dict[str, list[str]]:
    """Names of pictures by class. Links to folders are an error: followed, they might lead anywhere."""
    root = str(places.local(place))
    found: dict[str, list[str]] = defaultdict(list)

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=refuse):
        for link in (os.path.join(folder, one) for one in folders):
            if os.path.islink(link):
                raise UserError(f"{link}: is a link to a folder, which is not followed: copy the folder, or remove it")
        inside = os.path.relpath(folder, root)
        if inside == ".":
            continue
        one, _, below = inside.partition(os.sep)
        prefix = f"{below}/" if below else ""
        found[one] += [prefix + name for name in names if _is_picture(name)]
    return {one: names for one, names in found.items() if names}


def _remote(place: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for path in PictureFolder(place).listing():
        one, slash, name = path.partition("/")
        if slash and one and _is_picture(name) and "\0" not in name:
            found[one].append(name)
    return dict(found)


def _is_picture(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base.rpartition(".")[2].lower() in PICTURES


def read_names(place: str) -> dict[str, str]:
    """Concept by folder. Raises UserError naming the line or key that is broken."""
    content = places.read_small(place, limit=LARGEST_NAMES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: is not UTF-8: {error}") from None
    names = _json_names(text, place) if text.lstrip().startswith(("{", "[")) else _line_names(text, place)
    if not names:
        raise UserError(f"{place}: holds no names; a line is like: n01440764 tench, Tinca tinca")
    return names


def _line_names(text: str, place: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        folder, *rest = re.split(r"\t|\s+", line.strip(), maxsplit=1)
        concept = _joined(rest[0].split(",")) if rest else ""
        if not concept:
            raise UserError(f"{place}, line {number}: {line[:60]!r} must be like: n01440764 tench, Tinca tinca")
        if names.get(folder, concept) != concept:
            raise UserError(f"{place}, line {number}: {folder} had another name before, {names[folder]!r}: keep one")
        names[folder] = concept
    return names


def _json_names(text: str, place: str) -> dict[str, str]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f'{place}: must be a JSON object such as {{"n01440764": ["tench", "Tinca tinca"]}}')
    indexed = document and all(_is_indexed(key, value) for key, value in document.items())
    pairs = [(value[0], value[1:]) for value in document.values()] if indexed else document.items()
    names = {}
    for folder, value in pairs:
        texts = value.split(",") if isinstance(value, str) else value
        concept = _joined(texts) if isinstance(texts, list) and all(isinstance(one, str) for one in texts) else ""
        if not concept:
            raise UserError(f"{place}: {str(folder)[:60]!r} must have a name or a list of names")
        names[folder] = concept
    return names


def _is_indexed(key: str, value: Any) -> bool:
    """Whether this is {"0": ["n01440764", "tench"]}: by number, the folder first."""
    texts = isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) for one in value)
    return key.isdigit() and texts and re.fullmatch(r"n\d{8}", value[0]) is not None


def _joined(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(" ".join(name.replace("_", " ").split()) for name in names if name.strip()))
