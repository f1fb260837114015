"""`limoe ended RUN`: the exit status of a run that ended, for scripts whose launcher makes another one of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from limoe_dist.config.errors import UserError
from limoe_dist.config.exit_codes import DONE, FAILED
from limoe_dist.train.folder import read_end, trainer

ABOUT = """\
Says how the last start of a run ended, and ends with the status that `limoe train` would have ended with: 0 done,
3 stopped by its guard, 75 saved after SIGUSR1 or SIGUSR2, 130 and 143 saved after Ctrl-C and SIGTERM; 1 where it was
killed or still trains; 2 where there is no run."""


@dataclass(frozen=True)
class EndedCommand:
    run: Annotated[Path, tyro.conf.Positional]
    """Directory of a run."""


def main(argv: list[str]) -> int:
    try:
        run = tyro.cli(EndedCommand, args=argv or ["--help"], prog="limoe ended", description=ABOUT).run
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    if not (run / "run.json").is_file():
        raise UserError(f"{run}: there is no run.json: this is not the directory of a run, or it never began")
    if (owner := trainer(run)) is not None:
        print(f"limoe: error: {run} is being trained by {owner}", file=sys.stderr)
        return FAILED
    ended = read_end(run)
    if ended is None:
        print(f"limoe: error: {run}: its ranks were killed or failed before the run had ended", file=sys.stderr)
        return FAILED
    how = "as asked for" if ended.status == DONE else f"after signal {ended.signal}" if ended.signal else ended.reason
    print(f"ended at step {ended.step}, {how} (status {ended.status})")
    return ended.status
