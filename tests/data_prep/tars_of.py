"""Tars for the tests of sources, well made and hostile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

END = b"\0" * 1024


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_bytes(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """Headers and contents as they are given, without the end mark."""
    parts = []
    for info, content in members:
        parts += [info.tobuf(kind, "utf-8", "surrogateescape"), content, b"\0" * (-len(content) % 512)]
    return b"".join(parts)


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar as Python's own library writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file
