"""What the files of a run say about it at this moment, and what Slurm says. Needs no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.job_case import train_steps
from limoe_dist.checkpoint import catalog
from limoe_dist.checkpoint.manifest import NAME as MANIFEST
from limoe_dist.config.errors import UserError
from limoe_dist.train.folder import trainer
from slurm import attempts as book
from slurm import scheduler
from slurm.attempts import Attempt, Ended
from slurm.scheduler import Past, Queued

AHEAD_S = 30.0
"""A heartbeat that is further in the future than this tells of a clock that was set."""
JOBS = 200
"""Of the newest jobs of a run, so many are asked for."""


@dataclass(frozen=True)
class Heartbeat:
    step: int
    steps: int
    phase: str
    seconds_per_step: float | None
    hosts: tuple[str, ...]
    busy_s: tuple[float, ...]
    key: book.Key
    age_s: float
    """Never negative."""
    ahead_s: float
    """How far its clock was ahead of ours; 0: it was not."""

    @property
    def patience_s(self) -> float:
        """After so long without another one the run looks dead."""
        return max(120.0, 20 * (self.seconds_per_step or 0.0)) if self.phase == "train" else 900.0

    @property
    def stale(self) -> bool:
        return self.age_s > self.patience_s


@dataclass(frozen=True)
class Checkpoint:
    step: int
    written: float
    verified: bool


@dataclass
class Facts:
    """What can be found out about a run at one moment."""

    run_dir: Path
    now: float
    steps: int | None
    ended: Ended | None
    heartbeat: Heartbeat | None
    trained_by: str | None
    attempts: list[Attempt]
    submissions: list[dict[str, Any]]
    queued: dict[str, Queued] | None
    """None: Slurm is not here, or does not answer."""
    history: list[Past]
    metrics: dict[str, Any]
    checkpoint: Checkpoint | None
    guard: list[dict[str, Any]]
    faults: list[dict[str, Any]]
    excluded: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        beat = self.heartbeat.step if self.heartbeat else 0
        # A run that went back to a checkpoint is where it is now, not where it was.
        return beat or book.whole(self.metrics.get("step")) or (self.checkpoint.step if self.checkpoint else 0)

    @property
    def jobs_in_queue(self) -> list[Queued]:
        return [job for job in (self.queued or {}).values() if job.waits or job.runs]


def gather(run_dir: Path, clock: Callable[[], float] = time.time) -> Facts:
    """Raises UserError where there is no such run, or it cannot be read."""
    known = ("run.json", "checkpoints", "slurm", "heartbeat.json", "faults.jsonl")
    try:
        # Where it must not be read, `exists` may say no.
        there = set(os.listdir(run_dir)) if run_dir.exists() else set()
    except NotADirectoryError:
        there = set()
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be read: {error.strerror}") from None
    if not there & set(known):
        raise UserError(
            f"{run_dir}: there is neither run.json nor checkpoints nor slurm: this is not a run's directory"
        )
    attempts, submissions = book.attempts(run_dir), book.lines(run_dir / book.SUBMISSIONS)
    jobs = [attempt.job for attempt in attempts] + [job for line in submissions for job in book.words(line.get("jobs"))]
    beat = _heartbeat(run_dir, clock())
    # The newest first. An interactive job is in neither list.
    jobs = [beat.key[0] if beat else "", *reversed(jobs)]
    jobs = list(dict.fromkeys(job for job in jobs if job))[:JOBS]
    warnings: list[str] = []
    try:
        queued: dict[str, Queued] | None = scheduler.queue(jobs)
    except UserError as error:
        queued = None
        if jobs:
            warnings.append(f"from files alone: {error}")
    unclear = [attempt.job for attempt in attempts if attempt.action in ("", "lost", "cancelled")]
    return Facts(
        run_dir=run_dir,
        now=clock(),
        steps=train_steps(run_dir),
        ended=book.read_ended(run_dir),
        heartbeat=beat,
        trained_by=_trainer(run_dir),
        attempts=attempts,
        submissions=submissions,
        queued=queued,
        history=(scheduler.known(lambda: scheduler.history(list(dict.fromkeys(unclear)))) or [])
        if queued is not None
        else [],
        metrics=last_line(run_dir / "metrics.jsonl"),
        checkpoint=_checkpoint(run_dir),
        guard=book.lines(run_dir / "guard.jsonl"),
        faults=book.lines(run_dir / book.FAULTS),
        excluded=_excluded(run_dir),
        warnings=warnings,
    )


def _heartbeat(run_dir: Path, now: float) -> Heartbeat | None:
    path = run_dir / "heartbeat.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        beat, by_server = book.number(content["time"]), path.stat().st_mtime
        if beat is None:
            return None
        ahead = beat - now if beat - now > AHEAD_S else 0.0
        per_step = book.number(content.get("seconds_per_step"))
        busy_s = [book.number(value) for value in content.get("busy_s") or ()]
        return Heartbeat(
            step=book.whole(content["step"]),
            steps=book.whole(content["steps"]),
            phase=str(content["phase"]),
            seconds_per_step=per_step if per_step is not None and per_step >= 0 else None,
            hosts=tuple(map(str, content.get("hosts") or ())),
            busy_s=tuple(value or 0.0 for value in busy_s),
            key=(str(content.get("job") or ""), book.whole(content.get("restart"))),
            # Of a clock that is ahead the file server's may tell more.
            age_s=max(0.0, now - (by_server if ahead else beat)),
            ahead_s=ahead,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _trainer(run_dir: Path) -> str | None:
    try:
        return trainer(run_dir)
    except UserError:
        return None


def _checkpoint(run_dir: Path) -> Checkpoint | None:
    try:
        for folder in reversed(catalog.checkpoints(run_dir)):
            written = (folder / MANIFEST).stat().st_mtime
            return Checkpoint(catalog.step_of(folder), written, catalog.is_verified(folder))
    except OSError:
        pass  # removed meanwhile, or not ours to read
    return None


def _excluded(run_dir: Path) -> tuple[str, ...]:
    try:
        text = (run_dir / book.EXCLUDE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ()
    return tuple(text.split(",")) if text else ()


def last_line(path: Path, *, window: int = 1 << 16) -> dict[str, Any]:
    """The last whole line of a JSONL file, without reading the file; {} where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            while True:
                begin = max(0, size - window)
                file.seek(begin)
                # The first of these lines may be a part of one.
                parts = file.read(size - begin).split(b"\n")[(1 if begin else 0) :]
                for part in reversed(parts):
                    try:
                        content = json.loads(part)
                    except ValueError:
                        continue
                    if isinstance(content, dict):
                        return content
                if not begin:
                    return {}
                window *= 4
    except OSError:
        return {}
