"""`limoe train`: checks everything that can be checked before a rank starts, starts ranks, trains."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from launch.launchers import VARIABLE, Launcher
from launch.named import listing, run_named
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run
from limoe_dist.config.rules import check, fit_microbatches
from limoe_dist.config.schema import CountOrZero, Data, Run
from limoe_dist.data.manifest import load_manifest
from limoe_dist.data.mixture import absolute, crowded, files_of, load_manifests
from limoe_dist.train.preemption import StopFlag, status_after

USAGE = """\
usage: limoe train PRESET|RECIPE|FILE.json --data MANIFEST --out RUN [--ranks N] [any setting]
       limoe train PRESET ... --init-from RUN                             (begin with another run's weights)
       limoe train --resume RUN [--ranks N] [settings that do not decide results]
       torchrun --nproc-per-node N -m limoe_dist train PRESET ...       (the same run)

{listing}
It gives every setting, data and tokenizer too, and every option still overrides one: a copy of a run with one thing
changed is `limoe train runs/first/run.json --out runs/second --optim.lr 5e-4`.

`limoe train PRESET --help` lists every setting with the value that it has there.

Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 save a checkpoint and end; `--resume RUN` goes on from there. --ranks waits
train.stop_grace_s seconds for that save, with each --launcher. Started by hand, launchers have limits and statuses of
their own (docs/launchers.md): under torchrun pass `--shutdown-timeout 120`, and ask `limoe ended RUN` for the status.

--resume goes on on any number of ranks that can share the batch: microbatches are fitted to it, so that no more pairs
are in memory at once than before (--train.microbatch-pairs decides otherwise); where they no longer divide, give
--parallel.tp and --parallel.ep.

exit status: 0 done, 1 failed, 2 a setting or file that you can mend, 3 stopped by its guard, 130 or 143 saved after
Ctrl-C or SIGTERM, 75 saved after SIGUSR1 or SIGUSR2, which schedulers send before a time limit: to be gone on with"""


@dataclass(frozen=True)
class TrainCommand:
    run: Annotated[Run, tyro.conf.arg(name="")]
    data: str = ""
    """manifest.json of the training shards, in place of all that a FILE.json or a recipe trains on; without those the
    same as --data.manifest. Several at once, with their shares: --data.mixture."""
    out: str = ""
    """Directory of the run: settings, metrics, checkpoints. It must be new or empty."""
    resume: str = ""
    """Directory of a run to go on with, in place of PRESET, --data and --out."""
    init_from: str = ""
    """Directory of a run, or of one of its checkpoints, whose weights the new run begins with; the same as
    --train.init-from. Positions are resized to another image.size or text.length."""
    ranks: int = field(default=1)
    """Ranks to start on this machine; under torchrun, Slurm or MPI the launcher decides."""
    launcher: Launcher = "torchrun"
    """What starts the ranks of --ranks."""
    stop_after: CountOrZero = 0
    """End with a checkpoint after this optimizer step; 0: train to train.steps."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(listing=listing()))
        return 0 if argv else 2
    stop = StopFlag().watch_early()
    command, run = parse(argv)
    out, resume = Path(command.resume or command.out), bool(command.resume)

    from limoe_dist.parallel.place import discover

    place = discover(os.environ)
    alone, problem = place.found_by == "alone", ""
    world = command.ranks if alone else place.world
    try:
        if resume and not given("--train.microbatch-pairs", argv):
            run = fit_to_ranks(run, out, world=world, tells=world == 1 if alone else place.rank == 0)
        check_start(run, out, world=world, resume=resume, alone=alone)
    except UserError as error:
        if alone:
            raise
        # Ranks that were started from outside meet first, to tell it once.
        problem = str(error)
    if alone and command.ranks > 1:
        return _start_ranks(argv, run, out, command, stop)
    # torchrun makes 1 of any status, and tells of a fault at length.
    quiet = VARIABLE in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    return _train(
        run, out, resume=resume, stop_after=command.stop_after or None, quiet=quiet, problem=problem, stop=stop
    )


def check_start(run: Run, out: Path, *, world: int, resume: bool, alone: bool) -> None:
    """What can be checked before a rank starts. Raises UserError."""
    from limoe_dist.train.folder import new_run_problem, resume_problems

    if run.moe.kept_experts:
        raise UserError(
            "moe.kept_experts: experts were taken out by `limoe prune`: such a run is for evaluation, and cannot be "
            "trained; train the run that it was made from"
        )
    check(run, world=world, resumed=resume)
    manifests = load_manifests(run.data)
    for line in crowded(run.data, manifests, batch_pairs=run.train.batch_pairs) if alone else []:
        print(f"limoe: warning: {line}", file=sys.stderr)
    if run.data.validation:
        load_manifest(run.data.validation)
    problems = resume_problems(out, run) if resume else []
    if not resume and alone and (problem := new_run_problem(out)):
        problems = [problem]
    if problems:
        raise UserError("\n".join(problems))


def parse(argv: list[str]) -> tuple[TrainCommand, Run]:
    """The command line on top of a preset, a recipe or a run.json, or of the run.json of a run that goes on."""
    resumed = _value_of("--resume", argv)
    if argv[0].startswith("-"):
        if resumed is None:
            raise UserError(
                "give a preset first, as in `limoe train tiny ...`, or a recipe, or the run.json of another run; or "
                f"--resume RUN (got {argv[0]})"
            )
        if not (Path(resumed) / "run.json").is_file():
            raise UserError(f"--resume {resumed}: there is no run.json: this is not the directory of a run")
        default, options = load_run(Path(resumed) / "run.json"), argv
    else:
        if resumed is not None:
            raise UserError(f"--resume {resumed} goes on with that run's settings: leave out {argv[0]}")
        default, options = run_named(argv[0]), argv[1:]
    prog = f"limoe train {argv[0]}" if resumed is None else "limoe train"
    command = tyro.cli(TrainCommand, args=options, prog=prog, default=TrainCommand(run=default))
    run = command.run
    if resumed is not None:
        if command.out or command.data:
            raise UserError(
                "--resume RUN keeps the run's own --out and --data: leave them out; "
                "where the data has moved, give --data.manifest"
            )
        if command.init_from:
            raise UserError("--resume RUN keeps the weights that the run has: leave out --init-from")
        return command, run.model_copy(update={"data": absolute(run.data)})
    run = run.model_copy(update={"data": absolute(_trained_on(run.data, command.data, options))})
    if not command.out:
        raise UserError("--out is missing: a new directory for the run")
    if command.init_from and not given("--train.init-from", options):
        run = run.model_copy(update={"train": run.train.model_copy(update={"init_from": ""})})
    return command, _begun_from(run, command.init_from)


def _trained_on(data: Data, manifest: str, options: list[str]) -> Data:
    """The settings with --data, which takes the place of what a FILE.json trains on. Raises UserError for no data."""
    if not manifest:
        if data.manifest or data.mixture:
            return data
        raise UserError(
            "--data is missing: the manifest.json that `limoe prep pack` wrote; several: --data.mixture "
            "MANIFEST=WEIGHT MANIFEST=WEIGHT"
        )
    if given("--data.manifest", options) and manifest != data.manifest:
        raise UserError(f"--data {manifest} and --data.manifest {data.manifest} differ: give one of them")
    if given("--data.mixture", options):
        raise UserError(f"--data {manifest} and --data.mixture both say what to train on: leave out --data")
    return data.model_copy(update={"manifest": manifest, "mixture": ()})


def fit_to_ranks(run: Run, out: Path, *, world: int, tells: bool) -> Run:
    """The resumed run with microbatches for `world` ranks, where another number of ranks saved it."""
    from limoe_dist.checkpoint.catalog import checkpoints, latest_checkpoint
    from limoe_dist.checkpoint.state import read_state

    if not checkpoints(out):
        return run
    state = read_state(latest_checkpoint(out))
    before, batch_before = state.layout.ranks, state.settings.get("train.batch_pairs", run.train.batch_pairs)
    fitted = fit_microbatches(run, before=before, now=world, batch_before=batch_before)
    if tells and before != world:
        pairs, parts = run.train.batch_pairs / world, fitted.train.microbatch_pairs
        batch = "the same batch" if batch_before == run.train.batch_pairs else f"a batch of {run.train.batch_pairs}"
        print(
            f"ranks: {world}, where the checkpoint was saved by {before}: {pairs:g} pairs of {batch} on each, "
            + (f"{parts} at once (train.microbatch_pairs={parts})" if parts else "all at once")
        )
    return fitted


def _begun_from(run: Run, init_from: str) -> Run:
    """The run with train.init_from as one checkpoint: should it be killed early, it begins with the same again."""
    place = init_from or run.train.init_from
    if not place:
        return run
    if init_from and run.train.init_from not in ("", init_from):
        raise UserError(f"--init-from {init_from} and --train.init-from {run.train.init_from} differ: give one of them")
    from limoe_dist.checkpoint.catalog import latest_checkpoint
    from limoe_dist.checkpoint.manifest import NAME

    folder = Path(place).absolute()
    if not (folder / NAME).is_file():
        if not folder.is_dir():
            raise UserError(f"--init-from {place}: there is no such directory: give a run, or one of its checkpoints")
        folder = latest_checkpoint(folder)
    return run.model_copy(update={"train": run.train.model_copy(update={"init_from": str(folder)})})


def _start_ranks(argv: list[str], run: Run, out: Path, command: TrainCommand, stop: StopFlag) -> int:
    """The same command on ranks of this machine; its status tells how the run ended, not only how the ranks did."""
    from launch.launchers import start_ranks, status_of
    from limoe_dist.train.folder import ENDED, read_end

    (out / ENDED).unlink(missing_ok=True)
    ranks, threads, grace_s = command.ranks, run.parallel.threads, run.train.stop_grace_s
    finished = start_ranks(
        command.launcher, ["train", *argv], ranks=ranks, threads=threads, grace_s=grace_s, early=stop
    )
    return status_of(finished, read_end(out), grace_s=grace_s)


def given(option: str, argv: list[str]) -> bool:
    """Whether a setting is on the command line; tyro takes - and _ for the same."""
    return any(word.split("=")[0].replace("_", "-") == option for word in argv)


def _value_of(option: str, argv: list[str]) -> str | None:
    for place, word in enumerate(argv):
        if word == option and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(option + "="):
            return word.removeprefix(option + "=")
    return None


def _train(
    run: Run, out: Path, *, resume: bool, stop_after: int | None, quiet: bool, problem: str, stop: StopFlag
) -> int:
    from launch.ranks import agreement
    from limoe_dist.parallel.bootstrap import start
    from limoe_dist.train.faults import fault_file
    from limoe_dist.train.loop import train

    files = {"data.validation": run.data.validation, "data.tokenizer": run.data.tokenizer}
    options = {"--resume": resume, "--stop-after": stop_after}
    agree = agreement(run, files=files_of(run.data) | files, options=options)
    with start(run.parallel, os.environ, agree=agree, problem=problem, on_fault=fault_file(out, os.environ)) as (
        mesh,
        device,
    ):
        outcome = train(run, out, mesh=mesh, device=device, resume=resume, stop_after=stop_after, stop=stop)
        if mesh.rank == 0:
            done = outcome.step == run.train.steps
            print(
                f"done: {outcome.step} steps; report: limoe report {out}"
                if done
                else f"stopped at step {outcome.step} of {run.train.steps}, saved; go on: limoe train --resume {out}"
                + (f" --ranks {mesh.world.size}" if mesh.world.size > 1 else "")
            )
            sys.stdout.flush()
    return 0 if quiet else status_after(outcome.signal)
