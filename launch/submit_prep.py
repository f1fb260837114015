"""`limoe submit-prep`: preparation of data as a Slurm array, one unit of work for each index."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from launch.submit import agreed, show, try_out
from launch.submit_checks import existing
from launch.submit_words import check_encoding, options_of, split
from limoe_dist.config.errors import UserError, nearest, warn
from slurm.options import Array, with_secrets
from slurm.scheduler import submit
from slurm.script import Preparation, render_preparation
from slurm.submissions import Draft
from slurm.times import written

COMMANDS = ("download", "pack", "retry-failed")
"""Of `limoe prep`, those whose work is cut into units."""

USAGE = f"""\
usage: limoe submit-prep --time T --tasks N [--concurrent M] [--indices LIST] [options] -- COMMAND [its options]

COMMAND is one of {", ".join(COMMANDS)}. Index I of the array does `limoe prep COMMAND ... --unit I/N`. An index that
fails is put into the queue again, twice at most, but not one that ends with 2, which a person has to mend; one whose
host dies is put there by Slurm. When all have ended, a second job writes which of them failed, with the command
that submits those alone, into NOTES/001/report.log.

  limoe submit-prep --time 8:00:00 --tasks 64 --concurrent 16 --cpus 8 --mem 16G -- \\
      pack --source lists/*.parquet --out shards/web --workers 8

`limoe submit-prep --help` lists the options, `limoe prep COMMAND --help` those of the command.

exit status: 0 submitted, 2 an option that you can mend, or Slurm refused"""


def main(argv: list[str]) -> int:
    if not argv or argv in (["-h"], ["--help"]):
        print(USAGE, flush=True)
        if argv:
            options_of(Array, ["--help"], prog="limoe submit-prep")
        return 0 if argv else 2
    check_encoding(argv)
    array, words = understand(argv)
    preparation = _preparation(array, words, _again(argv))
    text, report = render_preparation(array, preparation)
    about = [
        f"indices   {len(array.numbers)} of {array.tasks} units of work, {array.cpus} cores and "
        f"{written(array.time_limit_s)} each" + (f", {array.concurrent} at once" if array.concurrent else ""),
        f"notes     {preparation.notes}",
        f"logs      {preparation.log}",
    ]
    if array.dry_run:
        print("\n".join(about), file=sys.stderr, flush=True)
        print(text, end="", flush=True)
        return 0
    start = try_out(text)
    show(text, preparation.script)
    print("\n".join([*about, start]), flush=True)
    if not agreed(array, "Submit this array?"):
        return 2
    return _hand_in(preparation, text, report)


def understand(argv: list[str]) -> tuple[Array, tuple[str, ...]]:
    """The options of the array, and the words of `limoe prep`. Raises UserError."""
    if "--" not in argv:
        raise UserError(
            "the command of limoe prep comes after `--`, as in `limoe submit-prep --tasks 8 ... -- pack ...`"
        )
    middle = argv.index("--")
    before, words = argv[:middle], tuple(argv[middle + 1 :])
    mine, others = split(before, Array)
    if others:
        raise UserError(f"unknown option {others[0]}{nearest(others[0], _names())} (see `limoe submit-prep --help`)")
    array = options_of(Array, mine, prog="limoe submit-prep")
    if not words or words[0] not in COMMANDS:
        given = words[0] if words else "nothing"
        raise UserError(f"after `--` comes {given}: only {', '.join(COMMANDS)} can be cut into units of work")
    if any(word.partition("=")[0] == "--unit" for word in words):
        raise UserError("--unit: each index of the array is a unit of its own: leave it out")
    if with_secrets(list(words)):
        raise UserError(
            "a password in a URL would stand in the script: leave it to the environment, which the job gets"
        )
    array.check()
    return array, words


def _preparation(array: Array, words: tuple[str, ...], again: str) -> Preparation:
    place = _notes(array, words)
    try:
        number = max((int(path.stem) for path in place.glob("*.sbatch") if path.stem.isdigit()), default=0) + 1
        notes = place / f"{number:03d}"
        # Slurm opens logs before a line of the script runs, and a dry run makes no folder for them.
        log = existing(place) / f"{place.name}-{notes.name}-%a.log" if array.dry_run else notes / "%a.log"
    except OSError as error:
        raise UserError(f"{place}: cannot be looked at: {error.strerror}") from None
    return Preparation(words, notes.with_suffix(".sbatch"), notes, log, Path.cwd(), again)


def _names() -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in Array.__dataclass_fields__]


def _notes(array: Array, words: tuple[str, ...]) -> Path:
    """The folder of scripts and logs. Raises UserError where nothing names one."""
    if array.notes:
        return Path(array.notes).absolute()
    for place, word in enumerate(words):
        if word.startswith("--out="):
            return _beside(word.removeprefix("--out="))
        if word == "--out" and place + 1 < len(words):
            return _beside(words[place + 1])
    raise UserError(f"--notes is missing: a folder for logs, since `prep {words[0]}` has no --out here")


def _beside(out: str) -> Path:
    path = Path(out).absolute()
    return path.with_name(path.name + ".slurm")


def _again(argv: list[str]) -> str:
    """This command for some indices; bash puts their numbers into the place of INDICES."""
    middle = argv.index("--")
    kept, skip = [], False
    for word in argv[:middle]:
        if skip or word.partition("=")[0] == "--indices":
            skip = word == "--indices"
            continue
        kept.append(word)
    return shlex.join(["limoe", "submit-prep", *kept, "--indices", "INDICES", *argv[middle:]])


def _hand_in(preparation: Preparation, text: str, report: str) -> int:
    script = preparation.script
    drafts = [Draft(script, text)]
    try:
        # Slurm opens the logs before a line of the script runs.
        drafts.append(Draft(preparation.notes / "report.sbatch", report))
        job = submit(script)
    except UserError:
        for draft in reversed(drafts):
            draft.discard()
        raise
    print(f"submitted array {job}")
    print(f"  how it goes      squeue --jobs {job}")
    try:
        last = submit(drafts[1].script, dependency=f"afterany:{job}")
    except UserError as error:
        # The array is in the queue, and needs no report.
        later = shlex.quote(str(drafts[1].script))
        warn(f"no job will tell which indices failed: {error}; when all have ended: bash {later}")
        print(f"  cancel           scancel {job}")
        return 0
    log = shlex.quote(str(preparation.notes / "report.log"))
    print(f"  which failed     cat {log}    (job {last}, when all have ended)")
    print(f"  cancel           scancel {job} {last}")
    return 0
