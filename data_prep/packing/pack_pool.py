"""Groups done one behind the other or by a pool of processes, with their progress shown."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.packing.group import Work, pack_group
from data_prep.worker_pool import worker_pool
from limoe_dist.config.errors import UserError

LINE_EVERY_S = 30.0
"""Between two lines of progress, where nobody looks at a terminal."""
LOOK_EVERY_S = 0.5


def run_groups(work: Work, groups: Sequence[int], *, workers: int, console: Console) -> None:
    """Does the groups, in any order. workers: processes; one group, or one worker, needs no pool.

    Raises UserError of the first group that fails; the others that have begun are given up, and nothing of them counts.
    """
    rows = int(work.plan.group_rows[list(groups)].sum())
    with progress(rows, console) as tell:
        if min(workers, len(groups)) <= 1:
            for group in groups:
                pack_group(work, group, tell)
        else:
            _run_pool(work, groups, min(workers, len(groups)), tell)


def _run_pool(work: Work, groups: Sequence[int], workers: int, tell: Callable[[int], None]) -> None:
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    try:
        with worker_pool(workers, _start_worker, work, counter) as pool:
            waiting: set[Future[None]] = {pool.submit(_do, group) for group in groups}
            told = 0
            while waiting:
                ended, waiting = wait(waiting, LOOK_EVERY_S, FIRST_COMPLETED)
                for future in ended:
                    future.result()
                now = counter.value
                tell(now - told)
                told = now
    except BrokenProcessPool:
        raise UserError(
            f"--workers={workers}: a worker was killed, perhaps because memory ran out: groups that are done are kept; "
            "the same command goes on, with fewer --workers it needs less memory"
        ) from None


_work: Work | None = None
_counter: Any = None


def _start_worker(work: Work, counter: Any) -> None:
    global _work, _counter
    _work, _counter = work, counter


def _do(group: int) -> None:
    assert _work is not None
    pack_group(_work, group, _count)


def _count(rows: int) -> None:
    with _counter.get_lock():
        _counter.value += rows


@contextmanager
def progress(rows: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line every LINE_EVERY_S; yields what takes the numbers of rows done since."""
    if not console.is_terminal:
        yield _Lines(rows, console).tell
        return
    columns = (
        TextColumn("packing"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows, {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("packing", total=rows, rate="")
        began = time.monotonic()

        def tell(done: int) -> None:
            shown.advance(task, done)
            seconds = time.monotonic() - began
            shown.update(task, rate=f"{shown.tasks[task].completed / max(seconds, 1e-9):,.0f} rows/s")

        yield tell


class _Lines:
    def __init__(self, rows: int, console: Console) -> None:
        self._rows, self._console, self._done = rows, console, 0
        self._began = self._last = time.monotonic()

    def tell(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S:
            return
        self._last = now
        rate = self._done / (now - self._began)
        left = f"{(self._rows - self._done) / rate / 60:.0f} min left" if rate else ""
        line = f"packing: {self._done:,} of {self._rows:,} rows, {rate:,.0f} rows/s, {left}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
