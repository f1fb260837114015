"""Processes for a command's work: they leave Ctrl-C to the one who started them, and never outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def worker_pool(workers: int, start: Callable[..., None] | None = None, *given: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers are ended with the block, whatever they are doing: what they write must bear that.

    start: called in each worker with `given`, before its first work.
    """
    # A fresh interpreter for each: a fork would copy locks that threads of Arrow, fsspec or the display hold.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (start, given))
    try:
        yield pool
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _begin(start: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    # Ctrl-C reaches all processes of a terminal: the parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*given)


def _end_with_parent() -> None:
    """A parent that was killed can end nobody: without this its workers would wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
