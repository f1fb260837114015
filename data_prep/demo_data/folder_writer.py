"""Writes a folder source, as data_prep.sources.folder reads it: pictures, sources.json, and captions.jsonl last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically


@dataclass(frozen=True)
class Picture:
    image: str
    """Path below the split's folder."""
    captions: tuple[str, ...]
    concept: str
    source: str


@dataclass(frozen=True)
class SourceNote:
    name: str
    """As in Picture.source."""
    version: str
    license: str
    """SPDX identifier."""
    attribution: str


def prepare_folder(folder: Path, made_from: dict[str, Any]) -> None:
    """Makes a folder for pictures; those that an earlier run made from something else are removed.

    Raises UserError for a folder with files that no earlier run made: they may be somebody's only copy.
    """
    stamp = folder.with_name(f".{folder.name}.json")
    text = json.dumps(made_from, sort_keys=True)
    if folder.exists() and not stamp.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: was not made by this command, which would replace it: give another --out")
    if folder.is_dir() and stamp.is_file() and stamp.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(stamp, text)
    folder.mkdir(exist_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes beside the path and renames: a picture is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_source(folder: Path, pictures: Iterable[Picture], notes: Iterable[SourceNote]) -> None:
    """sources.json, then captions.jsonl: a folder source is there when its captions are."""
    write_atomically(folder / "sources.json", json.dumps([asdict(note) for note in notes], indent=2) + "\n")
    rows = (json.dumps(asdict(picture), ensure_ascii=False) for picture in pictures)
    write_atomically(folder / "captions.jsonl", "".join(f"{row}\n" for row in rows))
