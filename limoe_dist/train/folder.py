"""What a run's directory holds, and whose it is.

RUN/run.json              the settings of the last start
RUN/tokenizer.model       the vocabulary, copied from the training data
RUN/metrics.jsonl         one line every log.every_steps
RUN/evaluations.jsonl     one line for each evaluation in training
RUN/positions.jsonl       which positions of the data order were consumed
RUN/tensorboard/          the same figures for TensorBoard
RUN/checkpoints/          step-NNNNNNNN, see limoe_dist/checkpoint/storage.py
RUN/ended.json            step and signal of a run that ended by itself, with a checkpoint
RUN/lock                  held while a process trains here
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import changed_settings, decisive, load_run, save_run, write_atomically
from limoe_dist.config.schema import Run

ENDED = "ended.json"


def new_run_problem(out: Path) -> str | None:
    """Why no new run may begin in `out`; None where it may."""
    if (out / "run.json").exists():
        return f"{out} holds a run already: go on with `limoe train --resume {out}`, or choose another --out"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return f"{out} exists and is not empty: choose another --out"
    return None


def begin(out: Path, run: Run, tokenizer: Path) -> IO[str]:
    """Makes the directory of a run, or takes up a resumed one with the settings of now; one rank calls it.

    The run keeps its own copy of the vocabulary. Returns the lock: while it is open, no other process trains there.
    Raises UserError where one does.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = _lock(out / "lock")
    kept = (out / "tokenizer.model").absolute()
    if not kept.exists():
        temporary = kept.with_suffix(".tmp")
        shutil.copyfile(tokenizer, temporary)
        temporary.replace(kept)
    save_run(run.model_copy(update={"data": run.data.model_copy(update={"tokenizer": str(kept)})}), out / "run.json")
    (out / ENDED).unlink(missing_ok=True)
    return lock


def _lock(path: Path) -> IO[str]:
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{path.parent} is being trained by {file.read().strip() or 'another process'}") from None
    except OSError:
        return file  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def note_end(out: Path, *, step: int, signal: int) -> None:
    """Says that the run ended by itself after a checkpoint of `step`; a run that was killed says nothing."""
    write_atomically(out / ENDED, json.dumps({"step": step, "signal": signal}) + "\n")


@dataclass(frozen=True)
class Ended:
    step: int
    signal: int


def read_end(out: Path) -> Ended | None:
    """How the run ended; None where it was killed, or still runs."""
    try:
        return Ended(**json.loads((out / ENDED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def resume_problems(out: Path, run: Run) -> list[str]:
    """Why the run in `out` cannot go on with these settings: what decides results may not change."""
    return changed_settings(decisive(load_run(out / "run.json")), run, out / "run.json")
