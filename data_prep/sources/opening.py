"""Sources from what a person writes: `KIND:PLACE[,name=NAME][,names=FILE][,images=FOLDER]`, or a PLACE alone.

PLACE is a path, a folder, a pattern (*, ?, [..], {00000..00099}) or a URL of fsspec. Without KIND it is recognised:

    manifest.json, or a folder that holds one            shards      packed by `limoe prep pack`
    captions.jsonl, captions.csv, or a folder with one   folder      pictures beside a captions file
    *.tar, or a folder of them                           webdataset  also what `limoe prep download` and img2dataset
                                                                     wrote, with their tables beside the tars
    *.parquet, or a folder of them                       parquet     with the pictures' bytes in a column
    *.json with images=FOLDER                            coco        captions JSON and its folder of pictures
    a folder with names=FILE                             classes     a folder of pictures for each class

Where two of them meet, or none, the error names the kinds to choose from.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources.columns import Columns
from data_prep.sources.source import Sample, Source
from limoe_dist.config.errors import UserError, nearest
from limoe_dist.data import places

__all__ = ["KINDS", "Columns", "full_key", "open_sources"]

KINDS = ("folder", "webdataset", "parquet", "coco", "classes", "shards")
OPTIONS = {"name": KINDS, "names": ("classes",), "images": ("coco",)}
"""What may follow a place behind commas, and for which kinds."""

USUAL = Columns()

Progress = Callable[[str, int, int], None]
"""Called with (what is read, how many are done, of how many) while tars and tables are numbered."""


@dataclass(frozen=True)
class Text:
    """What a person wrote, in its parts."""

    written: str
    kind: str
    """Empty: to be recognised."""
    place: str
    options: dict[str, str]


def open_sources(
    texts: Sequence[str | Path],
    columns: Columns = USUAL,
    *,
    index: Path | None = None,
    option: str = "--source",
    progress: Progress | None = None,
) -> list[Source]:
    """All sources, in the order of the texts; their names are unique.

    index: folder for what was learned about tars and tables, so that other processes and later runs need not read
    them again; it may be shared and deleted at any time.
    option: what errors call the setting.
    Raises UserError for texts that cannot be understood, places that are not there, and files that are broken.
    """
    sources = [_open(parse(str(text), option), columns, index, option, progress or _quiet) for text in texts]
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f'{option}: two sources are named "{twice[0]}", and keys begin with a source\'s name: '
            f"give one of them another, as in {texts[names.index(twice[0])]},name=other"
        )
    return sources


def full_key(source: Source, sample: Sample) -> str:
    """The key of a row everywhere: in shards, drop lists and reports."""
    return f"{source.name}/{sample.key}"


def parse(written: str, option: str = "--source") -> Text:
    """Splits a text into kind, place and options. A comma stays in the place unless `name=` or the like follows.

    Raises UserError for a kind or an option that is not known.
    """
    place, options = written, dict[str, str]()
    while match := re.fullmatch(r"(.+),([a-z]+)=([^,]*)", place, re.DOTALL):
        place, name, value = match.groups()
        if name not in OPTIONS or name in options or not value:
            why = "is given twice" if name in options else "is empty" if name in OPTIONS else "is not known"
            raise UserError(f"{option} {written}: {name}= {why}{nearest(name, OPTIONS)} (known: {', '.join(OPTIONS)})")
        options[name] = value
    kind, colon, rest = place.partition(":")
    if not colon or rest.startswith("//") or "/" in kind:
        kind, rest = "", place
    elif kind not in KINDS:
        raise UserError(f'{option} {written}: no kind is named "{kind}"{nearest(kind, KINDS)} (kinds: {_list(KINDS)})')
    if not rest:
        raise UserError(f"{option} {written}: names no place: write it as folder:PATH, webdataset:s3://bucket/tars")
    return Text(written, kind, rest, options)


def _open(text: Text, columns: Columns, index: Path | None, option: str, progress: Progress) -> Source:
    kind = text.kind or recognised(text, option)
    for name in text.options:
        if kind not in OPTIONS[name]:
            raise UserError(f"{option} {text.written}: {name}= is for {_list(OPTIONS[name])}, and this is {kind}")
    name = text.options.get("name") or _name_of(text.place, kind)
    if "/" in name or name in (".", "..") or not name.isprintable() or len(name) > 200:
        raise UserError(
            f"{option} {text.written}: {name!r} cannot be the source's name (it is printable, without /): "
            "give one behind the place, as in PLACE,name=birds"
        )
    # Imported when one is asked for: pyarrow and the like load only where they are needed.
    match kind:
        case "webdataset":
            from data_prep.sources.webdataset import open_webdataset

            return open_webdataset(text.place, name=name, columns=columns, index=index, progress=progress)
        case "parquet":
            from data_prep.sources.parquet import open_parquet

            return open_parquet(text.place, name=name, columns=columns, index=index, progress=progress)
        case "coco":
            from data_prep.sources.coco import open_coco

            return open_coco(text.place, images=text.options.get("images", ""), name=name)
        case "classes":
            from data_prep.sources.classes import open_classes

            return open_classes(text.place, names_file=text.options.get("names", ""), name=name)
        case "shards":
            from data_prep.sources.shards import open_shards

            return open_shards(text.place, name=name, columns=columns, index=index, progress=progress)
        case _:
            from data_prep.sources.folder import open_folder

            return open_folder(text.place, name=name, columns=columns)


def recognised(text: Text, option: str = "--source") -> str:
    """The kind of a place that is written without one. Raises UserError where none or several fit."""
    place = text.place
    bare = place.partition("?")[0] if "://" in place else place
    if "images" in text.options:
        return "coco"
    if "names" in text.options:
        return "classes"
    if posixpath.basename(bare) == "manifest.json":
        return "shards"
    for suffixes, kind in _SUFFIXES:
        if bare.endswith(suffixes):
            return kind
    if bare.endswith(".json"):
        raise UserError(f"{option} {text.written}: COCO's captions need their pictures: add ,images=FOLDER")
    if any(letter in bare for letter in "*?[{"):
        raise UserError(f"{option} {text.written}: a pattern ends in .tar or .parquet, or is written {_written()}")
    if not places.exists(place):
        raise UserError(f"{option} {text.written}: there is no such folder or file{_hint(place)}")
    if not places.is_folder(place):
        raise UserError(f"{option} {text.written}: its kind cannot be told from its name: write it {_written()}")
    return _kind_of_folder(text, option)


_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Recognised so that the error can say to unpack them."""
_SUFFIXES = (
    ((".tar", *_PACKED_TARS), "webdataset"),
    ((".parquet",), "parquet"),
    ((".jsonl", ".csv"), "folder"),
)


def _kind_of_folder(text: Text, option: str) -> str:
    fs, path = places.filesystem(text.place)
    with places.failures(text.place):
        names = {posixpath.basename(str(one).rstrip("/")) for one in fs.ls(path, detail=False)}
    tars = {posixpath.splitext(name)[0] for name in names if name.endswith(".tar")}
    packed = {name for name in names if name.endswith(_PACKED_TARS)}
    tables = {posixpath.splitext(name)[0] for name in names if name.endswith(".parquet")}
    # Downloaders leave a table of what they fetched beside each tar: the pictures are in the tars.
    if "download.json" in names or tables <= tars:
        tables = set()
    found = [
        kind
        for kind, there in (
            ("shards", "manifest.json" in names),
            ("folder", bool(names & {"captions.jsonl", "captions.csv"})),
            ("webdataset", bool(tars or packed) or "download.json" in names),
            ("parquet", bool(tables)),
        )
        if there
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{option} {text.written}: could be {' or '.join(found)}: say which, as in {found[0]}:{text.place}"
        )
    raise UserError(
        f"{option} {text.written}: the folder holds neither captions.jsonl nor captions.csv, and no manifest.json, "
        f"*.tar or *.parquet: for class folders write classes:{text.place}, for COCO coco:FILE.json,images={text.place}"
    )


def _name_of(place: str, kind: str) -> str:
    """Of a folder its name, of one file the name without its ending, of a pattern the name of its folder."""
    bare = place.partition("?")[0] if "://" in place and not any(c in place for c in "*[{") else place
    last = posixpath.basename(bare.rstrip("/"))
    if any(letter in last for letter in "*?[{") or last == "manifest.json":
        return _name_of(places.parent(bare), kind)
    if kind == "folder" and last.endswith((".jsonl", ".csv")):
        return places.name_of(places.parent(bare))
    if last.endswith((".tar", ".parquet", ".json")):
        return posixpath.splitext(last)[0]
    return places.name_of(bare)


def _hint(place: str) -> str:
    return "" if "/" in place else nearest(place.partition(":")[0], KINDS)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _written() -> str:
    return f"KIND:PLACE with one of {_list(KINDS)}"


def _quiet(what: str, done: int, of: int) -> None:
    pass
