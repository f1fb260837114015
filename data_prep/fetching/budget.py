"""Bytes of bodies that may be in memory at a time."""

from __future__ import annotations

import asyncio
from collections import deque


class Budget:
    """First come, first served. Nothing that holds bytes ever waits for more, so nothing waits in a circle."""

    def __init__(self, total: int) -> None:
        self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Waits until `size` bytes are free and all that came before have theirs; size: at most the total."""
        if not self._waiting and size <= self.free:
            self.free -= size
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, future))
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give(size)
            raise

    def try_take(self, size: int) -> bool:
        """As `take` where it need not wait."""
        if self._waiting or size > self.free:
            return False
        self.free -= size
        return True

    def give(self, size: int) -> None:
        self.free += size
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self.free):
            wanted, future = self._waiting.popleft()
            if not future.done():
                self.free -= wanted
                future.set_result(None)
