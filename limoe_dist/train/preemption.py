"""Ctrl-C and SIGTERM only set a flag; all ranks look at it together after each step, save, and end."""

from __future__ import annotations

import signal
import time
from types import FrameType

IMPATIENT_S = 2.0
"""Launchers repeat a terminal's Ctrl-C at once; one that comes later than this is a person who will not wait."""


class StopFlag:
    """Catches the signals inside a `with`. A second SIGTERM changes nothing; a later second Ctrl-C abandons the run."""

    def __init__(self) -> None:
        self._received = 0
        self._since = 0.0

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > IMPATIENT_S:
            raise KeyboardInterrupt

    @property
    def received(self) -> int:
        """The signal that this process received, or 0: all ranks act on the largest."""
        return self._received
