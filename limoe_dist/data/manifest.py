"""manifest.json: what a folder of Arrow shards holds, and the proof that it still does. Needs no torch, no DALI."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import parse_model, parse_text, write_atomically
from limoe_dist.data.places import is_remote, join, local, read_small

SCHEMA_VERSION = 1
COLUMNS = ("key", "image", "captions", "concept", "width", "height", "sha256", "source")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _plain_name(name: str) -> str:
    if name != Path(name).name or name in ("", ".", "..") or len(name) > 200:
        raise ValueError("must be a plain file name inside the manifest's folder")
    return name


class Shard(_Part):
    file: str
    """Plain name of an Arrow IPC file beside the manifest."""
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str
    """Of the whole file, in hexadecimal."""

    _file = field_validator("file")(_plain_name)


class Source(_Part):
    name: str
    """As in the column `source`."""
    rows: int = Field(ge=0)
    license: str
    """SPDX identifier, or "unknown"."""
    attribution: str = ""
    """Whom to name, and where the pictures come from."""


class Tokenizer(_Part):
    file: str
    """Plain name of a SentencePiece model beside the manifest."""
    sha256: str
    vocab_size: int = Field(ge=1)

    _file = field_validator("file")(_plain_name)


class Manifest(_Part):
    format: Literal["limoe-arrow"] = "limoe-arrow"
    schema_version: int = SCHEMA_VERSION
    name: str = ""
    rows: int = Field(ge=1)
    shards: tuple[Shard, ...]
    sources: tuple[Source, ...] = ()
    tokenizer: Tokenizer | None = None
    """The vocabulary that `limoe prep tokenizer` trained from these captions."""
    without_caption: int | None = Field(default=None, ge=0)
    """Rows that are a picture alone; None: packed before this was counted."""
    without_picture: int | None = Field(default=None, ge=0)
    """Rows that are text alone; None: packed before this was counted."""
    made_with: dict[str, str] = {}
    """Versions of the programs that decide the shards' bytes: encoders, decoders, Arrow; {} where none were noted."""
    settings: dict[str, Any] = {}
    """Of `limoe prep pack`: what the rows went through; no paths. {} where none were noted."""

    @property
    def pairs(self) -> int | None:
        """Rows with a picture and a caption, which training needs; None where the manifest does not tell."""
        if self.without_caption is None or self.without_picture is None:
            return None
        return self.rows - self.without_caption - self.without_picture


def manifest_place(given: Path | str) -> str:
    """Path or URL of manifest.json, which may be given by its folder."""
    text = str(given)
    if is_remote(text):
        return text if text.partition("?")[0].endswith(".json") else join(text, "manifest.json")
    path = local(text)
    return str(path / "manifest.json" if path.is_dir() else path)


def load_manifest(given: Path | str) -> Manifest:
    """Reads a manifest, from a path or a URL, and checks that its shards exist with their sizes.

    Shards from a URL are looked at when they are fetched. Checksums: `verify_shards`.
    Raises UserError where the file is no manifest, is of another schema, or a shard is missing or of another size.
    """
    place = manifest_place(given)
    manifest = (
        parse_text(Manifest, read_small(place), place=place)
        if is_remote(place)
        else parse_model(Manifest, local(place))
    )
    if manifest.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{place}: schema_version={manifest.schema_version}, but this version reads {SCHEMA_VERSION}: "
            "pack the shards again with `limoe prep pack`"
        )
    counts = Counter(shard.file for shard in manifest.shards)
    if twice := [file for file, count in counts.items() if count > 1]:
        raise UserError(f"{place}: shard {twice[0]} is listed twice, so its rows would be read twice: pack again")
    if sum(shard.rows for shard in manifest.shards) != manifest.rows:
        raise UserError(f"{place}: rows={manifest.rows}, but its shards hold {sum(s.rows for s in manifest.shards)}")
    if (manifest.pairs or 0) < 0:
        raise UserError(
            f"{place}: without_caption={manifest.without_caption} and without_picture={manifest.without_picture} are "
            f"together more than rows={manifest.rows}: pack again"
        )
    if not is_remote(place):
        _check_sizes(manifest, local(place))
    return manifest


def _check_sizes(manifest: Manifest, path: Path) -> None:
    for shard in manifest.shards:
        file = path.parent / shard.file
        if not file.is_file():
            raise UserError(f"{path}: shard {shard.file} is missing: pack again, or copy the whole folder")
        if file.stat().st_size != shard.bytes:
            raise UserError(f"{file}: {file.stat().st_size} bytes, but {path.name} says {shard.bytes}: pack again")


def save_manifest(manifest: Manifest, path: Path) -> None:
    write_atomically(path, manifest.model_dump_json(indent=2) + "\n")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shards(manifest: Manifest, folder: Path | str, *, rank: int = 0, world: int = 1) -> None:
    """Compares the checksum of every `world`-th shard, from the `rank`-th on: together the ranks read each once.

    Shards from a URL are compared when they are fetched, not here. Raises UserError naming the first that differs.
    """
    for shard in () if is_remote(str(folder)) else manifest.shards[rank::world]:
        file = Path(folder) / shard.file
        if sha256_of(file) != shard.sha256:
            raise UserError(
                f"{file}: its checksum is not the one in the manifest: "
                "the shard was changed after packing; pack again or copy it again"
            )
