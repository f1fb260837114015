"""How far long work is: a bar on a terminal; elsewhere, as in a log, a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 30.0
Advance = Callable[[int], None]


@contextmanager
def watched(
    what: str, total: int, *, unit: str, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """Yields a function to call with the steps that were just done; all of it goes to the standard error.

    total: steps in all, 0 where nobody knows. every_s: seconds between two lines where there is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    began = said = clock()
    if console.is_terminal:
        # Without markup: what is worked on may be named by strangers.
        words, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
        columns = (words, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(what, total=total or None, rate="")

            def move(steps: int) -> None:
                bars.advance(task, steps)
                bars.update(task, rate=f"{bars.tasks[task].completed / max(clock() - began, 1e-9):,.0f} {unit}/s")

            yield move
        return
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, said
        done += steps
        now = clock()
        if now - said >= every_s:
            said = now
            print(line(what, done, total, unit, now - began), file=sys.stderr, flush=True)

    yield advance


def line(what: str, done: int, total: int, unit: str, seconds: float) -> str:
    """As "verifying: 1,200 of 4,000 rows, 60/s, 47 s left"."""
    rate = done / seconds if seconds > 0 else 0.0
    text = f"{what}: {done:,}{f' of {total:,}' if total else ''} {unit}, {rate:,.0f}/s"
    return f"{text}, {(total - done) / rate:,.0f} s left" if total and rate else text
