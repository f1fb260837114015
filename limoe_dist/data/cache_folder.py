"""A folder of whole shards, named by their checksums, that never holds more than its limit; shared by processes.

SHA.arrow   a whole shard; who reads it holds a shared lock on it, who removes it an exclusive one
SHA.part    on its way, at its full size from the start, so that what it will take is counted at once
SHA.lock    held exclusively while SHA.part is written: one process of a host fetches a shard
SHA.want    held shared by who will read the shard soon: not removed for what is wanted later
room.lock   held while room is made and taken
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limoe_dist.config.errors import UserError
from limoe_dist.data.file_locks import FileLock, share, try_lock

SHA256 = re.compile("[0-9a-f]{64}")
POLL_S = 0.02
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Evict = Literal["unused", "unwanted"]
"""unused: whatever nobody reads, for a shard that is needed now. unwanted: not what somebody will read, either."""


class NoRoomError(Exception):
    """There is no room for a shard, even without all that may be removed."""

    def __init__(self, text: str, *, moving: bool, in_use_bytes: int) -> None:
        super().__init__(text)
        self.text, self.moving, self.in_use_bytes = text, moving, in_use_bytes
        """moving: another shard is on its way, and may be removed when it is there. in_use_bytes: of what is read."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    size_bytes: int
    used_ns: int
    """Time of the last use; its mtime, that we set."""

    @property
    def sha256(self) -> str:
        return self.path.stem


class CacheFolder:
    def __init__(self, folder: Path, *, limit_bytes: int, reserve_bytes: int) -> None:
        """Makes the folder, and tries a lock there. Raises UserError where it cannot be used.

        reserve_bytes: of its disk, always left free.
        """
        self.path, self.limit_bytes, self.reserve_bytes = folder, limit_bytes, reserve_bytes
        with disk_failures(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = folder.stat().st_uid
            if owner != os.geteuid() and not _root_may_use(folder):
                # In a folder of everybody's, like /tmp, somebody could lay out shards of his own for us to read.
                raise UserError(
                    f"{folder}: belongs to another user (uid {owner}): give a folder of your own as data.cache"
                )
            self._lock_room().release()

    def shard(self, sha256: str) -> Path:
        return self.path / f"{sha256}.arrow"

    def open_shard(self, sha256: str, size_bytes: int) -> FileLock | None:
        """A shared lock on the whole shard, which counts as used now; None where it is not here, or not whole."""
        while True:
            try:
                held = try_lock(self.shard(sha256), "shared", create=False)
            except FileNotFoundError:
                return None
            if held is None:
                time.sleep(POLL_S)  # somebody looks whether it may be removed: he decides at once
                continue
            if held.size_bytes == size_bytes:
                os.utime(held.file.fileno())
                return held
            held.release()
            return None

    def fetch_lock(self, sha256: str) -> FileLock | None:
        """The right to fetch the shard, to be given back by `remove`; None while somebody else has it."""
        return try_lock(self.path / f"{sha256}.lock", "exclusive", create=True)

    def want(self, sha256: str) -> FileLock:
        while (held := try_lock(self._want_path(sha256), "shared", create=True)) is None:
            time.sleep(POLL_S)
        return held

    def unwant(self, held: FileLock) -> None:
        path = held.path
        held.release()
        with suppress(FileNotFoundError):
            if last := try_lock(path, "exclusive", create=False):
                last.remove()

    @contextmanager
    def part(self, sha256: str, size_bytes: int, evict: Evict) -> Iterator[Part]:
        """A file for the shard, whose room is taken; removed unless it was committed. For who has the fetch lock.

        Raises NoRoomError.
        """
        part = Part(self._take_room(sha256, size_bytes, evict), self.shard(sha256), self._lock_room)
        try:
            yield part
        finally:
            part.close()

    def _take_room(self, sha256: str, size_bytes: int, evict: Evict) -> Path:
        """The new file, at its full size."""
        path = self.path / f"{sha256}.part"
        with self._lock_room():
            path.unlink(missing_ok=True)  # of a process that died
            freed = 0
            while True:
                self._make_room(size_bytes, evict, at_least=freed)
                try:
                    _allocate(path, size_bytes)
                    return path
                except OSError as error:
                    path.unlink(missing_ok=True)
                    if error.errno not in FULL:
                        raise
                # The disk gives less than it said (quotas, others who write): more has to go.
                freed = size_bytes

    def _make_room(self, size_bytes: int, evict: Evict, *, at_least: int) -> None:
        """Removes the shards that were used least recently, as many as are needed: none where all are too few."""
        entries, others, moving = self._entries()
        used = sum(entry.size_bytes for entry in entries) + others
        disk = os.statvfs(self.path)
        free = disk.f_bavail * disk.f_frsize - self.reserve_bytes
        short = max(used + size_bytes - self.limit_bytes, size_bytes - free, at_least)
        held: list[FileLock] = []
        try:
            for lock in self._removable(entries, evict) if short > 0 else ():
                held.append(lock)
                short -= lock.size_bytes
                if short <= 0:
                    break
            if short > 0:
                beyond_limit = used + size_bytes - self.limit_bytes
                in_use = used - others - sum(lock.size_bytes for lock in held)
                if at_least or size_bytes - free > beyond_limit:
                    text = self._disk_full(size_bytes)
                else:
                    text = self._too_small(in_use, others, size_bytes)
                raise NoRoomError(text, moving=moving and size_bytes <= self.limit_bytes, in_use_bytes=in_use)
            for lock in held:
                lock.remove()
        finally:
            for lock in held:
                lock.release()

    def _entries(self) -> tuple[list[_Entry], int, bool]:
        """Whole shards, bytes of all else, and whether shards are on their way. Removes those of dead processes."""
        entries, others, moving = [], 0, False
        for found in list(os.scandir(self.path)):
            with suppress(FileNotFoundError):
                status = found.stat(follow_symlinks=False)
                path, name = Path(found.path), found.name.partition(".")
                if name[2] == "part" and SHA256.fullmatch(name[0]):
                    if self._is_stale(path):
                        path.unlink()
                        continue
                    moving = True
                if name[2] == "arrow" and SHA256.fullmatch(name[0]) and found.is_file(follow_symlinks=False):
                    entries.append(_Entry(path, status.st_size, status.st_mtime_ns))
                else:
                    others += status.st_size if not found.is_dir(follow_symlinks=False) else 0
        return entries, others, moving

    def _is_stale(self, part: Path) -> bool:
        held = self.fetch_lock(part.stem)
        if held is not None:
            held.remove()
        return held is not None

    def _removable(self, entries: Iterable[_Entry], evict: Evict) -> Iterator[FileLock]:
        """Exclusive locks on what nobody reads: least recently used first, then what is wanted, latest first."""
        wanted = []
        for entry in sorted(entries, key=lambda entry: entry.used_ns):
            if self._is_wanted(entry.sha256):
                wanted.append(entry)
            elif lock := _unused(entry):
                yield lock
        if evict == "unused":
            for entry in reversed(wanted):
                if lock := _unused(entry):
                    yield lock

    def _is_wanted(self, sha256: str) -> bool:
        try:
            held = try_lock(self._want_path(sha256), "exclusive", create=False)
        except FileNotFoundError:
            return False
        if held is not None:
            held.remove()
        return held is None

    def _want_path(self, sha256: str) -> Path:
        return self.path / f"{sha256}.want"

    def _lock_room(self) -> FileLock:
        while (held := try_lock(self.path / "room.lock", "exclusive", create=True)) is None:
            time.sleep(POLL_S)
        return held

    def _too_small(self, in_use: int, others: int, size_bytes: int) -> str:
        foreign = f" and {others} bytes are of other files" if others else ""
        return (
            f"data.cache_gb={self.limit_bytes / 1e9:g} is too small for a shard of {size_bytes} bytes: the ranks of "
            f"this host are reading shards of {in_use} bytes in {self.path}{foreign}: set data.cache_gb to at least "
            f"{math.ceil((in_use + others + size_bytes) / 1e6) / 1e3:g}, or lower data.window_rows"
        )

    def _disk_full(self, size_bytes: int) -> str:
        return (
            f"{self.path}: its disk has no room for a shard of {size_bytes} bytes beside {self.reserve_bytes} that "
            "stay free, and nothing more can be removed from the cache: free some, or give another folder as data.cache"
        )


class Part:
    """A shard on its way. `file` is written from its beginning."""

    def __init__(self, path: Path, shard: Path, lock_room: Callable[[], FileLock]) -> None:
        self.path, self._shard, self._lock_room = path, shard, lock_room
        self.file = path.open("r+b", buffering=0)

    def commit(self) -> FileLock:
        """Gives the file the shard's name; a shared lock on it, held from before it had it."""
        # Else a host that loses power may keep the name and the size without the bytes.
        os.fsync(self.file.fileno())
        os.utime(self.file.fileno())
        held = share(self._shard, os.dup(self.file.fileno()))
        try:
            # Who counts must not meet the file under both names, or under none.
            with self._lock_room():
                os.replace(self.path, self._shard)
        except BaseException:
            held.release()
            raise
        return held

    def close(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


def _root_may_use(folder: Path) -> bool:
    """Root may use somebody's folder that was given to it, but no name in /tmp that anybody could have taken first."""
    return os.geteuid() == 0 and not folder.resolve().parent.stat().st_mode & stat.S_IWOTH


def _allocate(path: Path, size_bytes: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def _unused(entry: _Entry) -> FileLock | None:
    try:
        return try_lock(entry.path, "exclusive", create=False)
    except FileNotFoundError:
        return None


@contextmanager
def disk_failures(folder: Path) -> Iterator[None]:
    """Turns what the cache's disk raises into a UserError that names the folder and the setting."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        if error.errno in FULL:
            fix = "free some room on its disk, or give another folder as data.cache"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            fix = "each shard that is read is an open file: raise the limit (ulimit -n), or lower data.window_rows"
        elif error.errno in NO_LOCKS:
            fix = "its file system may know no locks (flock): give a folder on a local disk as data.cache"
        else:
            fix = "give a folder that can be written as data.cache"
        raise UserError(f"{folder}: cannot be used as the cache of shards: {text}: {fix}") from None
