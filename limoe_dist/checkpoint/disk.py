"""Every operation on files that a save makes: one function for each point at which it can be killed, or fail.

Tests put their own functions in the place of these, to kill and to fail a save at each of them in turn.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

from limoe_dist.checkpoint.manifest import File


def make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def create(path: Path) -> int:
    """A descriptor of a new file. Raises FileExistsError where there is one: two writers must not share a file."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)


def write(descriptor: int, data: memoryview) -> int:
    """How many bytes were written: fewer than given where the disk becomes full, or at a size that the system sets."""
    return os.write(descriptor, data)


def sync(descriptor: int) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Tells what a file system noticed late, as NFS does."""
    os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def remove(*folders: Path) -> None:
    """Nothing happens where one is gone already."""
    for folder in folders:
        with suppress(FileNotFoundError):
            # Somebody may have moved a checkpoint to a larger disk, and left a link.
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def write_file(path: Path, blocks: Iterable[memoryview]) -> File:
    """Writes a new file until it is on the disk; its entry for the manifest, from the bytes as they were handed in.

    A checksum of what is in memory also catches what goes wrong on the way to the disk. Raises OSError.
    """
    digest, size = xxhash.xxh3_128(), 0
    try:
        descriptor = create(path)
        try:
            for block in blocks:
                digest.update(block)
                begin, size = size, size + len(block)
                while len(block):
                    block = block[write(descriptor, block) :]
                # The disk begins at once with what nobody wants in memory: writing takes as long as the slower of both.
                os.posix_fadvise(descriptor, begin, size - begin, os.POSIX_FADV_DONTNEED)
            sync(descriptor)
            # Read back, it comes from the disk.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except BaseException:
            os.close(descriptor)
            raise
        close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return File(name=path.name, bytes=size, xxh3=digest.hexdigest())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
