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
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from data_prep.sources import files as source_files
from data_prep.sources.columns import Columns, key_problem, scores_of
from data_prep.sources.files import SOURCES_FILE, licenses_beside
from data_prep.sources.picture_folder import PictureFolder, file_below
from data_prep.sources.source import BLOCK_ROWS, Block, License, Sample
from limoe_dist.config.errors import UserError, nearest
from limoe_dist.data import places

__all__ = ["SOURCES_FILE", "Folder", "FolderSource", "License", "Row", "image_file", "open_folder", "read_folder"]

CAPTION_FILES = ("captions.jsonl", "captions.csv")
LARGEST_CAPTIONS_FILE = 1 << 30
"""Bytes of one that is read from a store."""


@dataclass(frozen=True)
class Row:
    folder: Path | str
    """Path, or the URL of a store."""
    image: str
    """Path as the captions file has it; not yet checked. Empty: the row is a text alone."""
    captions: tuple[str, ...]
    """None of them: the row is a picture alone."""
    concept: str
    source: str
    line: int
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of the columns that were asked for."""


@dataclass(frozen=True)
class Folder:
    path: Path | str
    captions_file: Path | str
    rows: tuple[Row, ...]
    """One for each image, and for each text alone, in the order of the file."""
    licenses: dict[str, License]
    """By source."""


def read_folder(given: Path | str, *, scores: Sequence[str] = ()) -> Folder:
    """Reads the captions of a folder, or of a captions file, whose folder then holds the pictures.

    given: a path, or the URL of a store; scores: columns with numbers to carry.
    Raises UserError naming the file and line where a row is no JSON, lacks a column or has one of another type.
    """
    remote = isinstance(given, str) and places.is_remote(given)
    captions_file = _remote_captions_file(str(given)) if remote else _captions_file(places.local(str(given)))
    path = captions_file.parent if isinstance(captions_file, Path) else places.parent(captions_file)
    joined: dict[str | int, Row] = {}
    for row in _rows(captions_file, path, scores):
        # Texts alone stay apart.
        name = row.image or row.line
        if earlier := joined.get(name):
            row = replace(earlier, captions=tuple(dict.fromkeys(earlier.captions + row.captions)))
        joined[name] = row
    if not joined:
        raise UserError(f"{captions_file}: has no rows")
    return Folder(path, captions_file, tuple(joined.values()), licenses_beside(str(path)))


def _captions_file(given: Path) -> Path:
    if given.is_file():
        if given.suffix not in (".jsonl", ".csv"):
            raise UserError(f"--source {given}: a captions file ends in .jsonl or .csv")
        return given
    if not given.is_dir():
        raise UserError(f"--source {given}: there is no such folder")
    return given / _only([name for name in CAPTION_FILES if (given / name).is_file()], given)


def _remote_captions_file(given: str) -> str:
    if given.partition("?")[0].endswith((".jsonl", ".csv")):
        return given
    return places.join(given, _only([name for name in CAPTION_FILES if places.exists(places.join(given, name))], given))


def _only(found: list[str], given: Path | str) -> str:
    if len(found) != 1:
        holds = " and ".join(CAPTION_FILES) if found else "neither " + " nor ".join(CAPTION_FILES)
        raise UserError(f"--source {given}: the folder holds {holds}: give one captions file")
    return found[0]


def _rows(captions_file: Path | str, folder: Path | str, scores: Sequence[str]) -> Iterator[Row]:
    is_json = str(captions_file).partition("?")[0].endswith(".jsonl")
    try:
        with _opened(captions_file, "utf-8" if is_json else "utf-8-sig") as file:
            for line, values in (_json_lines if is_json else _csv_lines)(file, captions_file):
                row = _row(values, folder, f"{captions_file}, line {line}", line)
                yield replace(row, scores=scores_of(values, scores)) if scores else row
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{captions_file}: cannot be read: {error}") from None


def _opened(captions_file: Path | str, encoding: str) -> TextIO:
    if isinstance(captions_file, Path):
        return captions_file.open(encoding=encoding, newline="")
    content = places.read_small(captions_file, limit=LARGEST_CAPTIONS_FILE)
    return io.TextIOWrapper(io.BytesIO(content), encoding=encoding, newline="")


def _json_lines(file: TextIO, captions_file: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{captions_file}, line {number}: is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{captions_file}, line {number}: must be a JSON object such as {_EXAMPLE}")
        yield number, values


def _csv_lines(file: TextIO, captions_file: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
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
    except (ValueError, RecursionError):
        raise UserError(f'{place}: captions={cell[:40]!r} must be a JSON list, or name the column "caption"') from None


_EXAMPLE = '{"image": "a.png", "captions": ["a red apple"]}'
_KEYS = ("image", "caption", "captions", "concept", "source")


def _row(values: dict[str, Any], folder: Path | str, place: str, line: int) -> Row:
    _check_halves(values, place)
    image = values.get("image") or ""
    captions = [values["caption"]] if "caption" in values else values.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f'{place}: "captions" must be a list of texts, "caption" one text')
    concept, source = values.get("concept") or "", values.get("source") or places.name_of(str(folder))
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


def image_file(row: Row) -> Path:
    """The picture's file. Raises ValueError with the reason where the path is absolute, climbs or a link leads out."""
    return file_below(places.local(str(row.folder)).resolve(), row.image)


@dataclass(frozen=True)
class FolderSource:
    """A Folder as a Source; its rows are in memory, without their pictures."""

    name: str
    folder: Folder = field(repr=False)
    keys: tuple[str, ...] = field(repr=False)
    """Of each row; empty where the row has none because an earlier one took it, or the path cannot be one."""
    blocks: tuple[Block, ...] = field(repr=False)
    licenses: Mapping[str, License]

    def fingerprint(self) -> str:
        base = str(self.folder.path)
        beside = (str(self.folder.captions_file), places.join(base, SOURCES_FILE))
        texts = [places.identity(place) if places.exists(place) else "none" for place in beside]
        marks = PictureFolder(base).marks(row.image for row in self.folder.rows if row.image)
        scores = (repr(sorted(row.scores)) for row in self.folder.rows[:1])
        return source_files.fingerprint_of(["folder", *texts, *scores, *marks])

    def read(self, block: Block) -> Iterator[Sample]:
        pictures = PictureFolder(str(self.folder.path))
        own = places.name_of(str(self.folder.path))
        for number in range(block.first, block.first + block.rows):
            row, key = self.folder.rows[number], self.keys[number]
            image, problem = b"", "" if key else _key_problem(row)
            if row.image and not problem:
                try:
                    image = pictures.read(row.image)
                except ValueError as reason:
                    problem = str(reason)
            yield Sample(
                # No key of a whole row begins with a slash.
                key or f"/{number}",
                image,
                row.captions,
                concept=row.concept,
                source="" if row.source == own else row.source,
                scores=row.scores,
                problem=problem,
                place=f"{self.folder.captions_file}, line {row.line}" + (f", {row.image}" if row.image else ""),
            )


def _keys(rows: Iterable[Row]) -> Iterator[str]:
    """The path without its suffix; with the suffix where that is taken; of a text alone its line."""
    taken: set[str] = set()
    for row in rows:
        if row.image:
            path = posixpath.normpath(row.image)
            wanted = (posixpath.splitext(path)[0], path)
        else:
            wanted = (f"line-{row.line}", f"text/line-{row.line}")
        key = "" if key_problem(wanted[1]) else next((key for key in wanted if key not in taken), "")
        taken.add(key)
        yield key


def _key_problem(row: Row) -> str:
    problem = key_problem(posixpath.normpath(row.image)) if row.image else ""
    if "leaves" in problem:
        return "the path leaves the source folder: it must be relative and without .."
    return problem or "its key is taken by an earlier row"


def open_folder(place: str, *, name: str, columns: Columns) -> FolderSource:
    """A folder, or a captions file, by path or URL. Raises UserError as `read_folder` does."""
    folder = read_folder(place, scores=columns.scores)
    licenses = dict(folder.licenses)
    if own := licenses.get(places.name_of(str(folder.path))):
        licenses.setdefault(name, own)
    runs = source_files.block_runs([len(folder.rows)], BLOCK_ROWS)
    return FolderSource(name, folder, tuple(_keys(folder.rows)), tuple(Block(*run) for run in runs), licenses)
