"""Where threads of this process stand, as text; and the stacks of many ranks, each printed once.

No line of source is looked up: a rank may hang because its disk does, and who reads the source there hangs too.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch

from limoe_dist.parallel.place import name_ranks

SHORT = 3
"""Frames of a line."""
INNERMOST, OUTERMOST = 40, 10
"""Frames of a stack that are kept; those between are counted."""
SHOWN = 12
"""Stacks that are printed."""
OWN = "limoe-"
"""Begins the names of this package's threads: the loader's, a save's."""
MAIN = "main thread"

_TORCH, _PYTHON = str(Path(torch.__file__).parent), sysconfig.get_path("stdlib")


def innermost(thread: int | None) -> str:
    """The innermost lines of Python where a thread is, without those of torch and the standard library."""
    frames = list(_frames(thread))
    own = [frame for frame in frames if not _foreign(frame.f_code.co_filename)]
    return " < ".join(_line(frame, parts=2) for frame in own[:SHORT] or frames[:1]) or "no Python"


def stacks(collective: int | None) -> dict[str, str]:
    """By name, the whole Python stack of the main thread, of the one in a collective, and of this package's at work.

    collective: that thread's number; None: there is none. Innermost first; a very deep stack without its middle.
    """
    threads = {thread.ident: thread.name for thread in threading.enumerate() if thread.name.startswith(OWN)}
    if collective is not None:
        # Not every thread is Python's own: autograd makes one for each device.
        threads.setdefault(collective, "thread in the collective")
    threads[threading.main_thread().ident] = MAIN
    return {name: _stack(thread) for thread, name in threads.items() if not _idle(thread)}


def alike(stacks_of: Mapping[int, Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """The stacks of ranks as lines: equal ones once, first those that are on few ranks.

    stacks_of: by rank, what `stacks` gave there.
    """
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for rank, by_name in stacks_of.items():
        for name, text in by_name.items():
            ranks_of.setdefault((name, text), []).append(rank)
    found = sorted(ranks_of.items(), key=lambda each: (each[0][0] != MAIN, len(each[1]), each[1]))
    lines = []
    for (name, text), ranks in found[:SHOWN]:
        lines += [f"Stack of the {name} of {name_ranks(ranks, hosts)}, innermost first:", text]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} more stacks")
    return lines


def _stack(thread: int | None) -> str:
    lines = [f"    {_line(frame, parts=3)}" for frame in _frames(thread)]
    if (between := len(lines) - INNERMOST - OUTERMOST) > 0:
        lines[INNERMOST:-OUTERMOST] = [f"    ... {between} more ..."]
    return "\n".join(lines) or "    no Python"


def _idle(thread: int | None) -> bool:
    """In a pool, without work."""
    code = next((frame.f_code for frame in _frames(thread)), None)
    return code is not None and code.co_name == "_worker" and code.co_filename.endswith("concurrent/futures/thread.py")


def _frames(thread: int | None) -> Iterator[FrameType]:
    """Innermost first."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _foreign(path: str) -> bool:
    return path.startswith(_TORCH) or ("site-packages" not in path and path.startswith(_PYTHON))


def _line(frame: FrameType, *, parts: int) -> str:
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-parts:])}:{frame.f_lineno} {frame.f_code.co_name}"
