"""The manifest that makes a directory a checkpoint: written last, with the checksum of every file, and fsynced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, field_validator

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import parse_model

FORMAT_VERSION = 1
NAME = "manifest.json"


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int = Field(ge=0)
    xxh3: str
    """XXH3-128 of the whole file, in hexadecimal."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if name != Path(name).name or name in ("", ".", ".."):
            raise ValueError("must be a plain file name inside the checkpoint")
        return name


class CheckpointManifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["limoe-checkpoint"] = "limoe-checkpoint"
    format_version: int = FORMAT_VERSION
    step: int = Field(ge=0)
    files: tuple[File, ...]


def describe(path: Path) -> File:
    """The entry of a written file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return File(name=path.name, bytes=path.stat().st_size, xxh3=digest.hexdigest())


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, folder / NAME)
    sync(folder)
    sync(folder.parent)


def read_manifest(folder: Path) -> CheckpointManifest:
    """Raises UserError where the directory is no checkpoint, or of a format that this version does not read."""
    manifest = parse_model(CheckpointManifest, folder / NAME)
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{folder}: format_version={manifest.format_version}, but this version reads {FORMAT_VERSION}: "
            "use the limoe-dist that wrote it"
        )
    return manifest


def verify(folder: Path, files: tuple[File, ...]) -> list[str]:
    """One sentence for each file that is missing, cut or changed."""
    problems = []
    for file in files:
        path = folder / file.name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != file.bytes:
            problems.append(f"{path} has {path.stat().st_size} bytes, not {file.bytes}")
        elif describe(path).xxh3 != file.xxh3:
            problems.append(f"{path} was changed after it was written: its checksum differs")
    return problems
