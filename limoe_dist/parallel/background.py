"""Long work on files in a thread, while the ranks that have none, or are done, wait for one another in short votes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import torch

from limoe_dist.parallel.collectives import vote
from limoe_dist.parallel.mesh import Axis

T = TypeVar("T")
PATIENCE_S = 5.0
"""A collective has a time limit (parallel.timeout_s), a slow disk has none: so many seconds lie between two votes."""


class Job(threading.Thread, Generic[T]):
    """One function in a thread; a person who stops for good does not wait for it."""

    def __init__(self, function: Callable[[], T], name: str) -> None:
        super().__init__(name=f"limoe-{name}", daemon=True)
        self.function = function
        self.error: BaseException | None = None
        self._result: T | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self.function()
        except BaseException as error:  # it belongs to the thread that asks for the result
            self.error = error
        finally:
            # What it holds goes while somebody still waits for this thread. Later, the thread might be the last to hold
            # a process group, and would end the whole process with "terminate called": the interpreter may be gone.
            del self.function

    def result(self) -> T:
        """What the function returned, or raised. Call it when the thread has ended."""
        if self.error is not None:
            raise self.error
        return cast(T, self._result)


def patiently(function: Callable[[], T], axis: Axis, device: torch.device) -> T:
    """Calls a function that may take longer on some ranks than a collective may wait. A collective."""
    job = Job(function, "read")
    working = 1
    while working:
        job.join(PATIENCE_S)
        (working,) = vote(axis, device, int(job.is_alive()))
    return job.result()
