"""A file that one process holds while it writes beside it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from limoe_dist.config.errors import UserError

LOOK_S = 0.05


class Lock:
    """Held from its making until `close`, which removes the file; the kernel gives it up where the process dies.

    wait_s: how long another may still hold it before this one is refused.
    what: names what is locked, for the one who comes second, as "part 3 of OUT".
    Raises UserError naming the owner where another process, or another Lock of this one, holds it. Where the file
    system has no locks everybody gets it.
    """

    def __init__(self, path: Path, what: str, *, wait_s: float = 0.2) -> None:
        self.path = path
        self._file = _held(path, what, wait_s)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        """Gives it up. Removed while it is still held: whoever waits for the old file sees that it has gone."""
        if not self._file.closed:
            with suppress(OSError):
                self.path.unlink()
            self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _held(path: Path, what: str, wait_s: float) -> IO[str]:
    looks = max(1, round(wait_s / LOOK_S))
    for look in range(looks):
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            file.close()
            if look == looks - 1:
                raise UserError(f"{what} is being written by {owner}: wait for it, or stop it") from None
            time.sleep(LOOK_S)
            continue
        except OSError:
            return file
        if _is(path, file):
            return file
        file.close()
    raise UserError(f"{what}: its lock {path} comes and goes: other processes are writing there")


def _is(path: Path, file: IO[str]) -> bool:
    """Whether the path still is this file: its last owner may have removed it before we held it."""
    try:
        there, ours = path.stat(), os.fstat(file.fileno())
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
