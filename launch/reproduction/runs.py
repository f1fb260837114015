"""The runs of a reproduction: each is trained once by `limoe train`, goes on where it was stopped, and is shared.

A run's directory is named by what decides its results: settings, evaluation and data. Figures that need the same run
find it there, and so does a later call.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import decisive, save_run, write_atomically
from limoe_dist.config.schema import Run

RUNS = "runs"


@dataclass(frozen=True)
class Data:
    train: Path
    validation: Path
    """Manifests."""
    checksum: str
    """Of all shards."""


@dataclass(frozen=True)
class Planned:
    """One run and the directory that is its own."""

    label: str
    """For people: "fig3, classic, seed 0"."""
    run: Run
    folder: Path

    @property
    def finished(self) -> bool:
        """Trained to its last step, and evaluated there."""
        evaluated = re.search(rf'"step": {self.run.train.steps}[,}}]', _text(self.folder / "evaluations.jsonl"))
        return evaluated is not None and bool(_saved_steps(self.folder, self.run.train.steps))

    @property
    def step(self) -> int:
        """The last logged step."""
        lines = _text(self.folder / "metrics.jsonl").splitlines()
        try:
            return int(json.loads(lines[-1])["step"])
        except (IndexError, ValueError, KeyError):
            return 0

    @property
    def cpu_s(self) -> float:
        """CPU seconds, of all its parts."""
        return sum(json.loads(line)["cpu_s"] for line in _text(self.folder / "cost.jsonl").splitlines())


def planned(label: str, run: Run, data: Data, out: Path) -> Planned:
    """The run with its data, and its place below `out`."""
    key = {"settings": decisive(run), "eval": run.eval.model_dump(mode="json"), "data": data.checksum}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    paths = {"manifest": str(data.train.absolute()), "validation": str(data.validation.absolute())}
    run = run.model_copy(update={"data": run.data.model_copy(update=paths)})
    return Planned(label, run, out / RUNS / name)


@dataclass(frozen=True)
class Event:
    kind: str
    """begun, goes on, done."""
    run: Planned


def train_all(runs: Sequence[Planned], *, jobs: int, tell: Callable[[Event], None], watch: Callable[[], None]) -> None:
    """Trains what is not finished, `jobs` at a time; `watch` is called about every second.

    Raises UserError, when the others that were under way have ended, where a run failed; KeyboardInterrupt, after
    Ctrl-C or SIGTERM, when they have saved.
    """
    waiting = [run for run in {run.folder: run for run in runs}.values() if not run.finished]
    working: list[_Job] = []
    failed: _Job | None = None
    interrupted = False
    while working or (waiting and failed is None and not interrupted):
        try:
            while waiting and len(working) < jobs and failed is None and not interrupted:
                working.append(_Job(waiting.pop(0), tell))
            time.sleep(0.2)
            watch()
            for job in [job for job in working if job.ended()]:
                working.remove(job)
                if job.run.finished:
                    tell(Event("done", job.run))
                elif not interrupted:
                    failed = failed or job
        except KeyboardInterrupt:
            interrupted = True
            for job in working:
                job.stop()
    if interrupted:
        raise KeyboardInterrupt
    if failed is not None:
        raise UserError(
            f"{failed.run.label}: `limoe train` ended with status {failed.status}: {failed.last_line()} "
            f"(all of it in {failed.log_path}); what was trained stands, and the same command goes on"
        )


class _Job:
    """One `limoe train` under way."""

    def __init__(self, run: Planned, tell: Callable[[Event], None]) -> None:
        self.run, self.status = run, 0
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        settings = run.folder.with_suffix(".json")
        self.log_path = run.folder.with_suffix(".log")
        if _saved_steps(run.folder):
            command = ["train", "--resume", str(run.folder)]
            tell(Event("goes on", run))
        else:
            _remove_unsaved(run.folder)
            save_run(run.run, settings)
            command = ["train", str(settings), "--out", str(run.folder)]
            tell(Event("begun", run))
        self._log: IO[bytes] = self.log_path.open("ab")
        self._began = time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "limoe_dist", *command],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            # Ctrl-C of a terminal reaches us alone, and is passed on: once, whoever sent it.
            start_new_session=True,
        )

    def ended(self) -> bool:
        """Whether it has; then its cost is noted."""
        found, status, usage = os.wait4(self._process.pid, os.WNOHANG)
        if not found:
            return False
        self._process.returncode = self.status = os.waitstatus_to_exitcode(status)
        self._log.close()
        if self.run.folder.is_dir():
            cost = {"cpu_s": usage.ru_utime + usage.ru_stime, "wall_s": time.monotonic() - self._began}
            path = self.run.folder / "cost.jsonl"
            write_atomically(path, _text(path) + json.dumps(cost) + "\n")
        return True

    def stop(self) -> None:
        """Asks it to save and end."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)

    def last_line(self) -> str:
        lines = _text(self.log_path).strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _saved_steps(folder: Path, step: int | None = None) -> list[Path]:
    """Checkpoints with a manifest: all, or that of a step."""
    name = "step-*" if step is None else f"step-{step:08d}"
    return list(folder.glob(f"checkpoints/{name}/manifest.json"))


def _remove_unsaved(folder: Path) -> None:
    """A run that was ended before its first checkpoint begins again; what was written of it is in the way."""
    if folder.is_dir():
        shutil.rmtree(folder)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
