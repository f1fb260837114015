"""What a run's directory holds, and whose it is.

RUN/run.json              the settings of the last start, and its environment
RUN/tokenizer.model       the vocabulary, copied from the training data
RUN/metrics.jsonl         one line every log.every_steps
RUN/evaluations.jsonl     one line for each evaluation in training
RUN/positions.jsonl       which positions of the data order were consumed
RUN/replaced/             rank-NNNNN.jsonl: bad rows that a rank met, and the rows that stood in for them
RUN/tensorboard/          the same figures for TensorBoard
RUN/checkpoints/          step-NNNNNNNN, see limoe_dist/checkpoint/catalog.py
RUN/guard.jsonl           what the run did about its own numbers, see limoe_dist/train/guard.py
RUN/faults.jsonl          ranks and hosts that did not come, hung or died
RUN/heartbeat.json        what the ranks do at this moment
RUN/slurm/                scripts, logs and notes of the jobs that train here
RUN/ended.json            how a run that ended by itself did so: step, signal and exit status
RUN/lock                  held while a process trains here, and who it is
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from limoe_dist.config.environment import captured
from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.parse import changed_settings, decisive, load_run, save_run, write_atomically
from limoe_dist.config.schema import Run
from limoe_dist.data.mixture import with_home

ENDED = "ended.json"
LOOKS = 4


def new_run_problem(out: Path) -> str | None:
    """Why no new run may begin in `out`; None where it may."""
    if (out / "run.json").exists():
        return f"{out} holds a run already: go on with `limoe train --resume {out}`, or choose another --out"
    if out.exists() and (not out.is_dir() or any(not _of_a_start(path.name) for path in out.iterdir())):
        return f"{out} exists and is not empty: choose another --out"
    return None


def replaced_file(out: Path, rank: int) -> Path:
    return out / "replaced" / f"rank-{rank:05d}.jsonl"


def forget_replaced(out: Path) -> None:
    """For a run that begins, perhaps again: with other data now, lines about the old rows would be wrong."""
    shutil.rmtree(out / "replaced", ignore_errors=True)


def _of_a_start(name: str) -> bool:
    """Whether a file of this name may be there before run.json: a run that was killed there may begin again."""
    kept = ("lock", "tokenizer.model", "tokenizer.tmp", "slurm", "faults.jsonl", "heartbeat.json")
    return name in kept or name.startswith((".run.json.", ".heartbeat.json."))


def begin(out: Path, run: Run, tokenizer: Path) -> Claim:
    """Makes the directory of a run, or takes up a resumed one with the settings of now; one rank calls it.

    The run keeps its own copy of the vocabulary. Raises UserError where another process trains there.
    """
    out.mkdir(parents=True, exist_ok=True)
    claim = Claim(out / "lock")
    kept = (out / "tokenizer.model").absolute()
    if not kept.exists():
        temporary = kept.with_suffix(".tmp")
        shutil.copyfile(tokenizer, temporary)
        temporary.replace(kept)
    data = with_home(run.data).model_copy(update={"tokenizer": str(kept)})
    save_run(run.model_copy(update={"data": data}), out / "run.json", environment=captured(os.environ))
    (out / ENDED).unlink(missing_ok=True)
    return claim


class Claim:
    """The directory is this process's until it is closed. Raises UserError where it is another's.

    Where the file system has locks, the second process is refused. Where it has none, the last that came owns the
    directory, and the one before finds out at its next save: so a job that was started again is not stopped by what is
    left of it on a host that was given up.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+", encoding="utf-8")
        if not _locked(self._file):
            self._file.close()
            raise UserError(f"{path.parent} is being trained by {self._owner()}")
        self._line = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(8)}"
        self._file.truncate(0)
        self._file.write(self._line + "\n")
        self._file.flush()

    def check(self) -> None:
        """Raises UserError where another process has come since."""
        if (owner := self._owner()) != self._line:
            raise UserError(
                f"{self.path.parent} is now being trained by {owner}: two runs cannot save into one directory; "
                "this one ends, and what it has saved stays"
            )

    def _owner(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8").strip() or "another process"
        except OSError:
            return "nobody: its lock file is gone"

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _locked(file: IO[str]) -> bool:
    """Whether nobody else holds it; True where the file system has no locks."""
    for _ in range(LOOKS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Somebody may only be looking: see `trainer`.
            time.sleep(0.05)
        except OSError:
            return True
        else:
            return True
    return False


def trainer(run_dir: Path) -> str | None:
    """Who trains in a run at this moment, by its lock; None: nobody. Raises UserError where there are no locks to tell.

    A shared lock, given back at once: two that look do not see each other.
    """
    path = run_dir / "lock"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: nobody can tell whether a process trains there: {error.strerror}") from None
    return None


@dataclass(frozen=True)
class Ended:
    step: int
    """That of the newest checkpoint."""
    signal: int
    """What ended the run early, or 0."""
    status: int
    """The exit status of each rank, whatever the launcher makes of it; see config/exit_codes.py."""
    reason: str = ""
    """For people, where the run stopped by an error."""


def note_end(out: Path, ended: Ended) -> None:
    """Says that the run ended by itself; a run that was killed says nothing."""
    try:
        write_atomically(out / ENDED, json.dumps(asdict(ended)) + "\n")
    except OSError as error:  # the checkpoint is what counts
        warn(f"{out / ENDED}: cannot be written: {error.strerror}")


def read_end(out: Path) -> Ended | None:
    """How the run ended; None where it was killed, or still runs."""
    try:
        return Ended(**json.loads((out / ENDED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def resume_problems(out: Path, run: Run) -> list[str]:
    """Why the run in `out` cannot go on with these settings: what decides results may not change."""
    file = out / "run.json"
    before = decisive(load_run(file))
    if "window_rows" not in json.loads(file.read_text(encoding="utf-8")).get("data", {}):
        # Older than the setting, which then had no value: `Restart` compares with what the checkpoint's sources need.
        before["data.window_rows"] = run.data.window_rows
    return changed_settings(before, run, file)
