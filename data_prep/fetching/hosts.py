"""Which row is asked for next: at most so many of a host at a time, none while the host wants to be left alone.

Plain bookkeeping: the time comes in as an argument.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from yarl import URL

from data_prep.fetching.fetch_errors import CLASSES
from data_prep.sources.url_list import Row

FIRST_WAIT_S = 1.0
TOLERATED = 8
"""Failures of a host in a row before it is left alone; one that limits us is left alone at once."""
LARGEST_MEMORY = 100_000
"""Hosts whose failures are remembered while none of their rows is at hand."""


@dataclass(slots=True)
class Job:
    row: Row
    key: str
    url: URL
    host: str
    part: str
    tries: int = 0
    reserve: int = 0
    """Bytes that are set aside before it is asked for; 0: a guess."""


@dataclass(slots=True)
class _Host:
    name: str
    waiting: deque[Job] = field(default_factory=deque)
    active: int = 0
    failures: int = 0
    waits: int = 0
    """Times that it has been left alone, since it last answered well."""
    until: float = 0.0
    """When it may be asked again."""
    since: float = 0.0
    """When that was decided: what was asked before and fails after says nothing new."""
    queued: bool = False
    """It is among the ready, or comes back to them when its wait is over."""


class Hosts:
    """All rows that wait, by host. patience_s: where a host is to be left alone for longer, its rows are given up."""

    def __init__(self, *, per_host: int, patience_s: float) -> None:
        self._per_host, self._patience_s = per_host, patience_s
        self._hosts: dict[str, _Host] = {}
        self._ready: deque[_Host] = deque()
        self._later: list[tuple[float, int, Job | _Host]] = []
        self._resting: dict[str, _Host] = {}
        self._counter = 0
        self.waiting = 0
        """Rows that are not being asked for at the moment."""

    def offer(self, job: Job) -> None:
        host = self._hosts.get(job.host)
        if host is None:
            host = self._hosts[job.host] = _Host(job.host)
        host.waiting.append(job)
        self.waiting += 1
        self._make_ready(host)

    def offer_later(self, job: Job, at: float) -> None:
        self.waiting += 1
        self._push(at, job)

    def next(self, now: float) -> Job | None:
        """A row to ask for now, which counts for its host until `done`; None: none before `wake`."""
        self._ripen(now)
        while self._ready:
            host = self._ready.popleft()
            if host.until > now:
                self._push(host.until, host)
                continue
            host.queued = False
            if not host.waiting or host.active >= self._per_host:
                continue
            job = host.waiting.popleft()
            host.active += 1
            self.waiting -= 1
            self._make_ready(host)
            return job
        return None

    def wake(self) -> float | None:
        """When `next` may have more than now; None: not before a row is done or offered."""
        return self._later[0][0] if self._later else None

    def done(self, job: Job, now: float, *, began: float, error: str, retry_after_s: float | None) -> None:
        """A row's try has ended. retry_after_s: what the host asked for; None where it did not ask to be left alone."""
        host = self._hosts[job.host]
        host.active -= 1
        limited = retry_after_s is not None or error == "rate_limited"
        if not limited and not (error in CLASSES and CLASSES[error].of_host):
            host.failures = host.waits = 0
        elif began >= host.since:
            host.failures += 1
            if limited or host.failures >= TOLERATED:
                wait = max(retry_after_s or 0.0, FIRST_WAIT_S * 2**host.waits)
                host.until, host.since = now + wait, now
                host.waits += 1
                self._resting[host.name] = host
        self._make_ready(host)
        idle = not host.active and not host.waiting and host.until <= now
        if idle and (not host.failures or len(self._hosts) > LARGEST_MEMORY):
            # Millions of hosts come once.
            del self._hosts[job.host]

    def given_up(self, now: float) -> Iterator[Job]:
        """Takes out the rows of hosts that are to be left alone for longer than is waited."""
        self._resting = {name: host for name, host in self._resting.items() if host.until > now}
        for host in self._resting.values():
            if host.until - now <= self._patience_s:
                continue
            self.waiting -= len(host.waiting)
            jobs, host.waiting = host.waiting, deque()
            yield from jobs

    def _make_ready(self, host: _Host) -> None:
        if host.waiting and host.active < self._per_host and not host.queued:
            host.queued = True
            self._ready.append(host)

    def _ripen(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            _, _, what = heapq.heappop(self._later)
            if isinstance(what, _Host):
                what.queued = False
                self._make_ready(what)
            else:
                self.waiting -= 1
                self.offer(what)

    def _push(self, at: float, what: Job | _Host) -> None:
        self._counter += 1
        heapq.heappush(self._later, (at, self._counter, what))
