"""What a person sees of a download: live on a terminal, a line every so often elsewhere, a table at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from data_prep.fetching.download_state import Progress
from data_prep.fetching.ledger import FETCHED

LIVE_EVERY_S, LINE_EVERY_S = 1.0, 10.0
WINDOW = 30
"""Looks that the rate is taken over."""


class Watch:
    """Shows a Progress. rows: what is left to do; None: not known."""

    def __init__(self, progress: Progress, console: Any, rows: int | None) -> None:
        self._progress, self._console, self._rows = progress, console, rows
        self._seen: list[tuple[float, int, int]] = [(progress.seconds, 0, 0)]

    async def show(self) -> None:
        """Until it is cancelled."""
        if not self._console.is_terminal:
            while True:
                await asyncio.sleep(LINE_EVERY_S)
                self._look()
                self._console.print(self.line(), highlight=False, markup=False, soft_wrap=True)
        from rich.live import Live

        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(LIVE_EVERY_S)
                self._look()
                live.update(self._table(), refresh=True)

    def _look(self) -> None:
        progress = self._progress
        self._seen = [*self._seen[-WINDOW:], (progress.seconds, progress.rows, progress.bytes)]

    def line(self) -> str:
        """One line: rows, rate, what is left, the most frequent failures."""
        progress = self._progress
        (since, rows, size), (now, rows_now, size_now) = self._seen[0], self._seen[-1]
        seconds = max(now - since, 1e-9)
        rate = (rows_now - rows) / seconds
        done = progress.rows + progress.before
        of = f" of {self._rows:,}" if self._rows is not None else ""
        left = f", {duration((self._rows - done) / rate)} left" if self._rows is not None and rate > 0 else ""
        failed = [f"{name} {count:,}" for name, count in progress.errors.most_common() if name != FETCHED]
        return (
            f"{done:,}{of} rows, {progress.errors[FETCHED]:,} pictures, {rate:,.0f} rows/s, "
            f"{(size_now - size) / seconds / 1e6:.1f} MB/s{left}; {progress.active} connections"
            + (f"; failed: {', '.join(failed[:5])}" if failed else "")
        )

    def _table(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self.line()), table(self._progress.errors))


def table(errors: Mapping[str, int]) -> Any:
    """Rows by class, the most frequent first."""
    from rich.table import Table

    all_rows = max(sum(errors.values()), 1)
    shown = Table("class", "rows", "share", box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, count in sorted(errors.items(), key=lambda item: (item[0] != FETCHED, -item[1], item[0])):
        shown.add_row(name, f"{count:,}", f"{100 * count / all_rows:.1f} %")
    return shown


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 04 s, or 5 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
