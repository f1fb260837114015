"""The manifest that makes a directory a checkpoint: the checksum of every file and of itself. Needs no torch."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import sentences

FORMAT_VERSION = 2
NAME = "manifest.json"
STATE = "state.json"
BLOCK = 1 << 22
"""Bytes that are read or written at once: a checksum finds them in the processor's cache."""
MOST_BYTES = 1 << 28
"""Of a JSON file of a checkpoint: thousands of ranks need a hundredth of it."""
_PLAIN = re.compile(r"(?!\.+$)[\w.-]{1,200}", re.ASCII)


class Damaged(UserError):
    """A checkpoint that is not what was written: an older one may be whole."""


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int = Field(ge=0)
    xxh3: str
    """XXH3-128 of the whole file, in hexadecimal."""

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _PLAIN.fullmatch(name):
            raise ValueError("must be a plain file name inside the checkpoint")
        return name


class CheckpointManifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["limoe-checkpoint"] = "limoe-checkpoint"
    format_version: int = FORMAT_VERSION
    step: int = Field(ge=0)
    files: tuple[File, ...]

    @field_validator("files")
    @classmethod
    def _each_once(cls, files: tuple[File, ...]) -> tuple[File, ...]:
        names = [file.name for file in files]
        if STATE not in names or len(set(names)) < len(names):
            raise ValueError(f"must name {STATE}, and no file twice")
        return files

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files)


_BLANK = "0" * 32
"""In the place of the manifest's own checksum while that is taken."""


def encode(manifest: CheckpointManifest) -> bytes:
    """The text of manifest.json."""
    text = json.dumps({"xxh3": _BLANK} | manifest.model_dump(mode="json"), indent=1) + "\n"
    return text.replace(_BLANK, _checksum(text.encode()), 1).encode()


def _checksum(text: bytes) -> str:
    return str(xxhash.xxh3_128(text).hexdigest())


def read_manifest(folder: Path) -> CheckpointManifest:
    """Raises Damaged where the manifest is not as it was written, and UserError for a format of another version."""
    path = folder / NAME
    text = read_small(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise Damaged(f"{path} is not JSON: it was cut or changed after it was written") from None
    if not isinstance(content, dict) or content.get("format") != "limoe-checkpoint":
        raise Damaged(f"{path} is not the manifest of a checkpoint of limoe-dist")
    version = content.get("format_version")
    if not isinstance(version, int):
        raise Damaged(f"{path} was changed after it was written: it has no format_version")
    claimed = content.pop("xxh3", None)
    if isinstance(claimed, str) and len(claimed) == len(_BLANK) and claimed.isascii():
        if _checksum(text.replace(claimed.encode(), _BLANK.encode(), 1)) != claimed:
            raise Damaged(f"{path} was changed after it was written: its checksum differs")
    elif version == FORMAT_VERSION:
        raise Damaged(f"{path} was changed after it was written: it has no checksum")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder}: format_version={version}, but this version reads {FORMAT_VERSION}: "
            "use the limoe-dist that wrote it"
        )
    manifest = _parsed(path, content)
    if folder.name.startswith("step-") and folder.name != folder_name(manifest.step):
        raise Damaged(f"{path} is of step {manifest.step}: it was moved here from {folder_name(manifest.step)}")
    return manifest


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _parsed(path: Path, content: Any) -> CheckpointManifest:
    try:
        return CheckpointManifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise Damaged(f"{path}: {sentences(error, CheckpointManifest)[0]}") from None


def read_small(path: Path) -> bytes:
    """A JSON file of a checkpoint. Raises Damaged where it cannot be read, or is larger than any that was written."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise Damaged(f"{path} has {path.stat().st_size} bytes: no checkpoint has so many there")
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> UserError:
    """Damaged where a file, or what is in it, is gone; a plain UserError where that cannot be known now."""
    text = f"{path}: cannot be read: {error.strerror or error}"
    lost = error.errno in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
    return Damaged(text) if lost else UserError(f"{text}; it may be whole: mend that, and try again")


def verify(
    folder: Path, files: Iterable[File], *, threads: int = 4, progress: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """One sentence for each file that is missing, cut or changed. Files are read side by side.

    Raises UserError where the system does not let it read one that may be whole.
    progress: called with the bytes that were read since the last call, from any thread.
    """
    with ThreadPoolExecutor(threads) as pool:
        return [problem for problem in pool.map(lambda file: _problem(folder, file, progress), files) if problem]


def _problem(folder: Path, file: File, progress: Callable[[int], None]) -> str | None:
    path = folder / file.name
    try:
        # A pipe or a device in its place would never end.
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != file.bytes:
            return f"{path} has {path.stat().st_size} bytes, not {file.bytes}"
        digest, block = xxhash.xxh3_128(), memoryview(bytearray(min(BLOCK, file.bytes)))
        with path.open("rb", buffering=0) as stream:
            # The system reads farther ahead then.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := stream.readinto(block):
                digest.update(block[:count])
                progress(count)
    except OSError as error:
        problem = unreadable(path, error)
        if not isinstance(problem, Damaged):
            raise problem from None
        return str(problem)
    if digest.hexdigest() != file.xxh3:
        return f"{path} was changed after it was written: its checksum differs"
    return None
