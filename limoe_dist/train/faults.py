"""RUN/faults.jsonl: what went wrong with ranks and hosts of a run, one line a fault, over all of its starts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from limoe_dist.parallel.fault import Fault

NAME = "faults.jsonl"
TEXT = 2000
"""Characters of a text that are kept."""
SAME_S = 60.0
"""Ranks that find one fault, each by itself, do so within this time: it is written once."""
TAIL_BYTES = 65_536


def attempt(environ: Mapping[str, str]) -> dict[str, Any]:
    """Which start of the run this is: Slurm's job as text, None without; and how often Slurm started that job again."""
    count = environ.get("SLURM_RESTART_COUNT", "")
    return {"job": environ.get("SLURM_JOB_ID") or None, "restart": int(count) if count.isdigit() else 0}


def fault_file(
    run_dir: Path, environ: Mapping[str, str], *, wall: Callable[[], float] = time.time
) -> Callable[[Fault], None]:
    """Gives the function that notes a fault: for on_fault of parallel.bootstrap.start. It may raise OSError.

    A run that has not begun yet has no directory: it is made where its parent is there.
    """

    def note(fault: Fault) -> None:
        line = {
            "time": wall(),
            "kind": fault.kind,
            "ranks": fault.ranks,
            "hosts": fault.hosts,
            "text": fault.text[:TEXT],
        } | attempt(environ)
        if not run_dir.exists():
            run_dir.mkdir(exist_ok=True)
        _append(run_dir / NAME, line)

    return note


def _append(path: Path, line: dict[str, Any]) -> None:
    """In one piece, behind whole lines: other ranks write here too, and one may have been cut off.

    Where another is in the middle of its line, an empty one comes between: readers pass over it.
    """
    text = json.dumps(line) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace")
        if _is_there(line, tail):
            return
        os.write(descriptor, ("" if not tail or tail.endswith("\n") else "\n").encode() + text.encode())
    finally:
        os.close(descriptor)


def _is_there(line: dict[str, Any], tail: str) -> bool:
    """Whether another rank has noted this fault already."""
    for text in tail.splitlines():
        try:
            other = json.loads(text)
            alike = all(other[name] == _plain(line[name]) for name in ("kind", "ranks", "hosts", "job", "restart"))
            if alike and abs(line["time"] - other["time"]) < SAME_S:
                return True
        except (ValueError, TypeError, KeyError):
            continue
    return False


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
