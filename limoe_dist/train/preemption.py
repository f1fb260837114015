"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 only set a flag; all ranks look at it together, in the vote of each step."""

from __future__ import annotations

import signal
import time
from types import FrameType

from limoe_dist.config import exit_codes

IMPATIENT_S = 2.0
"""Launchers repeat a terminal's Ctrl-C at once; one that comes later than this is a person who will not wait."""
OF_JOBS = (signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends ahead of a time limit: save, and be gone on with. By themselves they would end a process."""
SIGNALS = (signal.SIGINT, *OF_JOBS, signal.SIGTERM)


class StopFlag:
    """Catches the signals inside a `with`. Another SIGTERM changes nothing; a later second Ctrl-C abandons the run."""

    def __init__(self) -> None:
        self._received = 0
        self._since = 0.0

    def watch_early(self) -> StopFlag:
        """Catches the signals of jobs from now on, for good: while torch is imported and the ranks meet.

        Not the others: there is nothing to save yet, and they end the process as they should.
        """
        for number in OF_JOBS:
            signal.signal(number, self._on_signal)
        return self

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
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
        """The first signal that this process received, or 0: all ranks act on the largest."""
        return self._received


def status_after(number: int) -> int:
    """The exit status of a run that saved and ended after this signal; 0: it ended without one."""
    if number in OF_JOBS:
        return exit_codes.GO_ON
    return 128 + number if number else exit_codes.DONE
