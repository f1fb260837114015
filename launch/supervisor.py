"""Waits for a launcher and its ranks; signals go to the ranks themselves, each once, and are given time to save.

    limoe train --ranks N          catches SIGINT, SIGTERM, SIGUSR1, SIGUSR2
      the launcher                 in a session of its own: a terminal's Ctrl-C does not reach it
        rank 0, rank 1, ...        get the signal from here

A launcher that gets the signal itself ends its ranks in its own way: Open MPI kills them after a second, DeepSpeed and
torchrun after 30.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType

import psutil

from limoe_dist.train.preemption import SIGNALS, StopFlag

LOOK_S = 0.2
LEAVE_S = 10.0
"""For a launcher whose ranks are gone to tidy up and end."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Finished:
    status: int
    """Of the launcher; minus the signal's number where a signal ended it."""
    signal: int
    """The first signal that was passed on to the ranks, or 0."""
    killed: bool
    """Whether ranks were killed, because they had not ended grace_s seconds after it."""


def supervise(
    command: list[str], *, ranks: Sequence[str], environ: Mapping[str, str], grace_s: float, early: StopFlag
) -> Finished:
    """Runs the launcher `command` until it and all ranks below it have ended.

    ranks: the command line of each rank, by which it is found among all processes below this one.
    grace_s: seconds after the first signal; what is left then is killed. early: caught what came before this call.
    A launcher that is killed takes its ranks along: they get SIGTERM, and the same time to save.
    """
    _adopt_orphans()
    with _caught() as received:
        if early.received:
            received.append(early.received)
        process = subprocess.Popen(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=partial(_end_with, os.getpid()),
        )
        told: set[tuple[int, psutil.Process]] = set()
        deadline, killed = float("inf"), False
        try:
            while not _ended(process) or _ranks(ranks):
                if process.returncode is not None and not received:
                    received.append(signal.SIGTERM)
                if received and deadline == float("inf"):
                    deadline = time.monotonic() + grace_s
                _pass_on(received, _ranks(ranks) if received else [], told)
                if time.monotonic() > deadline:
                    # The launcher first, which would tell of ranks that were killed as of a fault.
                    killed = True
                    _kill(psutil.Process().children(recursive=True))
                    break
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_S)
        finally:
            _kill(psutil.Process().children(recursive=True))
        return Finished(process.wait(), received[0] if received else 0, killed)


@contextmanager
def _caught() -> Iterator[list[int]]:
    """The signals that this process received inside the `with`, in their order."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, after LOOK_S seconds at most."""
    try:
        process.wait(LOOK_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _ranks(words: Sequence[str]) -> list[psutil.Process]:
    """The processes below this one with that command line, without what they started themselves."""
    found, todo = [], psutil.Process().children()
    while todo:
        process = todo.pop()
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.cmdline() == list(words):
                found.append(process)
            else:
                todo += process.children()
    return found


def _pass_on(received: Sequence[int], ranks: Sequence[psutil.Process], told: set[tuple[int, psutil.Process]]) -> None:
    """Each received signal to each rank that has not had it; a rank that starts late gets it then."""
    for place, number in enumerate(list(received)):
        for rank in ranks:
            if (place, rank) not in told:
                told.add((place, rank))
                with suppress(psutil.Error):
                    rank.send_signal(number)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _adopt_orphans() -> None:
    """Ranks whose launcher died become children of this process, and are found below it as before."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _end_with(parent: int) -> None:
    """In the launcher, before it starts: SIGTERM where this process is killed. Its ranks then have no more than the
    launcher's own time to save, but do not train on without anyone who waits for them."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)
