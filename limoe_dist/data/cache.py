"""Shards of a store, on this host: fetched ahead, kept within a limit, shared by the ranks.

    cache = ShardCache(folder, limit_bytes=100 * 10**9)
    cache.want(the next shards, in order)          # fetched by threads, while others are read
    with cache.local_path(url, bytes=..., sha256=...) as shard:
        read(shard.path)                           # stays there until it is released

A shard is known by its checksum: another set or run with the same shard shares it, a changed one never passes for it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.schema import Data
from limoe_dist.data import remote
from limoe_dist.data.cache_folder import POLL_S, CacheFolder, Evict, NoRoomError, disk_failures
from limoe_dist.data.fetchers import Fetchers, Wanted
from limoe_dist.data.file_locks import FileLock
from limoe_dist.data.remote import Patience, Stopped, UnreachableError

__all__ = ["CacheClosedError", "CacheCounts", "LocalShard", "ShardCache", "Wanted", "cache_folder", "open_cache"]

RESERVE_BYTES = 1 << 30
"""Left free on the cache's disk."""
ROOM_S = 30.0
"""Longest wait for other ranks to release what they read. Not longer: they may wait for this rank in turn."""
ROOM_POLL_S = 0.2
TELL_S = 60.0
"""After so long a wait for another process a warning tells of it."""


def cache_folder(data: Data) -> Path:
    """data.cache, or where that is empty this user's limoe-shards-UID in the folder for temporary files."""
    return Path(data.cache) if data.cache else Path(tempfile.gettempdir()) / f"limoe-shards-{os.getuid()}"


def open_cache(data: Data) -> ShardCache:
    """The cache of data.cache and data.cache_gb. Raises UserError where its folder cannot be used."""
    return ShardCache(cache_folder(data), limit_bytes=int(data.cache_gb * 1e9))


class CacheClosedError(Exception):
    """The cache was closed, or interrupted, while a shard was waited for."""


class LocalShard:
    """A whole shard on this host, that nobody removes before `release` (or the end of `with`)."""

    def __init__(self, held: FileLock, released: Callable[[], None]) -> None:
        self.path = held.path
        self._held, self._released = held, released

    def release(self) -> None:
        """A second call does nothing. What is mapped stays readable, but its room is given to other shards."""
        if not self._held.file.closed:
            self._held.release()
            self._released()

    def __enter__(self) -> LocalShard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True)
class CacheCounts:
    """Of this process."""

    hits: int = 0
    """Calls of local_path that found the shard there."""
    waits: int = 0
    """Calls that did not."""
    waited_s: float = 0.0
    """All that they waited."""
    fetched: int = 0
    """Shards, in the background or not."""
    fetched_bytes: int = 0


class ShardCache:
    """For any number of threads and processes of a host; each process makes its own. Not to be used across a fork."""

    def __init__(
        self,
        folder: Path,
        *,
        limit_bytes: int,
        retries: int = 5,
        fetchers: int = 2,
        patience: Patience | None = None,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        """limit_bytes: of everything in the folder. Raises UserError where the folder cannot be used.

        patience: with its own number of retries, in place of `retries`.
        """
        self._folder = CacheFolder(folder, limit_bytes=limit_bytes, reserve_bytes=reserve_bytes)
        self._patience = patience or Patience(retries=retries)
        self._num_fetchers, self._closed = fetchers, False
        self._begin()
        # Guards what follows.
        self._counting = threading.Lock()
        self._counts = CacheCounts()
        self._read_bytes = 0
        """Of the shards that this process holds; one that it holds twice counts twice."""

    def local_path(self, url: str, *, bytes: int, sha256: str) -> LocalShard:
        """The shard, when it is there whole; fetched by this thread where nobody does so already.

        Raises UserError where it cannot be had: missing, forbidden, changed, unreachable after the retries, or no room;
        also what stopped the fetcher that had begun with it. CacheClosedError after `close`, and amid `interrupted`.
        """
        wanted, start = Wanted(url, bytes, sha256), time.monotonic()
        with disk_failures(self._folder.path):
            held = self._folder.open_shard(sha256, bytes)
            if held is not None:
                self._count(hits=1)
            else:
                held = self._awaited(wanted, start)
                self._count(waits=1, waited_s=time.monotonic() - start)
            self._fetchers.fulfilled(wanted)
        self._reads(bytes)
        return LocalShard(held, lambda: self._released(bytes))

    def want(self, shards: Sequence[Wanted]) -> None:
        """The shards that are read next, in order: fetched in the background, as far as there is room.

        Replaces the wish before. What is wished for is removed only for what somebody reads now.
        """
        with disk_failures(self._folder.path):
            self._fetchers.want(shards)

    def close(self) -> None:
        """Ends the fetchers, also amid a shard, and whoever waits in local_path. A second call does nothing.

        Shards that are held stay so until their own release.
        """
        self._closed = True
        self._end()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """In the `with` it is as after `close`, so that who waits ends; after it others may read and wish anew.

        Nobody may begin to read before the `with` ends, but those whom it shall end.
        """
        self._end()
        try:
            yield
        finally:
            if not self._closed:
                self._begin()

    def _begin(self) -> None:
        """What was stopped stays so: a fetcher that hangs in a read ends by itself, whenever that comes back."""
        self._stopped = threading.Event()
        fetch = partial(self._fetch, self._stopped)
        self._fetchers = Fetchers(self._folder, fetch, num_threads=self._num_fetchers, stopped=self._stopped)

    def _end(self) -> None:
        self._stopped.set()
        self._fetchers.close()

    @property
    def counts(self) -> CacheCounts:
        return self._counts

    def _count(self, **more: float) -> None:
        with self._counting:
            old = self._counts
            self._counts = CacheCounts(
                hits=old.hits + int(more.get("hits", 0)),
                waits=old.waits + int(more.get("waits", 0)),
                waited_s=old.waited_s + more.get("waited_s", 0.0),
                fetched=old.fetched + int(more.get("fetched", 0)),
                fetched_bytes=old.fetched_bytes + int(more.get("fetched_bytes", 0)),
            )

    def _reads(self, more_bytes: int) -> None:
        with self._counting:
            self._read_bytes += more_bytes

    def _released(self, size_bytes: int) -> None:
        self._reads(-size_bytes)
        self._fetchers.wake()

    def _awaited(self, wanted: Wanted, start: float) -> FileLock:
        told = False
        while True:
            error = self._fetchers.failure(wanted)
            # A store that did not answer then may do so now.
            if error is not None and not isinstance(error, UnreachableError):
                raise error
            if held := self._fetched_now(wanted, start):
                return held
            if self._stopped.wait(POLL_S):
                raise CacheClosedError
            if not told and time.monotonic() - start > TELL_S:
                told = True
                warn(f"{wanted.url}: another process of this host fetches it, or has its room, since {TELL_S:g} s")

    def _fetched_now(self, wanted: Wanted, start: float) -> FileLock | None:
        """The shard; None where it is to be tried again: somebody fetches it, or has the room that it needs."""
        try:
            return self._fetch(self._stopped, wanted, "unused", lambda: None)
        except NoRoomError as full:
            by_others = full.in_use_bytes > self._read_bytes
            if not full.moving and not (by_others and time.monotonic() < start + ROOM_S):
                raise UserError(f"{wanted.url}: {full.text}") from None
            self._stopped.wait(ROOM_POLL_S)
            return None
        except Stopped:
            raise CacheClosedError from None

    def _fetch(
        self, stopped: threading.Event, wanted: Wanted, evict: Evict, has_room: Callable[[], None]
    ) -> FileLock | None:
        """The shard, locked; None where another thread or process fetches it now. Raises NoRoomError.

        has_room: called when its room is taken.
        """
        if stopped.is_set():
            raise Stopped
        right = self._folder.fetch_lock(wanted.sha256)
        if right is None:
            return None
        try:
            # Somebody may have had the right until now.
            if there := self._folder.open_shard(wanted.sha256, wanted.bytes):
                return there
            with self._folder.part(wanted.sha256, wanted.bytes, evict) as part:
                has_room()
                remote.fetch(
                    wanted.url,
                    part.file,
                    size_bytes=wanted.bytes,
                    sha256=wanted.sha256,
                    patience=self._patience,
                    stopped=stopped,
                )
                held = part.commit()
        finally:
            right.remove()
        self._count(fetched=1, fetched_bytes=wanted.bytes)
        return held
