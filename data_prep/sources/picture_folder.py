"""Pictures below a folder, by names that strangers wrote: none leads out of it."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from limoe_dist.config.errors import UserError
from limoe_dist.data import places

LARGEST_PICTURE = 64 << 20
"""Bytes; no packed row may hold more, whatever a command's own limit."""


def file_below(base: Path, name: str) -> Path:
    """The file of a name below `base`, which is resolved.

    Raises ValueError with the reason where the name is absolute, climbs, a link leads out, or no plain file is there.
    """
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise ValueError("the path leaves the source folder: it must be relative and without ..")
    try:
        file = (base / relative).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise ValueError("there is no such file") from None
    if not file.is_relative_to(base):
        raise ValueError("the path leaves the source folder through a symbolic link")
    if not file.is_file():
        raise ValueError("is not a file")
    return file


class PictureFolder:
    """A folder or URL with pictures; can be pickled."""

    def __init__(self, place: str) -> None:
        self.place = place

    def read(self, name: str) -> bytes:
        """The picture's bytes. Raises ValueError with the reason to refuse it, UserError where the store fails."""
        if places.is_remote(self.place):
            content = self._read_remote(name)
        else:
            try:
                with file_below(self._base, name).open("rb") as file:
                    content = file.read(LARGEST_PICTURE + 1)
            except OSError as error:
                raise ValueError(f"cannot be read: {error.strerror or error}") from None
        if not content:
            raise ValueError("its picture is empty")
        if len(content) > LARGEST_PICTURE:
            raise ValueError(f"is larger than {LARGEST_PICTURE} bytes")
        return content

    def marks(self, names: Iterable[str]) -> Iterator[str]:
        """Of each name a text that changes where its file does; of a store, from one listing of the folder.

        A web server lists nothing: there the names alone count.
        """
        if self.place.startswith(("http://", "https://")):
            yield from names
            return
        if places.is_remote(self.place):
            listed = self.listing()
            yield from (f"{name}\0{listed.get(name, 'none')}" for name in names)
            return
        for name in names:
            try:
                found = (Path(self._base) / name).stat()
                yield f"{name}\0{found.st_size}\0{found.st_mtime_ns}"
            except (OSError, ValueError):
                yield f"{name}\0none"

    def listing(self) -> dict[str, str]:
        """Of a store's folder: names of all files below it, with what changes where they do."""
        fs, path = places.filesystem(self.place)
        with places.failures(self.place):
            found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
        head = len(path.rstrip("/")) + 1
        return {name[head:]: _mark(info) for name, info in sorted(found.items()) if len(name) > head}

    @cached_property
    def _base(self) -> Path:
        return places.local(self.place).resolve()

    def _read_remote(self, name: str) -> bytes:
        # Of an address over HTTP %2e%2e is made .. by those who ask for it.
        if name.startswith("/") or ".." in unquote(name).split("/") or "\0" in name or "://" in name:
            raise ValueError("the path leaves the source folder: it must be relative and without ..")
        fs, path = places.filesystem(self.place)
        try:
            with places.failures(self.place), fs.open(posixpath.join(path, name), "rb") as file:
                return bytes(file.read(LARGEST_PICTURE + 1))
        except UserError as error:
            # One row that is missing is that row's fault, a store that refuses to answer is everybody's.
            if isinstance(error.__context__, FileNotFoundError):
                raise ValueError("there is no such file") from None
            raise


def _mark(info: dict[str, Any]) -> str:
    mark = next((info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if info.get(key)), "")
    return f"{info.get('size')} {mark}"
