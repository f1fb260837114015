"""What a job asks Slurm for, with the words of `sbatch`; the docstrings are the help of `limoe submit`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from limoe_dist.config.environment import has_password, holds_secret, is_secret
from limoe_dist.config.errors import UserError
from slurm.times import seconds_of, time_problem

MOST_SIGNAL_S = 65_535
EARLY_S = 60
"""Slurm looks at times only now and then: it sends a signal up to so much sooner than it was asked to."""
_MEMORY = re.compile(r"(\d+)([KMGT]?)", re.IGNORECASE)
_HOSTS = re.compile(r"[\w.,\[\]-]+", re.ASCII)
_UNSAFE = re.compile(r"[\n\r\"\\]")
OURS = ("nodes", "ntasks", "ntasks-per-node", "time", "signal", "requeue", "no-requeue", "output", "error", "array")
"""Options of sbatch that the scripts set by themselves, and rely on: a second line of them would win."""


@dataclass(frozen=True)
class Queue:
    """Where a job of any kind waits and runs."""

    time: str = ""
    """Time limit, as 24:00:00, 1-12 or 90: all of Slurm's formats (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM,
    D-HH:MM:SS)."""
    partition: str = ""
    """As of `sbatch`, like the next five."""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    """Hosts to leave out, as gpu[03-05],gpu9."""
    mem: str = ""
    """Memory of a node, as 200G; empty: what the partition gives; 0: all that the node has."""
    job_name: str = ""
    """Empty: limoe- and the last part of --out."""
    sbatch: tuple[str, ...] = ()
    """Any other options of sbatch, without their dashes: --sbatch reservation=friday exclusive mail-user=me@example.com
    mail-type=END,FAIL"""
    env: tuple[str, ...] = ()
    """NAME=VALUE to export in the script. Secrets are refused: jobs inherit the environment of the shell that submits,
    so export them there."""
    modules: tuple[str, ...] = ()
    """Environment modules to load first."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """Run limoe from --container-image: with pyxis (enroot), which adds options to srun, or with apptainer."""
    container_image: str = ""
    """What the container is made from: a .sqsh or .sif file, or a registry's name of it."""
    mounts: tuple[str, ...] = ()
    """HOST or HOST:CONTAINER paths that the container sees, besides the run, its data, and this directory."""
    yes: bool = False
    """Submit without asking."""
    dry_run: bool = False
    """Check everything, print the script alone to standard output, and submit nothing."""

    @property
    def time_limit_s(self) -> int:
        return seconds_of(self.time)

    def check(self) -> None:
        """Raises UserError with a line for each option that cannot be written into a script."""
        problems = [] if (problem := time_problem(self.time)) is None else [problem]
        if self.mem and not _MEMORY.fullmatch(self.mem):
            problems.append(f"--mem {self.mem}: must be a whole number with K, M, G or T, as 200G; 0 for all of a node")
        if self.exclude and not _HOSTS.fullmatch(self.exclude):
            problems.append(f"--exclude {self.exclude!r}: must be hosts with commas and no blanks, as gpu[03-05],gpu9")
        problems += [problem for text in self.sbatch if (problem := _line_problem(text))]
        problems += [problem for text in self.env if (problem := _variable_problem(text))]
        if (self.container == "none") == bool(self.container_image):
            problems.append(
                f"--container {self.container} and --container-image {self.container_image or '(none)'}: give both, as "
                "--container apptainer --container-image limoe.sif, or neither"
            )
        if self.mounts and self.container == "none":
            problems.append(f"--mounts {' '.join(self.mounts)}: needs --container pyxis or apptainer")
        for field in fields(Queue):
            values = getattr(self, field.name)
            for value in (values,) if isinstance(values, str) else values if isinstance(values, tuple) else ():
                if _UNSAFE.search(value):
                    name = field.name.replace("_", "-")
                    problems.append(f"--{name} {value!r}: cannot hold quotes, backslashes or line ends")
        if problems:
            raise UserError("\n".join(problems))


@dataclass(frozen=True)
class Job(Queue):
    """A training job."""

    nodes: int = 1
    """Hosts."""
    gpus_per_node: int = 8
    """GPUs of each host; 0: train on CPUs."""
    ranks_per_node: int = 0
    """Ranks of each host, one task each; 0: one for each GPU. Must be given for CPU nodes."""
    cpus_per_rank: int = 0
    """Cores of each rank; 0: parallel.threads + data.threads."""
    signal: Literal["USR2", "USR1", "TERM"] = "USR2"
    """What Slurm sends the ranks before the time limit, to save. After USR1 and USR2 the job goes on, with --requeue or
    --chain; TERM is an end."""
    signal_before: int = 0
    """Seconds before the time limit; 0: train.stop_grace_s and 60 more (Slurm looks only every 30 s or so)."""
    requeue: bool = False
    """The job puts itself into the queue again: at its time limit, and where a host or rank failed. Slurm does so
    after a preemption or a host that died."""
    chain: int = 0
    """Submit this many jobs at once, each to begin when the one before has ended: where requeueing is not allowed."""
    gpu_gb: float = 80.0
    """Memory of a GPU in gigabytes, for the check of what weights and optimizer take."""

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def before_s(self, stop_grace_s: float) -> int:
        """Seconds before the time limit at which the ranks are told to save."""
        return self.signal_before or int(stop_grace_s) + 60

    def check(self) -> None:
        super().check()
        problems = [
            f"--{name.replace('_', '-')} {getattr(self, name)}: must be {least} or more"
            for name, least in (
                ("nodes", 1), ("gpus_per_node", 0), ("ranks_per_node", 0), ("cpus_per_rank", 0), ("signal_before", 0)
            )
            if getattr(self, name) < least
        ]  # fmt: skip
        if not self.per_node:
            problems.append(
                "--ranks-per-node is missing: with --gpus-per-node 0 nobody but you knows how many ranks a node bears; "
                "one for each socket is a good start"
            )
        if self.gpus_per_node and self.per_node % self.gpus_per_node:
            problems.append(
                f"--ranks-per-node {self.ranks_per_node} on --gpus-per-node {self.gpus_per_node}: some GPUs would bear "
                f"more ranks than others: use {self.gpus_per_node}, one rank for each GPU"
            )
        if self.requeue and self.chain:
            problems.append("--requeue and --chain both say what follows the time limit: give one of them")
        if self.chain < 0 or self.chain == 1:
            problems.append(f"--chain {self.chain}: must be 2 or more jobs")
        if self.gpu_gb <= 0:
            problems.append(f"--gpu-gb {self.gpu_gb:g}: must be above 0")
        if problems:
            raise UserError("\n".join(problems))

    def check_signal(self, stop_grace_s: float) -> None:
        """Raises UserError where the time limit leaves no time to train, or to save."""
        before, limit = self.before_s(stop_grace_s), self.time_limit_s
        if before > MOST_SIGNAL_S:
            raise UserError(f"--signal-before {before}: Slurm takes at most {MOST_SIGNAL_S} seconds")
        if before + EARLY_S >= limit:
            raise UserError(
                f"--time {self.time} is {limit} seconds, and the ranks are told to save {before} seconds before its "
                f"end, at times {EARLY_S} earlier: nothing would be trained: use a longer --time, or a shorter "
                "--signal-before or --train.stop-grace-s"
            )


@dataclass(frozen=True)
class Array(Queue):
    """An array of jobs that prepare data, a unit of work each."""

    tasks: int = 0
    """Units into which the work is cut: one index of the array each. What is written does not depend on it."""
    concurrent: int = 0
    """Most indices that run at once; 0: as many as there is room for."""
    indices: str = ""
    """Submit these alone, as 3,5 or 0-3,7: those that failed. --tasks must be what it was."""
    cpus: int = 1
    """Cores of each index."""
    notes: str = ""
    """Folder for the scripts, and for logs and status of each index; empty: --out of the command with .slurm behind."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The indices that are submitted. Raises UserError."""
        if not self.indices:
            return tuple(range(self.tasks))
        found: set[int] = set()
        for part in self.indices.split(","):
            span = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", part.strip())
            first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
            if not first <= last < self.tasks:
                raise UserError(
                    f"--indices {self.indices}: must be indices from 0 to {self.tasks - 1} (--tasks {self.tasks}), "
                    "as 3,5 or 0-3,7"
                )
            found.update(range(first, last + 1))
        return tuple(sorted(found))

    @property
    def spec(self) -> str:
        """For --array."""
        which = self.indices.replace(" ", "") or f"0-{self.tasks - 1}"
        return which + (f"%{self.concurrent}" if self.concurrent else "")

    def check(self) -> None:
        super().check()
        if self.tasks < 1:
            raise UserError("--tasks is missing: into how many units the work is cut, as --tasks 64")
        if self.concurrent < 0 or self.cpus < 1:
            raise UserError(f"--concurrent {self.concurrent} and --cpus {self.cpus}: must be at least 0 and 1")
        _ = self.numbers


def bytes_of(memory: str) -> int | None:
    """Of --mem, where it says a size: Slurm counts in MiB where no unit stands."""
    found = _MEMORY.fullmatch(memory)
    if not found or not int(found[1]):
        return None
    return int(found[1]) << {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[found[2].upper()]


def with_secrets(words: list[str]) -> list[str]:
    """The words of a command line that hold a user name with a password, as in s3://me:word@host/."""
    return [word for word in words if has_password(word)]


def _line_problem(text: str) -> str | None:
    name = re.split("[= ]", text.lstrip("-"))[0]
    if not re.fullmatch("[a-zA-Z][a-zA-Z-]*", name):
        return f"--sbatch {text}: must be an option of sbatch such as reservation=friday"
    if name in OURS:
        return f"--sbatch {text}: the script sets {name} by itself; `limoe submit --help` has an option for it"
    return None


def _variable_problem(text: str) -> str | None:
    name, sign, value = text.partition("=")
    if not sign or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        return f"--env {text}: must be NAME=VALUE"
    if is_secret(name) or holds_secret(value):
        return (
            f"--env {name}: looks like a secret, which would stand in the script: export it in the shell that submits; "
            "the job gets the environment of that shell"
        )
    return None
