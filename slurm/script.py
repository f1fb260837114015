"""Batch scripts from templates: what a person can read, change and give to sbatch by hand."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from limoe_dist.config.errors import UserError
from slurm.options import Array, Job, Queue
from slurm.scheduler import OF_THE_SITE
from slurm.times import written

RETRIES = 2
"""Restarts of an index that failed."""


@dataclass(frozen=True)
class Training:
    """What a training script does."""

    run: Path
    """RUN, absolute."""
    script: Path
    """Where the script itself will stand: it puts itself there where it was handed to sbatch under another name."""
    log: Path
    """With %j for the number of the job. Slurm opens it before a line of the script runs: its folder must be there."""
    start: tuple[str, ...]
    """Words after `limoe train` that begin the run; empty where it goes on from the first start."""
    go_on: tuple[str, ...]
    """Words after `limoe train --resume RUN`."""
    threads: int
    """OMP_NUM_THREADS of a rank."""
    cpus_per_rank: int
    before_s: int
    wait_s: int
    """Seconds that ranks have to leave after the first of them has."""
    folder: Path
    """From where it is submitted, absolute: relative paths mean the same in the job."""
    mounts: tuple[str, ...] = ()
    """Folders that the container has to see."""


def render_training(job: Job, training: Training) -> str:
    """The script of a training job. Raises UserError for a path that cannot stand in a script."""
    check_path(training.run)
    check_folder(training.folder)
    return _render(
        "train.sbatch.j2",
        job=job,
        name=job.job_name or f"limoe-{training.run.name}",
        time=written(job.time_limit_s),
        training=training,
        limoe=command(job, training.mounts, gpus=job.gpus_per_node > 0, alone=True),
        ranks_limoe=command(job, training.mounts, gpus=job.gpus_per_node > 0, alone=False),
        srun=_container_options(job, training.mounts),
        keep=OF_THE_SITE,
        lines=option_lines(job),
    )


@dataclass(frozen=True)
class Preparation:
    """What the script of an array does."""

    words: tuple[str, ...]
    """After `limoe prep`."""
    script: Path
    notes: Path
    """Folder of the indices' ends, absolute."""
    log: Path
    """With %a for the index, in a folder that will be there."""
    folder: Path
    """From where it is submitted, absolute."""
    again: str
    """The command that submits some indices anew, with INDICES in their place."""


def render_preparation(array: Array, preparation: Preparation) -> tuple[str, str]:
    """The script of an array of units of work, and the one that tells which of them failed. Raises UserError."""
    check_path(preparation.notes)
    check_folder(preparation.folder)
    name = array.job_name or f"limoe-{preparation.words[0]}"
    common = {"name": name, "notes": preparation.notes}
    one = _render(
        "prepare.sbatch.j2",
        **common,
        array=array,
        tasks=array.tasks,
        log=preparation.log,
        retries=RETRIES,
        words=preparation.words,
        time=written(array.time_limit_s),
        folder=preparation.folder,
        limoe=command(array, [str(preparation.folder)], gpus=False, alone=True),
        lines=option_lines(array),
    )
    report = replace(array, mem="", exclude="", constraint="", sbatch=())
    return one, _render(
        "report.sbatch.j2",
        **common,
        script=preparation.script,
        indices=array.numbers,
        again=preparation.again,
        lines=option_lines(report),
    )


def command(queue: Queue, mounts: Sequence[str], *, gpus: bool, alone: bool) -> list[str]:
    """The words that start limoe in a job. alone: once, from the batch script; else as a task that srun started."""
    if queue.container == "none":
        return [sys.executable, "-m", "limoe_dist"]
    if queue.container == "apptainer":
        binds = [word for mount in (*mounts, *queue.mounts) for word in ("--bind", mount)]
        return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, queue.container_image, "limoe"]
    if alone:
        # Pyxis is a plugin of srun: outside of a step there is no container.
        one = ["--overlap", "--nodes=1", "--ntasks=1", "--quiet"]
        return ["srun", *one, *_container_options(queue, mounts), "limoe"]
    return ["limoe"]


def _container_options(queue: Queue, mounts: Sequence[str]) -> list[str]:
    """Of srun; only pyxis has some."""
    if queue.container != "pyxis":
        return []
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in (*mounts, *queue.mounts)]
    return [f"--container-image={queue.container_image}", *([f"--container-mounts={','.join(pairs)}"] if pairs else [])]


def option_lines(queue: Queue) -> list[str]:
    """Of #SBATCH, those that every kind of job may have."""
    given = {name: getattr(queue, name) for name in ("partition", "account", "qos", "constraint", "exclude", "mem")}
    lines = [f"--{name}={quoted(value)}" for name, value in given.items() if value]
    for text in queue.sbatch:
        name, sign, value = text.lstrip("-").partition("=")
        lines.append(f"--{name}={quoted(value)}" if sign else f"--{name}")
    return lines


def quoted(value: object) -> str:
    """As sbatch reads it in a line of options: with double quotes where there are blanks."""
    text = str(value)
    return f'"{text}"' if any(letter in text for letter in " \t#'") else text


def quoted_word(word: str) -> str:
    """A word for bash. A comma in an array would be no fault, but looks like one."""
    return f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word)


def check_path(path: Path) -> None:
    """Raises UserError where sbatch would read something else than this path in the name of a log."""
    if "%" in str(path):
        raise UserError(f"{str(path)!r} holds '%', which sbatch changes in the name of a log: choose a path without it")
    check_folder(path)


def check_folder(path: Path) -> None:
    """Raises UserError where sbatch would read something else than this path in an option of the script."""
    if found := next((letter for letter in '"\\\n\r' if letter in str(path)), None):
        raise UserError(f"{str(path)!r} holds {found!r}, which sbatch would not read as it stands: choose another path")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!r} is no UTF-8, as which a script is written: choose another path") from None


def wrapped(words: Sequence[str], *, indent: int = 4, width: int = 112) -> str:
    """Words of a bash array, quoted, an option with its values on a line where it is long."""
    text = " ".join(quoted_word(word) for word in words)
    if len(text) <= width:
        return text
    lines: list[list[str]] = []
    for word in words:
        if not lines or word.startswith("--"):
            lines.append([])
        lines[-1].append(quoted_word(word))
    return ("\n" + " " * indent).join(["", *(" ".join(line) for line in lines)]) + "\n"


@cache
def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Bash writes the length of an array as ${#name[@]}.
        comment_start_string="<#",
        comment_end_string="#>",
        # A batch script is no HTML: what goes into bash is quoted by `q`.
        autoescape=False,
    )
    found.filters.update(q=lambda value: quoted_word(str(value)), words=wrapped, opt=quoted)
    return found


def _render(template: str, **names: object) -> str:
    return _templates().get_template(template).render(**names)
