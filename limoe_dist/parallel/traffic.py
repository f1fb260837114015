"""What crosses ranks, counted; how long this rank waits for it; and what this rank is in now, for when ranks hang."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from limoe_dist.parallel.mesh import Axis

PAIRS = 256
"""Markers of so many calls are kept before those that the device has passed are summed."""


@dataclass(frozen=True)
class Volume:
    """What one kind of collective moved over one axis since the last reset."""

    calls: int
    num_bytes: int
    """Of the full buffers: an all-gather's output, a reduce-scatter's or all-to-all's input, an all-reduce's tensor."""


@dataclass(frozen=True)
class Standing:
    """What this rank is in, or was in last."""

    inside: bool
    op: str
    axis: str
    num_bytes: int
    number: int
    """Counts the calls of this rank from 1; ranks that do the same work have the same numbers."""
    seconds: float
    """Since it went in, or since it left."""
    thread: int | None
    """The thread that went in; None where it has left."""


class Marker(Protocol):
    """A place in a device's queue of work, as a CUDA event is one."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def elapsed_time(self, later: Any, /) -> float:
        """Milliseconds of the device from here to a later marker; both are passed."""


class Traffic:
    """One per mesh. `with axis.traffic.call("all_reduce", axis, num_bytes):` goes around every collective.

    mark: on a device that works off a queue a collective returns before it is done; this gives a marker in the queue,
    and the rank counts as inside until the device has passed it.
    Cheap, and read by another thread without a lock: each assignment is one.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, mark: Callable[[], Marker] | None = None
    ) -> None:
        self._clock, self._mark = clock, mark
        self._volumes: dict[tuple[str, str], list[int]] = {}
        self._number = 0
        self._inside: Call | None = None
        self._last: Call | None = None
        self._queued: tuple[Call, Marker] | None = None
        self._broken: BaseException | None = None
        self._waited_s = 0.0
        self._pairs: deque[tuple[Marker, Marker]] = deque()

    def call(self, op: str, axis: Axis, num_bytes: int) -> Call:
        """Counts a collective; the rank is in it inside a `with` of what comes back.

        For an asynchronous one: call before the launch, and `with` around the wait.
        """
        volume = self._volumes.setdefault((op, axis.name), [0, 0])
        volume[0] += 1
        volume[1] += num_bytes
        self._number += 1
        return Call(self, op, axis.name, num_bytes, self._number)

    def counts(self) -> dict[tuple[str, str], Volume]:
        """By (op, name of the axis), since the last reset."""
        return {key: Volume(calls, num_bytes) for key, (calls, num_bytes) in self._volumes.items()}

    def reset(self) -> None:
        """Forgets the counts; the number of the calls goes on."""
        self._volumes.clear()

    def take_waited(self) -> float:
        """Seconds that this rank was inside of collectives since the last call, of whatever thread.

        On a device with a queue: of the device, in the calls that it has passed; the rest comes with the next call.
        Collectives that do not go through `call`, as DeepSpeed's own, count as work.
        """
        self._sum_passed()
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def _sum_passed(self) -> None:
        while self._pairs and self._pairs[0][1].query():
            begin, end = self._pairs.popleft()
            self._waited_s += begin.elapsed_time(end) / 1000

    def standing(self) -> Standing | None:
        """What this rank is in, or was in last; None before the first call."""
        if (call := self._inside) is not None:
            return call.standing(self._clock(), inside=True)
        if (queued := self._queued) is not None and not queued[1].query():
            return queued[0].standing(self._clock(), inside=True)
        return None if (call := self._last) is None else call.standing(self._clock(), inside=False)

    def broke_with(self, error: BaseException) -> bool:
        """Whether the error, or what it came from, was raised inside a collective."""
        found: BaseException | None = error
        while found is not None:
            if found is self._broken:
                return True
            found = found.__cause__ or found.__context__
        return False

    def enter(self, call: Call) -> None:
        call.since, call.thread = self._clock(), threading.get_ident()
        if self._mark is not None:
            call.begin = self._mark()
        self._inside = call

    def leave(self, call: Call, error: BaseException | None) -> None:
        call.left = self._clock()
        self._last, self._inside = call, None
        if error is not None:
            self._broken = error
        elif self._mark is None:
            self._waited_s += call.left - call.since
        else:
            self._behind(call, self._mark())

    def _behind(self, call: Call, end: Marker) -> None:
        """The device gets to the call later, and is through it at `end`."""
        if self._queued is None or self._queued[1].query():
            self._queued = (call, end)
        assert call.begin is not None
        self._pairs.append((call.begin, end))
        if len(self._pairs) > PAIRS:
            self._sum_passed()


class Call:
    """One collective; a context manager for the time that this rank is in it."""

    __slots__ = ("_axis", "_num_bytes", "_number", "_op", "_traffic", "begin", "left", "since", "thread")

    def __init__(self, traffic: Traffic, op: str, axis: str, num_bytes: int, number: int) -> None:
        self._traffic = traffic
        self._op, self._axis, self._num_bytes, self._number = op, axis, num_bytes, number
        self.since, self.left = 0.0, 0.0
        self.thread = 0
        self.begin: Marker | None = None

    def __enter__(self) -> Call:
        self._traffic.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._traffic.leave(self, error)

    def standing(self, now: float, *, inside: bool) -> Standing:
        since, thread = (self.since, self.thread) if inside else (self.left, None)
        return Standing(inside, self._op, self._axis, self._num_bytes, self._number, now - since, thread)
