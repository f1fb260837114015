"""Which units of work are being done in a folder now, by locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.lock import Lock
from data_prep.units import Unit
from limoe_dist.config.errors import UserError

PATIENCE_S = 120.0
"""For the door: those who come together go through it one behind the other, and whoever ends writes the manifest."""


@contextmanager
def door(folder: Path) -> Iterator[None]:
    """Held while the state of the folder is looked at and changed: one process at a time, the others wait.

    Where the file system has no locks everybody goes through. Raises UserError after PATIENCE_S.
    """
    with (folder / "lock").open("a") as file:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(
                        f"{folder / 'lock'}: held by another process for {PATIENCE_S:g} s: look what it does"
                    ) from None
                time.sleep(0.05)
            except OSError:
                break
        yield


def claim(folder: Path, unit: Unit, what: str) -> Lock:
    """Makes the unit this process's own, until it is closed. Call it inside `door`.

    what: names the folder to people, as "--out shards". Raises UserError where the unit is being done by another
    process, or others divide the work differently: two processes would do the same pieces.
    """
    for other in at_work(folder):
        if other.count != unit.count:
            raise UserError(
                f"{what}: {other} is being packed there now, and {unit} would do some of the same work: "
                "give every process the same N in --unit I/N, or wait for the others"
            )
    return Lock(_file(folder, unit), f"{what}: {Unit(unit.index, unit.count)}")


def at_work(folder: Path) -> list[Unit]:
    """The units that live processes do now. Call it inside `door`; removes what dead ones left."""
    found = []
    for file in sorted(folder.glob("unit-*-of-*.lock")):
        if not (match := re.fullmatch(r"unit-(\d+)-of-(\d+)\.lock", file.name)):
            continue
        with suppress(FileNotFoundError), file.open("a") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(Unit(int(match[1]), int(match[2])))
            except OSError:
                # Without locks nobody can be seen.
                return []
            else:
                os.unlink(file)
    return found


def _file(folder: Path, unit: Unit) -> Path:
    return folder / f"unit-{unit.index}-of-{unit.count}.lock"
