"""One word from rank 0 to all ranks by MPI, for a run that mpirun started: where they can meet."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from limoe_dist.config.errors import UserError

WORD_BYTES = 300
SAY_S = 2.0
"""Between the lines of the ranks that came and their end, at which mpirun ends the others."""


def tell_by_mpi(word: str, *, rank: int, timeout_s: float) -> str:
    """Rank 0's word, on every rank. A collective over MPI, which is then closed: nothing else needs it.

    MPI's own start waits without end for a rank that does not come, and does not say for which; so after timeout_s
    each rank that came says that it did, and is ended.
    """
    try:
        import mpi4py

        # Closed as soon as the word is told: at the end of a run that failed, MPI would wait for the others.
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except ImportError as error:
        raise UserError(f"started by mpirun, but mpi4py does not import ({error}): pip install mpi4py") from None
    line = (
        f"limoe: error: rank {rank} on host {socket.gethostname()} came, but not all ranks of mpirun did within "
        f"parallel.start_timeout_s={timeout_s:g} seconds: look for a rank that does not say this\n"
    )
    starts = not MPI.Is_initialized()
    # As bytes of a fixed size: lower-case bcast would pickle.
    message = bytearray(word.encode().ljust(WORD_BYTES))
    with _ended_after(timeout_s, line):
        if starts:
            MPI.Init_thread()
        MPI.COMM_WORLD.Bcast([message, MPI.BYTE], root=0)
        if starts:
            MPI.Finalize()
    return message.decode().strip()


@contextmanager
def _ended_after(seconds: float, line: str) -> Iterator[None]:
    """Ends this process where the `with` takes longer, with a last line.

    By a process beside it: while MPI waits, it holds the interpreter's lock, and no thread of Python gets to run.
    """
    watched = os.getpid()
    beside = os.fork()
    if beside == 0:
        _end_late(watched, seconds, line)
    try:
        yield
    finally:
        os.kill(beside, signal.SIGKILL)
        os.waitpid(beside, 0)


def _end_late(watched: int, seconds: float, line: str) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if os.getppid() != watched:
            os._exit(0)
    os.write(2, line.encode())
    time.sleep(SAY_S)
    os.kill(watched, signal.SIGTERM)
    os._exit(0)
