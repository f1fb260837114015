"""A store that may fall silent: the process that keeps it stands still, or its host is cut off."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Asked:
    """A connection to a store of its own, for one thread; another one can see for how long it waits for an answer.

    torch's own limit of a request holds for `get` alone: a `check` waits without end.
    """

    def __init__(self, store: dist.Store, clock: Callable[[], float] = time.monotonic) -> None:
        # One that is shared is locked while the main thread waits for an answer.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self._clock = clock
        self._since: float | None = None

    def waits_s(self) -> float:
        """Seconds since the request that has no answer yet; 0 where there is none."""
        since = self._since
        return 0.0 if since is None else self._clock() - since

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(lambda: self._store.check(list(keys)))

    def get(self, key: str) -> bytes:
        return self._ask(lambda: self._store.get(key))

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def set_first(self, key: str, value: str) -> bytes:
        """Sets what is not there yet; returns what is there then."""
        return self._ask(lambda: self._store.compare_set(key, "", value))

    def _ask(self, request: Callable[[], T]) -> T:
        self._since = self._clock()
        try:
            return request()
        finally:
            self._since = None
