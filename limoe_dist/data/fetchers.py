"""Threads that fetch shards before they are asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from limoe_dist.config.errors import UserError
from limoe_dist.data.cache_folder import SHA256, CacheFolder, Evict, NoRoomError, disk_failures
from limoe_dist.data.file_locks import FileLock
from limoe_dist.data.remote import Stopped

REST_S = 0.5
"""Between two looks of a fetcher whether there is room again, or whether another process has fetched."""
END_S = 5.0
"""Longest wait for the end of a fetcher."""


@dataclass(frozen=True)
class Wanted:
    """A shard as its manifest names it. Raises UserError for a checksum that is none: it becomes a file name."""

    url: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not SHA256.fullmatch(self.sha256):
            raise UserError(
                f"{self.url}: sha256={self.sha256[:80]!r} in the manifest is no SHA-256 in 64 lower-case hexadecimal "
                "digits: the manifest is damaged, pack again"
            )


class Fetchers:
    """Work through a list of wishes, in its order. For any thread."""

    def __init__(
        self,
        folder: CacheFolder,
        fetch: Callable[[Wanted, Evict, Callable[[], None]], FileLock | None],
        *,
        num_threads: int,
        stopped: threading.Event,
    ) -> None:
        """fetch: the shard, locked; None where somebody else is at it. Calls its last argument once it has room.
        Raises NoRoomError, and Stopped once `stopped` is set. The threads start with the first wish.
        """
        self._folder, self._fetch, self._num_threads, self._stopped = folder, fetch, num_threads, stopped
        self._threads: list[threading.Thread] = []
        # Guards what follows, and the threads.
        self._changed = threading.Condition()
        self._pending: list[Wanted] = []
        """Wished for and not there yet, in order."""
        self._running: dict[str, bool] = {}
        """What a thread is at, and whether it has its room."""
        self._held: dict[str, FileLock] = {}
        """Keeps what is wished for and there from being removed for what others wish for."""
        self._failed: dict[str, BaseException] = {}
        self._rest_until: dict[str, float] = {}

    def want(self, shards: Sequence[Wanted]) -> None:
        """Replaces the wishes. A shard that is being fetched is fetched to its end."""
        with self._changed:
            if self._stopped.is_set():
                return
            names = {shard.sha256 for shard in shards}
            self._pending = list({shard.sha256: shard for shard in shards}.values())
            self._failed = {name: error for name, error in self._failed.items() if name in names}
            gone = [self._held.pop(name) for name in list(self._held) if name not in names]
            while shards and len(self._threads) < self._num_threads:
                thread = threading.Thread(target=self._work, name=f"limoe-shards-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self.wake()
        for held in gone:
            self._folder.unwant(held)

    def wake(self) -> None:
        """There may be room now."""
        with self._changed:
            self._rest_until.clear()
            self._changed.notify_all()

    def failure(self, wanted: Wanted) -> BaseException | None:
        """What stopped the thread that had begun with the shard; it is told once."""
        with self._changed:
            return self._failed.pop(wanted.sha256, None)

    def fulfilled(self, wanted: Wanted) -> None:
        """Somebody reads the shard, and holds it himself."""
        with self._changed:
            self._pending = [one for one in self._pending if one.sha256 != wanted.sha256]
            self._failed.pop(wanted.sha256, None)
            held = self._held.pop(wanted.sha256, None)
        if held is not None:
            self._folder.unwant(held)

    def close(self) -> None:
        """Waits for the threads, after `stopped` was set."""
        self.wake()
        for thread in self._threads:
            # A file system without coroutines may hang in a read: its thread, a daemon, ends with the process.
            thread.join(timeout=END_S)
        with self._changed:
            held, self._held = list(self._held.values()), {}
        for one in held:
            self._folder.unwant(one)

    def _work(self) -> None:
        while (wanted := self._next()) is not None:
            there = False
            error: BaseException | None = None
            try:
                with disk_failures(self._folder.path):
                    there = self._fetch_ahead(wanted)
            except Stopped:
                return
            except BaseException as caught:  # whatever it is, it belongs to the thread that will ask for the shard
                error = caught
            with self._changed:
                self._running.pop(wanted.sha256)
                if error is not None and wanted in self._pending:
                    self._failed[wanted.sha256] = error
                if there or error is not None:
                    self._pending = [one for one in self._pending if one != wanted]
                self._changed.notify_all()

    def _next(self) -> Wanted | None:
        """The first wish that no thread is at; None at the end."""
        with self._changed:
            while not self._stopped.is_set():
                now = time.monotonic()
                for wanted in self._pending:
                    has_room = self._running.get(wanted.sha256)
                    if has_room is False:
                        break  # a later one might take it
                    if has_room is None and self._rest_until.get(wanted.sha256, 0.0) <= now:
                        self._running[wanted.sha256] = False
                        return wanted
                self._changed.wait(REST_S if self._pending else None)
        return None

    def _fetch_ahead(self, wanted: Wanted) -> bool:
        """Whether the shard is there now; else it rests for a while."""
        # Before the shard is there: else it might go again at once, for what another process wishes for.
        wish, kept = self._folder.want(wanted.sha256), False
        try:
            there = self._folder.open_shard(wanted.sha256, wanted.bytes) or self._fetch(
                wanted, "unwanted", lambda: self._has_room(wanted)
            )
            if there is None:
                self._rest(wanted)
                return False
            there.release()
            with self._changed:
                if wanted in self._pending and wanted.sha256 not in self._held and not self._stopped.is_set():
                    self._held[wanted.sha256], kept = wish, True
            return True
        except NoRoomError:
            self._rest(wanted, and_later=True)
            return False
        finally:
            if not kept:
                self._folder.unwant(wish)

    def _has_room(self, wanted: Wanted) -> None:
        with self._changed:
            self._running[wanted.sha256] = True
            self._changed.notify_all()

    def _rest(self, wanted: Wanted, *, and_later: bool = False) -> None:
        """and_later: what is wished for later would only take the room that this one waits for."""
        with self._changed:
            index = self._pending.index(wanted) if wanted in self._pending else len(self._pending)
            for one in [wanted, *(self._pending[index:] if and_later else [])]:
                self._rest_until[one.sha256] = time.monotonic() + REST_S
