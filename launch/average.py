"""`limoe average`: the mean of the weights of several checkpoints, as a run of its own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from launch.new_run import check_out, copy_history, made, open_run, run_tokenizer_path, same_settings, write_run
from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.parse import write_atomically

if TYPE_CHECKING:
    from limoe_dist.checkpoint.average import Averaged

DEFAULT_LAST = 5
RECORD = "averaged.json"


@dataclass(frozen=True)
class Options:
    """Write the mean of several checkpoints' weights as a run of its own, for `limoe eval`, `report` and `--init-from`.

    limoe average runs/first --out runs/first-mean                    the last 5 checkpoints, or all where it has fewer
    limoe average runs/first --last 3 --out runs/first-mean
    limoe average runs/first --steps 800 900 1000 --out runs/first-mean
    limoe average a/checkpoints/step-00000900 b/checkpoints/step-00000900 --out runs/mean

    Towards the end of training the noise of the last steps averages out (LIMoE, section 3.2). A run keeps
    checkpoint.keep checkpoints: train with a larger one, or with checkpoint.keep_every. The optimizer's moments are not
    averaged, so that the result cannot be resumed. Exit status 2 where a setting or file has to be mended.
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Directory of a run; or directories of two or more checkpoints of one model, of any runs and layouts."""
    out: str = ""
    """Directory for the result: a run with one checkpoint, and averaged.json, which says what it was made from."""
    last: int | None = None
    """Take the newest so many checkpoints of the run; by default 5, or all where it has fewer."""
    steps: tuple[int, ...] = ()
    """Take the run's checkpoints of these steps."""


def main(argv: list[str]) -> int:
    """Runs `limoe average`; returns its exit status. Lets UserError pass."""
    try:
        options = tyro.cli(Options, args=argv or ["--help"], prog="limoe average")
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    from limoe_dist.checkpoint.average import describe, refuse_twice

    checkpoints = _chosen(options)
    # Before anything is read: verification of a large checkpoint takes minutes.
    refuse_twice([describe(checkpoint) for checkpoint in checkpoints])
    out, place = check_out(options.out), Path(options.out)
    found = _average(checkpoints, out)
    for text in found.warnings:
        warn(text)
    _show(found, place)
    return 0


def _chosen(options: Options) -> list[Path]:
    """The checkpoints to average, oldest first. Raises UserError."""
    from limoe_dist.checkpoint.manifest import NAME

    if not options.sources:
        raise UserError("give the directory of a run, or of two checkpoints or more (see limoe average --help)")
    if options.last is not None and options.steps:
        raise UserError(f"--last {options.last} and --steps both choose: give one of them")
    if options.last is not None and options.last < 2:
        raise UserError(f"--last={options.last}: a mean needs two checkpoints or more")
    paths = [Path(source) for source in options.sources]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such directory: give a run, or checkpoints")
    if len(paths) == 1 and not (paths[0] / NAME).is_file():
        return _of_run(paths[0], options)
    if options.last is not None or options.steps:
        raise UserError("--last and --steps choose among the checkpoints of one run: leave them out, or give one run")
    for path in paths:
        if not (path / NAME).is_file():
            raise UserError(
                f"{path} is no checkpoint, it has no {NAME}: give RUN/checkpoints/step-NNNNNNNN, or one run alone"
            )
    if len(paths) == 1:
        raise UserError(f"{paths[0]} is one checkpoint: a mean needs two or more")
    return paths


def _of_run(run_dir: Path, options: Options) -> list[Path]:
    from limoe_dist.checkpoint.catalog import checkpoint_folder, checkpoints, no_checkpoint, step_of

    open_run(run_dir)
    have = checkpoints(run_dir)
    if options.steps:
        for step in options.steps:
            if options.steps.count(step) > 1:
                raise UserError(f"--steps: {step} is given twice, and would count twice: give each step once")
            if checkpoint_folder(run_dir, step) not in have:
                raise no_checkpoint(run_dir, step)
        if len(options.steps) == 1:
            raise UserError(f"--steps {options.steps[0]}: a mean needs two checkpoints or more")
        return [checkpoint_folder(run_dir, step) for step in sorted(options.steps)]
    there = ", ".join(str(step_of(folder)) for folder in have) or "none"
    wanted = options.last or min(DEFAULT_LAST, max(2, len(have)))
    if len(have) < wanted:
        raise UserError(
            f"{run_dir} has {len(have)} checkpoint{'' if len(have) == 1 else 's'}, fewer than {wanted} (steps there: "
            f"{there}): train with a larger checkpoint.keep, or with checkpoint.keep_every, to have more"
        )
    return have[-wanted:]


def _average(checkpoints: Sequence[Path], out: Path) -> Averaged:
    from launch.progress import progress_bars
    from limoe_dist.checkpoint.average import average
    from limoe_dist.checkpoint.state import read_state

    newest = max(checkpoints, key=lambda folder: read_state(folder).step)
    run_dir = newest.absolute().parent.parent
    if not (run_dir / "run.json").is_file():
        raise UserError(
            f"{newest} lies in no run: there is no {run_dir / 'run.json'}: put it back into RUN/checkpoints"
        )
    run = open_run(run_dir)
    same_settings(run, read_state(newest).settings, newest, run_dir)
    tokenizer = run_tokenizer_path(run, run_dir, newest)
    with made(out) as folder, progress_bars(True) as progress:
        found = average(checkpoints, folder, progress=progress)
        copy_history(run_dir, folder, step=found.step)
        write_run(run, tokenizer, folder, out=out)
        final = out / found.checkpoint.relative_to(folder)
        record = {"task": "average", "checkpoint": str(final)} | found.to_json()
        write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")
    return found


def _show(found: Averaged, out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from launch.checkpoint_tables import size

    title = f"mean of {len(found.sources)} checkpoints"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=len(title))
    table.add_column("step", justify="right")
    table.add_column("size", justify="right")
    table.add_column("checkpoint", overflow="fold")
    for source in found.sources:
        table.add_row(f"{source.step:,}", size(source.num_bytes), str(source.path))
    table.add_section()
    table.add_row(f"{found.step:,}", size(found.num_bytes), f"their mean: {found.parameters:,} parameters")
    Console(highlight=False).print(table)
    name = shlex.quote(str(out))
    print(f"written: {out}, weights alone; what it was made from: {out / RECORD}")
    print(f"next: limoe eval zeroshot --run {name}, or limoe train PRESET --data ... --out ... --init-from {name}")
