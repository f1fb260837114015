"""Slurm's commands: what is asked of them, and what they answer. Nothing else in the project runs one.

Times are Unix seconds. The answers are read from formats that Slurm 22.05 and later print alike; its JSON is not built
in everywhere. Every function raises UserError, in one line, where a command is missing, the controller does not answer
in TIMEOUT_S, or Slurm refuses; `known` is for those who can do without.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from limoe_dist.config.errors import UserError

T = TypeVar("T")
TIMEOUT_S = 30.0
"""Slurm's own commands give up after some seconds where the controller is off, but not where it is stuck."""
LOST = frozenset({"DOWN", "NOT_RESPONDING", "FAIL", "ERROR"})
"""States of a node on which nothing more was to be expected of a rank. One that is drained finishes what it has."""
# These change which jobs are listed, and how.
_FORMATTING = ("SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS")


@dataclass(frozen=True)
class Queued:
    """A job that the controller has: it waits, runs, or ended minutes ago."""

    job: str
    state: str
    """PENDING, RUNNING, COMPLETING, ...: Slurm's long names."""
    reason: str
    """Why it waits; empty where it does not."""
    start: float | None
    """Actual or expected; None: Slurm does not know it yet."""
    end: float | None
    left_s: float | None
    """Seconds to its time limit; None: none, or not known."""
    nodes: str
    """Compressed list; empty where it has none."""

    @property
    def waits(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")

    @property
    def runs(self) -> bool:
        """Whether processes of it may be there."""
        return self.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")


@dataclass(frozen=True)
class Past:
    """One attempt of a job by the accounting; a requeued job has several."""

    job: str
    state: str
    """COMPLETED, FAILED, TIMEOUT, NODE_FAIL, PREEMPTED, CANCELLED, REQUEUED, ..."""
    exit: str
    """STATUS:SIGNAL of the batch script."""
    start: float | None
    end: float | None
    nodes: str


@dataclass(frozen=True)
class Node:
    name: str
    states: frozenset[str]
    """IDLE, ALLOCATED, DOWN, DRAIN, NOT_RESPONDING, ...: base state and flags."""
    slurmd_start: float | None
    boot: float | None = None

    @property
    def lost(self) -> bool:
        return bool(self.states & LOST)


def known(ask: Callable[[], T]) -> T | None:
    """The answer; None where Slurm is not here or gives none."""
    try:
        return ask()
    except UserError:
        return None


def queue(jobs: Sequence[str]) -> dict[str, Queued]:
    """Of these jobs, those that the controller still has."""
    if not jobs:
        return {}
    try:
        text = _run("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "-o", "%i|%T|%S|%e|%L|%N|%r")
    except UserError as error:
        # A single job that the controller has forgotten is an error, several are not.
        if "Invalid job id" in str(error):
            return {}
        raise
    found = {}
    for line in text.splitlines():
        if len(fields := line.strip().split("|", 6)) == 7:
            job, state, start, end, left, nodes, reason = fields
            reason = "" if reason in ("None", "(null)") else reason
            found[job] = Queued(job, state, reason, _time(start), _time(end), duration(left), nodes)
    return found


def history(jobs: Sequence[str]) -> list[Past]:
    """What the accounting has of these jobs, one entry for each attempt; empty where the site keeps none."""
    if not jobs:
        return []
    fields = "JobIDRaw,State,ExitCode,Start,End,NodeList"
    words = ("--noheader", "--parsable2", "--allocations", "--duplicates")
    try:
        text = _run("sacct", *words, f"--jobs={','.join(jobs)}", f"--format={fields}")
    except UserError as error:
        if "accounting storage is disabled" in str(error):
            return []
        raise
    past = []
    for line in text.splitlines():
        if len(parts := line.split("|")) == 6:
            job, state, status, start, end, names = parts
            # CANCELLED comes as "CANCELLED by UID".
            word, names = (state.split() or [""])[0], "" if names == "None assigned" else names
            past.append(Past(job, word, status, _time(start), _time(end), names))
    return past


def nodes(names: Sequence[str]) -> dict[str, Node]:
    """The nodes by name; those that Slurm does not know are left out."""
    if not names:
        return {}
    done = _answer("scontrol", "--oneliner", "show", "node", ",".join(names))
    found = {}
    for line in done.stdout.splitlines():
        # A node's reason is free text and comes last: the first of each is the true one.
        name, state = re.search(r"\bNodeName=(\S+)", line), re.search(r"\bState=(\S+)", line)
        if name and state:
            # IDLE*: it does not respond. DOWN+NOT_RESPONDING: the same, as scontrol has it.
            states = frozenset(re.findall(r"[A-Z_]+", state[1])) | ({"NOT_RESPONDING"} if "*" in state[1] else set())
            slurmd, boot = (_time_in(line, field) for field in ("SlurmdStartTime", "BootTime"))
            found[name[1]] = Node(name[1], states, slurmd, boot)
    if not found and done.returncode and "not found" not in done.stdout + done.stderr:
        raise _refused("scontrol", done)
    return found


def is_preempted(job: str) -> bool:
    """Whether Slurm takes the nodes away from this start of a job, for another one; a grace period may go on."""
    line = _run("scontrol", "--oneliner", "show", "job", job)
    began, taken = _time_in(line, "StartTime"), _time_in(line, "PreemptTime")
    # A start before this one may have been preempted too.
    return taken is not None and (began is None or taken >= began)


OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Which Slurm, and as whom. All other SLURM_ variables are those of a job, and would be taken for the new one's."""
_NEVER = frozenset({"TIMELIMIT", "ARRAY_INX", "REQUEUE", "NO_REQUEUE", "WAIT"})


def submit(
    script: Path, *, dependency: str = "", exclude: str = "", options: Sequence[str] = (), test_only: bool = False
) -> str:
    """Hands the script to Slurm; returns the number of the job.

    test_only: nothing is submitted, and what comes back is the line about when and where the job could start.
    dependency: as `afterany:123`; exclude: hosts, comma separated; options: any others of sbatch.
    Of the environment, what would win over lines of the script is kept from sbatch, and so from the job.
    Raises UserError with Slurm's reason.
    """
    words = ["--parsable", *options]
    words += [f"--dependency={dependency}"] if dependency else []
    words += [f"--exclude={exclude}"] if exclude else []
    words += ["--test-only"] if test_only else []
    done = _answer("sbatch", *words, str(script), environ=_for_a_new_job(script))
    if done.returncode:
        raise _refused("sbatch", done)
    if test_only:
        return _sentence(done.stderr)
    # NUMBER, or NUMBER;CLUSTER where there are several clusters.
    job = done.stdout.strip().partition(";")[0]
    if not re.fullmatch(r"\d+(_\S+)?", job):
        raise UserError(f'sbatch told no number of a job, but "{done.stdout.strip()}": look with `squeue --me`')
    return job


def _for_a_new_job(script: Path) -> dict[str, str]:
    """The environment for sbatch. Where this is a job itself, the new one must not seem to be a step of it."""
    text = script.read_text(encoding="utf-8") if script.exists() else ""
    lines = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    ours = _NEVER | {name.upper().replace("-", "_") for name in lines}
    if "mem" in lines:
        ours |= {"MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"}
    dropped = {name for name in os.environ if name.startswith("SLURM_") and name not in OF_THE_SITE}
    dropped |= {f"SBATCH_{name}" for name in ours}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def duration(text: str) -> float | None:
    """Seconds of Slurm's [D-]HH:MM:SS or MM:SS; None for UNLIMITED, NOT_SET, INVALID."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _time(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+", text) and int(text) else None


def _time_in(line: str, field: str) -> float | None:
    """Of a line of scontrol: `Field=1795367541`; None where it is not there, or None or Unknown."""
    found = re.search(rf"\b{field}=(\S+)", line)
    return _time(found[1]) if found else None


def _run(*command: str) -> str:
    done = _answer(*command)
    if done.returncode:
        raise _refused(command[0], done)
    return done.stdout


def _answer(*command: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if environ is None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(_FORMATTING)}
        environ |= {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}
    try:
        return subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on PATH: this is no machine of a Slurm cluster, or its module is not loaded"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} had no answer from Slurm's controller in {TIMEOUT_S:g} s: try again") from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run: {error.strerror}") from None


def _refused(command: str, done: subprocess.CompletedProcess[str]) -> UserError:
    return UserError(f"{command}: {_sentence(done.stderr or done.stdout) or f'failed with status {done.returncode}'}")


def _sentence(text: str) -> str:
    """The lines of a Slurm command as one, without its name in front of each."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Try ")]
    # What is fatal says it; the lines before name functions of Slurm.
    lines = [line for line in lines if ": fatal: " in line] or lines
    return "; ".join(dict.fromkeys(re.sub(r"^\w+: ((error|fatal): )?", "", line) for line in lines))
