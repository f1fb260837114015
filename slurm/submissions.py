"""RUN/slurm: the scripts of a run's submissions, and which jobs they became.

RUN/slurm/001.sbatch           what was submitted first; also 002, 003, ...
RUN/slurm/001.jobs             of a chain: the numbers of its jobs, a line each
RUN/slurm/submissions.jsonl    a line for each submission
RUN/slurm/job-NUMBER.log       what the jobs print
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from limoe_dist.config.errors import UserError

FILE = "submissions.jsonl"


@dataclass(frozen=True)
class Submission:
    time: float
    """Unix time."""
    jobs: tuple[str, ...]
    script: str
    """Name in RUN/slurm."""
    nodes: int
    ranks: int
    time_limit: str
    requeue: bool
    chain: int
    exclude: tuple[str, ...]
    after: str = ""
    """The job that submitted this one in its own place; empty: a person did."""


def folder(run: Path) -> Path:
    return run / "slurm"


def next_script(run: Path) -> Path:
    """The first of 001.sbatch, 002.sbatch, ... that is not there."""
    taken = [int(path.stem) for path in folder(run).glob("*.sbatch") if path.stem.isdigit()]
    return folder(run) / f"{max(taken, default=0) + 1:03d}.sbatch"


def read(run: Path) -> list[Submission]:
    """Every submission of a run, oldest first; a line that was cut by a power cut is passed over."""
    try:
        lines = (folder(run) / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder(run) / FILE}: cannot be read: {error.strerror}") from None
    found = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            fields = json.loads(line)
            fields |= {name: tuple(str(each) for each in fields[name]) for name in ("jobs", "exclude")}
            found.append(Submission(**fields))
    return found


class Draft:
    """A script that is written, and taken away again where it is not submitted. Leaves no folder that it made."""

    def __init__(self, script: Path, text: str) -> None:
        """Raises UserError where the folder or the file cannot be written."""
        self.script, self._made = script, [path for path in script.parents if not path.exists()]
        self._mine = False
        try:
            script.parent.mkdir(parents=True, exist_ok=True)
            with script.open("x", encoding="utf-8") as file:
                self._mine = True
                file.write(text)
            script.chmod(0o755)
        except OSError as error:
            self.discard()
            raise UserError(f"{script}: cannot be written: {error.strerror}") from None

    def discard(self) -> None:
        with suppress(OSError):
            if self._mine:
                self.script.unlink(missing_ok=True)
            for path in self._made:
                path.rmdir()


def note_job(script: Path, job: str) -> None:
    """One more job of a chain."""
    with script.with_suffix(".jobs").open("a", encoding="utf-8") as file:
        file.write(job + "\n")


def note(run: Path, submission: Submission) -> None:
    """Appends a whole line. Raises UserError where it cannot: the jobs are in the queue all the same."""
    fields = asdict(submission)
    if not submission.after:
        fields.pop("after")
    path = folder(run) / FILE
    try:
        # A line that was cut by a power cut must not swallow this one.
        whole = not path.exists() or path.stat().st_size == 0 or path.read_bytes().endswith(b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(fields) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; submitted all the same: {', '.join(submission.jobs)}; "
            "cancel with scancel"
        ) from None


def now(jobs: Sequence[str], script: Path, **fields: object) -> Submission:
    return Submission(time=round(time.time(), 3), jobs=tuple(jobs), script=script.name, **fields)  # type: ignore[arg-type]
