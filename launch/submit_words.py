"""The words of `limoe submit` and `limoe submit-prep`: which are a job's, which the run's, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import tyro

from launch.train import TrainCommand, parse
from limoe_dist.config.errors import UserError, nearest
from limoe_dist.config.schema import Run
from slurm.options import Job, Queue, with_secrets
from slurm.submissions import folder

Options = TypeVar("Options", bound=Queue)


@dataclass(frozen=True)
class Submit:
    """A command line of `limoe submit`, understood."""

    job: Job
    command: TrainCommand
    run: Run
    words: tuple[str, ...]
    """Those of `limoe train`."""

    @property
    def out(self) -> Path:
        return Path(self.command.resume or self.command.out).absolute()

    @property
    def resume(self) -> bool:
        return bool(self.command.resume)


def understand(argv: list[str]) -> Submit:
    """Raises UserError; SystemExit where an option's value is none, as tyro does."""
    job_words, words = split(argv, Job)
    prog = f"limoe submit {words[0]}" if words and not words[0].startswith("-") else "limoe submit"
    if "--help" in words or "-h" in words:
        job_words = ["--help"]
    job = options_of(Job, job_words, prog=prog)
    known_options(words)
    if not words:
        raise UserError("give a preset, as in `limoe submit tiny ...`, or a recipe, or a FILE.json; or --resume RUN")
    if secret := with_secrets(words):
        # The secret itself is not said again.
        raise UserError(
            f"a password in a URL ({secret[0].partition('://')[0]}://...) would stand in the script: leave it to the "
            "environment of the shell that submits, which the job gets"
        )
    job.check()
    command, run = parse(words)
    return Submit(job, command, run, tuple(words))


def options_of(kind: type[Options], words: Sequence[str], *, prog: str) -> Options:
    """A job's options from their words."""
    about = f"Options of the job, besides those of {prog.replace('submit', 'train', 1)}."
    return tyro.cli(kind, args=words, prog=prog, description=about, config=(tyro.conf.FlagCreatePairsOff,))


def split(argv: Sequence[str], kind: type[Queue]) -> tuple[list[str], list[str]]:
    """The words of a job's options with their values, and all others."""
    options = {f"--{field.name.replace('_', '-')}": str(field.type) for field in fields(kind)}
    mine: list[str] = []
    others: list[str] = []
    taking = 0
    for word in argv:
        name, sign, _ = word.partition("=")
        name = name.replace("_", "-")
        if word.startswith("--"):
            taking = 0
            if name in options:
                many = 0 if options[name] == "bool" else len(argv) if options[name].startswith("tuple") else 1
                taking = 0 if sign and many == 1 else many
                mine.append(word)
                continue
        elif taking:
            taking -= 1
            mine.append(word)
            continue
        others.append(word)
    return mine, others


def known_options(words: Sequence[str]) -> None:
    """Raises UserError for an option that neither a job nor a run has: tyro knows only its own half."""
    known = [f"--{field.name.replace('_', '-')}" for kind in (Job, TrainCommand) for field in fields(kind)]
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in ("--ranks", "--launcher"):
            raise UserError(f"{name}: srun starts the ranks, --nodes times --ranks-per-node: leave it out")
        if name.startswith("--") and "." not in name and name not in known:
            raise UserError(f"unknown option {name}{nearest(name, known)} (see `limoe submit --help`)")


def check_encoding(argv: Sequence[str]) -> None:
    """Raises UserError for a word with a byte that is no UTF-8, as which a script is written."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{word!r} is no UTF-8, as which a script is written: choose another name") from None


def bad_hosts(out: Path) -> str:
    """The hosts on which this run failed twice, for --exclude; what is no name of a host is passed over."""
    try:
        text = (folder(out) / "exclude").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # A person may have written gpu[03,05] into it.
    parts = re.split(r"[\s,]+(?![^\[]*\])", text)
    return ",".join(part for part in parts if re.fullmatch(r"[\w.-]+(\[[\d,-]+\])?", part, re.ASCII))


def without(job: Job, hosts: str) -> Job:
    return replace(job, exclude=",".join(filter(None, [job.exclude, hosts])))
