"""Locks between the processes of a host: flock on a file. The kernel drops them with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Literal

Kind = Literal["shared", "exclusive"]


class FileLock:
    """A lock that is held, until `release` or until the object goes."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        # A file object rather than a number: it is closed where nobody releases it.
        self.file = os.fdopen(fd, "r+b", buffering=0)

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def release(self) -> None:
        """A second call does nothing."""
        self.file.close()

    def remove(self) -> None:
        """Releases and removes the file. Of an exclusive lock alone: others would go on with a file without a name."""
        self.path.unlink(missing_ok=True)
        self.release()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def try_lock(path: Path, kind: Kind, *, create: bool) -> FileLock | None:
    """The lock on the file that has this name now; None where somebody else holds one that forbids it.

    create: makes the file where it is missing. Raises FileNotFoundError where it may not, OSError of the disk.
    """
    operation = (fcntl.LOCK_SH if kind == "shared" else fcntl.LOCK_EX) | fcntl.LOCK_NB
    # O_NOFOLLOW: a link that somebody put there would lead us to write elsewhere.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    while True:
        fd = os.open(path, flags, 0o600)
        try:
            fcntl.flock(fd, operation)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        # Between open and flock the file may have been removed or replaced: a lock on the old one protects nothing.
        if _is_named(path, fd):
            return FileLock(path, fd)
        os.close(fd)


def share(path: Path, fd: int) -> FileLock:
    """A shared lock on a file that is open and that nobody else has opened yet. Owns `fd` from now on."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return FileLock(path, fd)


def _is_named(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False
