"""What `limoe submit` finds out on the login node, without torch, so that a job does not find it out hours later."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.formula import Estimate, estimate
from launch.train import check_start, fit_to_ranks, given
from limoe_dist.config.errors import UserError
from limoe_dist.config.rules import ConfigError, check
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import load_manifest
from limoe_dist.data.mixture import with_home
from limoe_dist.data.places import is_remote, local
from slurm.options import Job, bytes_of
from slurm.scheduler import known, queue
from slurm.submissions import read

NEAR = 4
"""Numbers of nodes that are named below and above the one that was asked for."""
GB = 1e9


@dataclass(frozen=True)
class Checked:
    run: Run
    """With microbatches for these ranks, where it goes on on another number of them."""
    rank: Estimate
    dtype: str
    checkpoints: int
    """That are still to find room: those that are kept and one that is being written, less those that are there."""
    free: int
    """Bytes on the file system of RUN."""
    node_counts: tuple[int, ...]
    """Numbers of nodes near by that can share the batch too."""


def check_all(run: Run, out: Path, job: Job, *, resume: bool, words: list[str]) -> Checked:
    """Everything that can be known before a job starts. words: those of `limoe train`. Raises UserError."""
    job.check_signal(run.train.stop_grace_s)
    counts = node_counts(run, job)
    try:
        if resume and not given("--train.microbatch-pairs", words):
            run = fit_to_ranks(run, out, world=job.ranks, tells=True)
        check_start(run, out, world=job.ranks, resume=resume, alone=True)
    except ConfigError as error:
        if job.nodes in counts:
            raise
        fitting = f"numbers of nodes that fit these settings: {', '.join(map(str, counts))}"
        if not counts:
            fitting = "no number of nodes with so many fits these settings: give another --ranks-per-node or batch"
        raise UserError(
            f"{error}\n--nodes {job.nodes} makes {job.ranks} ranks, {job.per_node} on each; {fitting}"
        ) from None
    _check_tokenizer(run)
    _check_folder(out, run, resume=resume)
    rank, dtype = _check_memory(run, job)
    there = len(_checkpoints(out))
    room = max(1, run.checkpoint.keep + 1 - there)
    return Checked(run, rank, dtype, room, _check_space(run, out, room * rank.checkpoint), counts)


def node_counts(run: Run, job: Job) -> tuple[int, ...]:
    """The numbers of nodes nearest to --nodes, at most NEAR on each side, on which the run could be laid out."""
    # Microbatches are fitted to the ranks when a run goes on.
    whole = run.model_copy(update={"train": run.train.model_copy(update={"microbatch_pairs": 0})})
    groups = run.train.batch_pairs // (run.moe.group_pairs if run.moe.blocks else 1)
    fitting = []
    for nodes in range(1, groups // job.per_node + 1):
        if groups % (nodes * job.per_node) == 0:
            try:
                check(whole, world=nodes * job.per_node)
            except ConfigError:
                continue
            fitting.append(nodes)
    below, above = [n for n in fitting if n < job.nodes], [n for n in fitting if n > job.nodes]
    return (*below[-NEAR:], *((job.nodes,) if job.nodes in fitting else ()), *above[:NEAR])


def _check_tokenizer(run: Run) -> None:
    home = with_home(run.data).manifest
    manifest = load_manifest(home)
    entry = manifest.tokenizer
    if is_remote(home) or is_remote(run.data.tokenizer):
        # Its text is not fetched for this; what the manifest tells of it is.
        if not run.data.tokenizer and entry is None:
            raise UserError(f"data.tokenizer is empty, and {home} names none: give data.tokenizer")
        if not run.data.tokenizer and entry is not None and entry.vocab_size > run.text.vocab_size:
            raise UserError(
                f"{home}: its tokenizer has {entry.vocab_size} pieces, more than text.vocab_size={run.text.vocab_size}"
            )
        return
    from limoe_dist.data.tokenizer import open_tokenizer

    path = local(home)
    open_tokenizer(run, manifest, path if path.is_dir() else path.parent)


def _check_folder(out: Path, run: Run, *, resume: bool) -> None:
    """Raises UserError where RUN cannot be written, is trained in now, has a job in the queue, or is done."""
    from limoe_dist.checkpoint.catalog import step_of
    from limoe_dist.train.folder import trainer

    if not os.access(existing(out), os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {existing(out)} cannot be written: choose another --out")
    owner = None
    # Where the file system has no locks nobody can tell; the job itself will see.
    with suppress(UserError):
        owner = trainer(out)
    if owner:
        raise UserError(f"{out} is being trained by {owner}: wait for it, or choose another --out")
    jobs = [job for submission in read(out) for job in submission.jobs]
    for number, found in (known(lambda: queue(jobs)) or {}).items():
        if found.waits or found.runs:
            raise UserError(
                f"{out} has job {number} in the queue ({found.state.lower()}): wait for it, or `scancel {number}` first"
            )
    steps = [step_of(path) for path in _checkpoints(out)]
    if resume and steps and max(steps) >= run.train.steps:
        raise UserError(f"{out} is done: it has a checkpoint of step {max(steps)} of train.steps={run.train.steps}")


def _check_memory(run: Run, job: Job) -> tuple[Estimate, str]:
    """Raises UserError where weights and state alone are more than there is."""
    dtype: Literal["fp32", "fp64", "bf16"] = "fp32" if job.gpus_per_node == 0 else "bf16"
    if run.train.dtype != "auto":
        dtype = run.train.dtype
    rank = estimate(run, world=job.ranks, dtype=dtype)
    if job.gpus_per_node:
        together, most = rank.sum * (job.per_node // job.gpus_per_node), job.gpu_gb * GB
        place = f"--gpu-gb {job.gpu_gb:g}"
    else:
        together, most = rank.sum * job.per_node, bytes_of(job.mem) or math.inf
        place = f"--mem {job.mem} of a node with {job.per_node} ranks"
    if together > most and run.optim.engine == "native":
        raise UserError(
            f"weights and optimizer state alone take {size(together)} of {place} ({dtype}, {job.ranks} ranks, "
            f"tp={run.parallel.tp}, ep={run.parallel.ep}), and activations come on top: use more ranks, a larger "
            "--parallel.ep or --parallel.tp, or --optim.name adafactor (`limoe plan` tells what holds what)"
        )
    return rank, dtype


def _check_space(run: Run, out: Path, wanted: int) -> int:
    free = shutil.disk_usage(existing(out)).free
    if free < wanted:
        raise UserError(
            f"--out {out}: {size(free)} are free there, but checkpoint.keep={run.checkpoint.keep} and the one "
            f"that is being written take {size(wanted)} more: make room, choose another --out, or lower "
            "--checkpoint.keep"
        )
    return free


def size(number: float) -> str:
    return f"{number / GB:.3g} GB" if number >= GB else f"{number / 1e6:.3g} MB"


def existing(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def _checkpoints(out: Path) -> list[Path]:
    from limoe_dist.checkpoint.catalog import checkpoints

    return checkpoints(out)
