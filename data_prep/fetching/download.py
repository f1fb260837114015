"""`limoe prep download`: from a list of addresses to tars of pictures and a ledger of every row.

One event loop asks (fetch.py), one thread reads the list ahead, one writes (landing.py). At most
`OPEN_PARTS` parts are open at a time, so that the slow last rows of one part do not hold up the next; what is in memory
is their rows, and bodies up to a budget.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from data_prep.fetching.budget import Budget
from data_prep.fetching.download_folder import no_room
from data_prep.fetching.download_state import Opened, Part, Progress, Settings
from data_prep.fetching.fetch import Answer, Crowded, Fetcher
from data_prep.fetching.fetch_errors import CLASSES, Failed
from data_prep.fetching.hosts import Hosts, Job
from data_prep.fetching.landing import Arrival, Landing, Written
from data_prep.fetching.part_file import PartFile
from data_prep.fetching.web_address import host_of, literal_refusal, parse_url
from data_prep.sources.url_list import Row

OPEN_PARTS = 4
TICK_S = 0.05
FIRST_RETRY_S = 1.0
BACKED_OFF = "host_backed_off"


class Download:
    """One run. `stop` may be called at any time on its loop: it ends with what is fetched by then."""

    def __init__(self, out: Path, parts: Iterator[Part], settings: Settings) -> None:
        self.progress = Progress()
        self.stopped_by = 0
        """The signal that ended it; 0: none."""
        self._out, self._parts, self._settings = out, parts, settings
        self._hosts = Hosts(per_host=settings.per_host, patience_s=settings.patience_s)
        self._budget = Budget(settings.memory_bytes)
        self._idle: list[asyncio.Future[None]] = []
        self._open_parts = 0
        self._unlanded = 0
        """Rows of open parts that have not been handed to the landing."""
        self._all_fed = False
        self._problem: BaseException | None = None

    async def run(self) -> None:
        """Raises UserError where the list cannot be read, a part is another's, or the disk is full."""
        loop = asyncio.get_running_loop()
        self._loop, self._over = loop, asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError, RuntimeError):  # not in the main thread
                loop.add_signal_handler(number, self.stop, number)
        self._landing = Landing(
            max_pixels=self._settings.max_pixels,
            told=lambda written: self._call(self._on_written, written),
            failed=lambda error: self._call(self._on_problem, error),
        )
        try:
            await self._fetch_all()
        finally:
            # In a thread: batches on their way call back into this loop.
            await asyncio.to_thread(self._landing.close)
            await asyncio.sleep(0)
            for number in (signal.SIGINT, signal.SIGTERM):
                with suppress(ValueError, RuntimeError):
                    loop.remove_signal_handler(number)
        if isinstance(self._problem, OSError):
            raise no_room(self._problem, self._out) from None
        if self._problem is not None:
            raise self._problem

    def stop(self, number: int = 0) -> None:
        self.stopped_by = self.stopped_by or number
        self._over.set()

    def _call(self, function, value) -> None:  # type: ignore[no-untyped-def]
        self._loop.call_soon_threadsafe(function, value)

    async def _fetch_all(self) -> None:
        settings = self._settings
        reader = ThreadPoolExecutor(1, thread_name_prefix="list")
        async with Fetcher(
            settings.limits, settings.policy, self._budget, settings.connections, settings.lookup
        ) as fetcher:
            tasks = [asyncio.create_task(self._worker(fetcher)) for _ in range(settings.connections)]
            tasks += [asyncio.create_task(self._feed(reader)), asyncio.create_task(self._tick())]
            for task in tasks:
                task.add_done_callback(self._on_task_done)
            await self._over.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # A part that is being opened now is opened to its end, and closed.
        reader.shutdown(wait=True)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._on_problem(error)

    def _on_problem(self, error: BaseException) -> None:
        self._problem = self._problem or error
        self._over.set()

    def _on_written(self, written: Written) -> None:
        self._budget.give(written.held)
        self.progress.errors.update(written.errors)
        self.progress.bytes += written.bytes
        self.progress.parts += written.closed
        self._open_parts -= written.closed
        if self._all_fed and not self._open_parts:
            self._over.set()

    # The list

    async def _feed(self, reader: ThreadPoolExecutor) -> None:
        """Opens part after part while there is little to ask for, or nothing that may be, and few are open."""
        ahead = self._loop.run_in_executor(reader, self._open_next)
        while (opened := await _finished(ahead)) is not None:
            ahead = self._loop.run_in_executor(reader, self._open_next)
            try:
                while self._open_parts >= OPEN_PARTS or (self._open_parts and self._busy):
                    await asyncio.sleep(TICK_S)
            except asyncio.CancelledError:
                opened.file.close()
                _close_later(ahead)
                raise
            self._take_up(opened)
        self._all_fed = True
        if not self._open_parts:
            self._over.set()

    @property
    def _busy(self) -> bool:
        """Whether there is enough to ask for. Rows of a host that has its share wait, and are no work for others."""
        return not self._idle and self._hosts.waiting >= 4 * self._settings.connections

    def _take_up(self, opened: Opened) -> None:
        self._open_parts += 1
        self.progress.before += opened.before
        self._landing.open(opened.file, len(opened.jobs) + len(opened.refused))
        for arrival in opened.refused:
            self._landing.put(arrival)
        for job in opened.jobs:
            self._hosts.offer(job)
        self._wake_all()

    def _open_next(self) -> Opened | None:
        """The next part with rows to fetch, or to close; None: there is no further one. On the reader's thread."""
        for part in self._parts:
            file = PartFile(self._out, part.stem, replaced=part.replaced)
            if file.whole:
                file.close()
                continue
            opened = Opened(file, [], [], len(file.done))
            for key, row in part.rows:
                if key in file.done:
                    continue
                job = self._job(part.stem, key, row)
                if isinstance(job, Job):
                    opened.jobs.append(job)
                else:
                    opened.refused.append(job)
            return opened
        return None

    def _job(self, stem: str, key: str, row: Row) -> Job | Arrival:
        try:
            url = parse_url(row.url)
            if why := literal_refusal(url, self._settings.policy):
                raise Failed("private_address", why)
        except Failed as failed:
            return Arrival(stem, row, key, failed.kind, str(failed), 0, "", 0, 0.0, b"", 0)
        return Job(row, key, url.with_fragment(None), host_of(url), stem)

    # The network

    async def _worker(self, fetcher: Fetcher) -> None:
        while True:
            job = await self._next()
            began = self._loop.time()
            job.tries += 1
            self.progress.active += 1
            try:
                answer = await fetcher.fetch(job.url, job.reserve)
            except Crowded as crowded:
                job.tries, job.reserve = job.tries - 1, crowded.needs
                self._hosts.done(job, self._loop.time(), began=began, error="", retry_after_s=None)
                self._hosts.offer(job)
                continue
            finally:
                self.progress.active -= 1
            self._came(job, answer, began)

    async def _next(self) -> Job:
        while (job := self._hosts.next(self._loop.time())) is None:
            future = self._loop.create_future()
            self._idle.append(future)
            await future
        return job

    def _came(self, job: Job, answer: Answer, began: float) -> None:
        now = self._loop.time()
        self._hosts.done(job, now, began=began, error=answer.error, retry_after_s=answer.retry_after_s)
        if answer.error and job.tries <= min(CLASSES[answer.error].retries, self._settings.retries):
            self._hosts.offer_later(job, now + FIRST_RETRY_S * 2 ** (job.tries - 1))
            return
        self._land(job, answer, now - began)

    def _land(self, job: Job, answer: Answer, seconds: float) -> None:
        self._landing.put(
            Arrival(
                job.part,
                job.row,
                job.key,
                answer.error,
                answer.message,
                answer.http_status,
                answer.final_url,
                job.tries,
                seconds,
                answer.body,
                answer.held,
            )
        )

    async def _tick(self) -> None:
        """Wakes workers when a wait is over, and gives up hosts that want to be left alone for too long."""
        looked = 0.0
        while True:
            await asyncio.sleep(TICK_S)
            now = self._loop.time()
            if (wake := self._hosts.wake()) is not None and wake <= now:
                self._wake_all()
            if now - looked >= 1.0:
                looked = now
                for job in self._hosts.given_up(now):
                    self._land(job, Answer(error=BACKED_OFF, message=f"{job.host} is left alone"), 0.0)

    def _wake_all(self) -> None:
        idle, self._idle = self._idle, []
        for future in idle:
            if not future.done():
                future.set_result(None)


async def _finished(ahead: asyncio.Future[Opened | None]) -> Opened | None:
    """The part that is being opened; where this is cancelled meanwhile, the part is closed when it is open."""
    try:
        return await asyncio.shield(ahead)
    except asyncio.CancelledError:
        _close_later(ahead)
        raise


def _close_later(ahead: asyncio.Future[Opened | None]) -> None:
    def close(done: asyncio.Future[Opened | None]) -> None:
        if not done.cancelled() and not done.exception() and (opened := done.result()):
            opened.file.close()

    ahead.add_done_callback(close)
