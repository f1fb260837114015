"""What a person sees while runs are trained: a line where one begins or ends, and on a terminal a bar of all steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launch.reproduction.runs import Event, Planned


class Board:
    def __init__(self, runs: Sequence[Planned]) -> None:
        self.runs = runs
        self._done = {run.folder: run.run.train.steps for run in runs if run.finished}
        self._working: dict[object, Planned] = {}
        self._looked_at = 0.0
        console = Console(highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar = self._progress.add_task("steps", total=sum(run.run.train.steps for run in runs))

    def __enter__(self) -> Board:
        self._progress.start()
        self._say(f"{len(self.runs)} runs, {len(self._done)} done before")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def tell(self, event: Event) -> None:
        run = event.run
        if event.kind == "done":
            self._working.pop(run.folder, None)
            self._done[run.folder] = run.run.train.steps
            self._say(f"[{len(self._done)}/{len(self.runs)}] done: {run.label} ({run.cpu_s:.0f} CPU s)")
        else:
            self._working[run.folder] = run
            at = f" at step {run.step}" if event.kind == "goes on" else ""
            self._say(f"{event.kind}{at}: {run.label} ({run.folder.name})")

    def watch(self) -> None:
        """Moves the bar, every few seconds: each look reads files."""
        if self._progress.disable or time.monotonic() - self._looked_at < 3:
            return
        self._looked_at = time.monotonic()
        under_way = sum(run.step for run in self._working.values())
        self._progress.update(self._bar, completed=sum(self._done.values()) + under_way)

    def _say(self, text: str) -> None:
        if self._progress.disable:
            print(text, flush=True)
        else:
            self._progress.console.print(text, markup=False)
