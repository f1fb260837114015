"""What is known about a run when one of its jobs begins or ends: its files, and the variables of the job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limoe_dist.checkpoint.catalog import checkpoints, step_of
from limoe_dist.config.errors import UserError, warn
from limoe_dist.parallel.place import expand_hosts
from limoe_dist.train.folder import trainer
from slurm import attempts as book
from slurm import scheduler
from slurm.attempts import Attempt, Ended


@dataclass(frozen=True)
class Job:
    """This job, by the variables that Slurm sets in it."""

    number: str
    restart: int
    nodes: tuple[str, ...]
    node_list: str
    """The same, compressed."""

    @property
    def key(self) -> book.Key:
        return self.number, self.restart


@dataclass
class Case:
    """What is known when a job begins or ends."""

    run_dir: Path
    job: Job
    past: list[Attempt]
    faults: list[dict[str, Any]]
    submissions: list[dict[str, Any]]
    ended: Ended | None
    step: int
    """Of the newest checkpoint; 0: none."""
    clock: Callable[[], float] = field(default=time.time)

    @property
    def family(self) -> list[Attempt]:
        """The attempts that this job goes on from."""
        members = book.family(self.past, self.submissions, self.job.number)
        return [attempt for attempt in self.past if attempt.job in members]

    @property
    def chain(self) -> list[str]:
        """The jobs that were submitted together with this one to go on from each other; empty: it is alone."""
        jobs = next((book.words(line.get("jobs")) for line in self.submissions if self._is_in(line)), ())
        return list(jobs) if len(jobs) > 1 else []

    def _is_in(self, line: dict[str, Any]) -> bool:
        return self.job.number in book.words(line.get("jobs"))

    @property
    def this_attempt(self) -> Attempt | None:
        return next((one for one in reversed(self.past) if one.key == self.job.key and one.trained), None)

    def note(self, event: str, **facts: object) -> None:
        """A line of attempts.jsonl; where it cannot be written, training is not kept from anything."""
        line = {"event": event, "time": self.clock(), "job": self.job.number, "restart": self.job.restart} | facts
        path = self.run_dir / book.ATTEMPTS
        try:
            book.append(path, line)
        except OSError as error:
            warn(f"{path}: cannot be written: {error.strerror}; the job goes on without that note")


def look(run_dir: Path, environ: Mapping[str, str]) -> Case:
    names = environ.get("SLURM_JOB_NODELIST", "")
    restart = environ.get("SLURM_RESTART_COUNT", "0")
    return Case(
        run_dir=run_dir,
        job=Job(
            number=environ.get("SLURM_JOB_ID", ""),
            restart=int(restart) if restart.isdigit() else 0,
            nodes=tuple(expand_hosts(names)),
            node_list=names,
        ),
        past=book.attempts(run_dir),
        faults=book.lines(run_dir / book.FAULTS),
        submissions=book.lines(run_dir / book.SUBMISSIONS),
        ended=book.read_ended(run_dir),
        step=newest_step(run_dir),
    )


def newest_step(run_dir: Path) -> int:
    try:
        have = checkpoints(run_dir)
    except OSError:
        return 0
    return step_of(have[-1]) if have else 0


def train_steps(run_dir: Path) -> int | None:
    """train.steps of the run; None where it has not begun, or nobody can tell."""
    try:
        steps = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["train"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return book.whole(steps) or None


def someone_else(case: Case, *, patience_s: float) -> str:
    """Who trains in this run now, or whose leftovers do not go away; empty: nobody."""
    until = time.monotonic() + patience_s
    while owner := _owner(case):
        if time.monotonic() >= until:
            return owner
        time.sleep(min(2.0, max(0.05, patience_s / 20)))
    return ""


def _owner(case: Case) -> str:
    # Of each job its newest attempt; one that nothing has closed may still run.
    newest = {attempt.job: attempt for attempt in case.past}
    others = [job for job, attempt in newest.items() if not attempt.action and job not in ("", case.job.number)]
    there = scheduler.known(lambda: scheduler.queue(others)) or {}
    if running := [job for job in there.values() if job.runs]:
        return f"job {running[0].job} ({running[0].state}) trains there; wait for it, or `scancel {running[0].job}`"
    try:
        if (owner := trainer(case.run_dir)) is not None:
            return f"it is being trained by {owner}"
    except UserError:
        pass  # a file system without locks: the last that comes owns the run
    return ""
