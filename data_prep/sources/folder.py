"""A folder source: pictures beside `captions.jsonl` or `captions.csv`.

Each row has `image` (a path below the folder), `caption` (one) or `captions` (several; in CSV a JSON list), and may
have `concept` and `source`. Rows of one image are joined.

A row without captions is a picture alone, as of a class folder: {"image": "a.png", "concept": "owl"}. A row without
`image` is a text alone: {"caption": "an owl"}. Evaluation reads both, training needs pairs. `"captions": []` and
`"image": null` say the same; a row that has other keys of its own has to say it so, for one of them might be a
misspelled `caption`. In CSV, a file without the column, or an empty cell of `captions` or `image`.
 `sources.json` may name licences: a list of objects with
`name`, `license` and `attribution`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limoe_dist.config.errors import UserError, nearest

CAPTION_FILES = ("captions.jsonl", "captions.csv")
SOURCES_FILE = "sources.json"


@dataclass(frozen=True)
class Row:
    folder: Path
    image: str
    """Path as the captions file has it; not yet checked. Empty: the row is a text alone."""
    captions: tuple[str, ...]
    """None of them: the row is a picture alone."""
    concept: str
    source: str
    line: int


@dataclass(frozen=True)
class License:
    license: str
    attribution: str


@dataclass(frozen=True)
class Folder:
    path: Path
    captions_file: Path
    rows: tuple[Row, ...]
    """One for each image, and for each text alone, in the order of the file."""
    licenses: dict[str, License]
    """By source."""


def read_folder(given: Path) -> Folder:
    """Reads the captions of a folder, or of a captions file, whose folder then holds the pictures.

    Raises UserError naming the file and line where a row is no JSON, lacks a column or has one of another type.
    """
    captions_file = _captions_file(given)
    path = captions_file.parent
    joined: dict[str | int, Row] = {}
    for row in _rows(captions_file, path):
        # Texts alone stay apart.
        name = row.image or row.line
        if earlier := joined.get(name):
            row = replace(earlier, captions=tuple(dict.fromkeys(earlier.captions + row.captions)))
        joined[name] = row
    if not joined:
        raise UserError(f"{captions_file}: has no rows")
    return Folder(path, captions_file, tuple(joined.values()), _licenses(path / SOURCES_FILE))


def _captions_file(given: Path) -> Path:
    if given.is_file():
        if given.suffix not in (".jsonl", ".csv"):
            raise UserError(f"--source {given}: a captions file ends in .jsonl or .csv")
        return given
    if not given.is_dir():
        raise UserError(f"--source {given}: there is no such folder")
    found = [given / name for name in CAPTION_FILES if (given / name).is_file()]
    if len(found) != 1:
        holds = " and ".join(CAPTION_FILES) if found else "neither " + " nor ".join(CAPTION_FILES)
        raise UserError(f"--source {given}: the folder holds {holds}: give one captions file")
    return found[0]


def _rows(captions_file: Path, folder: Path) -> Iterator[Row]:
    read = _json_lines if captions_file.suffix == ".jsonl" else _csv_lines
    try:
        for line, values in read(captions_file):
            yield _row(values, folder, f"{captions_file}, line {line}", line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{captions_file}: cannot be read: {error}") from None


def _json_lines(captions_file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with captions_file.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except ValueError as error:
                raise UserError(f"{captions_file}, line {number}: is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise UserError(f"{captions_file}, line {number}: must be a JSON object such as {_EXAMPLE}")
            yield number, values


def _csv_lines(captions_file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with captions_file.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise UserError(f"{captions_file}, line {reader.line_num}: has not as many cells as the header")
                row: dict[str, Any] = dict(values)
                # A file may have both columns, of which each row fills one.
                if row.get("captions") == "" and row.get("caption"):
                    del row["captions"]
                if row.get("caption") == "":
                    del row["caption"]
                    row.setdefault("captions", "")
                if "captions" in row:
                    place = f"{captions_file}, line {reader.line_num}"
                    row["captions"] = _json_list(row["captions"], place) if row["captions"] else []
                if row.get("image") == "":
                    row["image"] = None
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{captions_file}, line {reader.line_num}: is not CSV: {error}") from None


def _json_list(cell: str, place: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        raise UserError(f'{place}: captions={cell[:40]!r} must be a JSON list, or name the column "caption"') from None


_EXAMPLE = '{"image": "a.png", "captions": ["a red apple"]}'
_KEYS = ("image", "caption", "captions", "concept", "source")


def _row(values: dict[str, Any], folder: Path, place: str, line: int) -> Row:
    _check_halves(values, place)
    image = values.get("image") or ""
    captions = [values["caption"]] if "caption" in values else values.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f'{place}: "captions" must be a list of texts, "caption" one text')
    concept, source = values.get("concept") or "", values.get("source") or folder.resolve().name
    if not isinstance(concept, str) or not isinstance(source, str):
        raise UserError(f'{place}: "concept" and "source" must be texts')
    return Row(folder, image, tuple(" ".join(caption.split()) for caption in captions), concept, source, line)


def _check_halves(values: dict[str, Any], place: str) -> None:
    """Raises UserError for a row with neither picture nor text, and for one that may lack either by a typing error."""
    image = values.get("image")
    if image == "" or not isinstance(image, str | None):
        raise UserError(f'{place}: "image" must be a path; a row is like {_EXAMPLE}')
    if "caption" in values and "captions" in values:
        raise UserError(f'{place}: needs either "caption" or "captions", not both; a row is like {_EXAMPLE}')
    lacks_text = "caption" not in values and not values.get("captions")
    if image is None and lacks_text:
        raise UserError(f"{place}: has neither a picture nor a caption; a row is like {_EXAMPLE}")
    unknown = [key for key in values if key not in _KEYS]
    for lacks, half, explicit in (
        ("image" not in values, '"image"', '"image": null'),
        (lacks_text and "captions" not in values, '"caption" and "captions"', '"captions": []'),
    ):
        if lacks and unknown:
            raise UserError(
                f'{place}: has no {half}, but "{unknown[0]}"{nearest(unknown[0], _KEYS)}; a row is like {_EXAMPLE}, '
                f"and one that lacks this half on purpose says {explicit} (in CSV: an empty cell)"
            )


def _licenses(file: Path) -> dict[str, License]:
    if not file.is_file():
        return {}
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        return {one["name"]: License(str(one["license"]), str(one.get("attribution", ""))) for one in listed}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{file}: must be a list of objects with "name" and "license": {error!r}') from None


def image_file(row: Row) -> Path:
    """The picture's file. Raises ValueError with the reason where the path is absolute, climbs or a link leads out."""
    relative = Path(row.image)
    if relative.is_absolute() or ".." in relative.parts or "\0" in row.image:
        raise ValueError("the path leaves the source folder: it must be relative and without ..")
    base = row.folder.resolve()
    try:
        file = (base / relative).resolve(strict=True)
    except (OSError, RuntimeError):
        raise ValueError("there is no such file") from None
    if not file.is_relative_to(base):
        raise ValueError("the path leaves the source folder through a symbolic link")
    if not file.is_file():
        raise ValueError("is not a file")
    return file
