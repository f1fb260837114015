"""The line that a person watches: a live bar on a terminal, a plain line in a log file."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from limoe_dist.train.metrics import success


def say_anywhere(text: str) -> None:
    """A line of any rank. Where it cannot be written, as into a log on a full disk, it is lost: the run goes on."""
    with suppress(OSError):
        print(text, flush=True)


class Display:
    """What rank 0 shows; nothing on the others."""

    def __init__(self, *, steps: int, first_step: int, shows: bool) -> None:
        self.steps, self.shows = steps, shows
        self._began, self._first = time.perf_counter(), first_step
        self._bar: Progress | None = None
        # mpirun gives its ranks a terminal, but mixes what they write into lines.
        if shows and sys.stdout.isatty() and "OMPI_COMM_WORLD_RANK" not in os.environ:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task("", total=steps, completed=first_step, text="")
            self._bar.start()

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def figures(self, figures: dict[str, Any]) -> None:
        if not self.shows:
            return
        text = self._text(figures)
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        else:
            say_anywhere(f"step {figures['step']}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self.shows:
            say_anywhere(text)

    def _text(self, figures: dict[str, Any]) -> str:
        rate = (figures["step"] - self._first) / (time.perf_counter() - self._began)
        eta = int((self.steps - figures["step"]) / rate) if rate > 0 else 0
        parts = [
            f"loss {figures['loss']:.3f}",
            f"accuracy {figures['accuracy_image_to_text']:.2f}",
            f"{figures['pairs_per_s']:.0f} pairs/s",
        ]
        rates = [success(figures, modality) for modality in ("image", "text")]
        if rates[0] is not None and rates[1] is not None:
            parts.append(f"success image {rates[0]:.2f} text {rates[1]:.2f}")
        return "  ".join([*parts, f"ETA {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"])

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
