"""`limoe checkpoint ls|show|verify|rm RUN`: what a run has saved, whether it is whole, and away with what may go.

Needs neither torch nor the run's data, so that a login node will do. A run of somebody else is read, never changed.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from launch.checkpoint_tables import (
    age,
    by_kind,
    checkpoint_table,
    dtypes,
    file_table,
    num_bytes,
    numbers,
    settings_table,
    show,
    size,
    state_table,
    tensor_table,
    todo,
)
from limoe_dist.checkpoint import catalog, disk
from limoe_dist.checkpoint.contents import Part, contents, misplaced, plain
from limoe_dist.checkpoint.manifest import STATE, CheckpointManifest, Damaged, read_manifest, verify
from limoe_dist.checkpoint.state import State, read_state
from limoe_dist.checkpoint.survey import BROKEN, CHECKPOINTS, LEFTOVERS, Entry, glance, survey
from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.parse import decisive, load_run, preset_named
from limoe_dist.config.schema import Run
from limoe_dist.train.folder import trainer


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]
    """Directory of a run."""


@dataclass(frozen=True)
class LsOptions(Options):
    """List the checkpoints of a run, and what else lies beside them. Reads no tensors, so it takes no time.

    "looks whole": all files are there, in their sizes. "verified": they were read and compared once.
    """

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object: {"checkpoints": [...], "others": [...], ...}; times are Unix times."""


@dataclass(frozen=True)
class ShowOptions(Options):
    """Show what one checkpoint holds: step, position in the data, settings, files and tensors."""

    step: int | None = None
    """Step of the checkpoint; by default the newest that looks whole."""
    all: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show all settings that decide results, not only those that differ from the preset's."""
    tensors: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the name, shape and type of every tensor in place of the tables: a line each."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object: all settings; with --tensors all tensors."""


@dataclass(frozen=True)
class VerifyOptions(Options):
    """Read every byte of the checkpoints of a run, compare checksums, and see that every tensor is there once.

    Notes what is whole: a save that retires old checkpoints keeps the last verified one. Exit status 0 where all are
    whole, 1 where one is not.
    """

    step: int | None = None
    """Only the checkpoint of this step."""


@dataclass(frozen=True)
class RmOptions(Options):
    """Remove checkpoints of a run, or what lies beside them. Says what would go and asks first.

    The last verified checkpoint and the last that looks whole stay. Old ones can go while the run trains. Exit status 0
    where all has gone, 1 where the answer was no.
    """

    step: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Step of a checkpoint that shall go; may be given several times."""
    leftovers: tyro.conf.FlagCreatePairsOff[bool] = False
    """Remove what killed saves and removals left behind. Refused while a process trains there."""
    damaged: tyro.conf.FlagCreatePairsOff[bool] = False
    """Remove checkpoints that look damaged or lack their manifest, and those that a resume has put aside."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say what would go, and remove nothing."""
    yes: tyro.conf.FlagCreatePairsOff[bool] = False
    """Do not ask; where no terminal is at hand nothing goes without it."""
    force: tyro.conf.FlagCreatePairsOff[bool] = False
    """Remove the last whole checkpoint too, and leftovers where the file system has no locks to tell who trains."""


COMMANDS: dict[str, Callable[..., Options]] = {
    "ls": LsOptions,
    "show": ShowOptions,
    "verify": VerifyOptions,
    "rm": RmOptions,
}


def main(argv: list[str]) -> int:
    """Runs `limoe checkpoint`; returns its exit status. Lets UserError pass."""
    try:
        options: Options = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="limoe checkpoint",
            description="The checkpoints of a run; docs/checkpoints.md tells more.",
            args=argv or ["--help"],
        )
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    run_dir = _opened(options.run)
    match options:
        case LsOptions():
            return _ls(run_dir, options)
        case ShowOptions():
            return _show(run_dir, options)
        case VerifyOptions():
            return _verify(run_dir, options)
        case RmOptions():
            return _rm(run_dir, options)
    raise AssertionError(options)


def _opened(run: str) -> Path:
    """The directory of a run. Raises UserError where it is none, or cannot be read."""
    run_dir = Path(run)
    try:
        if not ((run_dir / "run.json").is_file() or (run_dir / "checkpoints").is_dir()):
            raise UserError(f"{run_dir}: there is neither run.json nor checkpoints: this is not the directory of a run")
        with suppress(FileNotFoundError):
            os.scandir(run_dir / "checkpoints").close()
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return run_dir


_WORDS = {
    "saving": "a save that did not end",
    "removing": "a removal that did not end",
    "put aside": "damaged and put aside",
    "no manifest": "without a manifest",
    "other format": "of another format",
}


def _ls(run_dir: Path, options: LsOptions) -> int:
    entries = survey(run_dir)
    try:
        trained_by = trainer(run_dir)
    except UserError as error:
        warn(str(error))
        trained_by = None
    have = [entry for entry in entries if entry.kind in CHECKPOINTS]
    others = [entry for entry in entries if entry.kind not in CHECKPOINTS]
    total = sum(entry.num_bytes for entry in entries)
    if options.json:
        content = {"run": str(run_dir), "bytes": total, "trained_by": trained_by}
        _print_json(
            content | {"checkpoints": [one.to_json() for one in have], "others": [one.to_json() for one in others]}
        )
        return 0
    now = time.time()
    if have:
        show(checkpoint_table(have, now))
    else:
        print(f"{run_dir} has no checkpoints")
    for entry in have:
        if entry.problem:
            print(f"step {entry.step}: {plain(entry.problem)}")
            if entry.kind == "damaged":
                print(f"  {todo(entry, run_dir, trained_by)}")
    if others:
        print("also there:")
    for entry in others:
        print(f"  {plain(entry.path.name)}  {size(entry.num_bytes)}, {age(entry.written, now)} ago")
        print(f"    {todo(entry, run_dir, trained_by)}")
    if entries:
        print(f"in all {size(total)}" + (f"; {plain(trained_by)} trains here" if trained_by else ""))
    return 0


def _show(run_dir: Path, options: ShowOptions) -> int:
    folder = catalog.latest_checkpoint(run_dir, options.step)
    for newer in catalog.checkpoints(run_dir) if options.step is None else []:
        if catalog.step_of(newer) > catalog.step_of(folder):
            warn(f"{newer} looks damaged: limoe checkpoint verify {run_dir} tells more")
    if problem := glance(folder).problem:
        raise UserError(problem)
    manifest = read_manifest(folder)
    state, tensors = read_state(folder), contents(folder, manifest)
    if options.json:
        _print_json(_shown(folder, manifest, state, tensors, listed=options.tensors))
        return 0
    if options.tensors:
        width = max((len(plain(name)) for name in tensors), default=0)
        for name, parts in tensors.items():
            print(f"{plain(name):<{width}}  {parts[0].dtype:<4}  ({', '.join(map(str, parts[0].shape))})")
        return 0
    print(folder)
    show(state_table(folder, state))
    _print_settings(run_dir, state, shows_all=options.all)
    print("\ntensors (--tensors lists them)")
    show(tensor_table(tensors))
    print(f"\n{len(manifest.files)} files, {size(manifest.num_bytes)}")
    show(file_table(manifest))
    return 0


def _shown(
    folder: Path, manifest: CheckpointManifest, state: State, tensors: dict[str, list[Part]], *, listed: bool
) -> dict[str, Any]:
    content = {"path": str(folder), "verified": catalog.is_verified(folder)} | state.model_dump(mode="json")
    content["files"] = [file.model_dump() for file in manifest.files]
    groups = {
        kind: {"tensors": len(group), "numbers": numbers(group), "bytes": num_bytes(group), "dtypes": dtypes(group)}
        for kind, group in by_kind(tensors).items()
    }
    if not listed:
        return content | {"kinds": groups}
    each = {name: {"dtype": parts[0].dtype, "shape": parts[0].shape} for name, parts in tensors.items()}
    return content | {"kinds": groups, "tensors": each}


def _print_settings(run_dir: Path, state: State, *, shows_all: bool) -> None:
    place, defaults = _defaults(run_dir)
    same = sum(name in defaults and defaults[name] == value for name, value in state.settings.items())
    print(f"\nsettings that decide results: {same} as in {place}" + ("" if shows_all else " (--all shows them)"))
    table = settings_table(state, defaults, place, shows_all=shows_all)
    if table.row_count:
        show(table)


def _defaults(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """The preset of a run, and its settings; the schema's defaults where it has none that is known here."""
    try:
        name = load_run(run_dir / "run.json").preset
        return f"preset {name}", decisive(preset_named(name))
    except UserError:
        return "the defaults", decisive(Run())


def _verify(run_dir: Path, options: VerifyOptions) -> int:
    if options.step is not None:
        folders = [catalog.latest_checkpoint(run_dir, options.step)]
    elif not (folders := catalog.checkpoints(run_dir)):
        raise catalog.no_checkpoint(run_dir, None)
    damaged, unread = [], 0
    for folder in folders:
        step = catalog.step_of(folder)
        try:
            problems = _faults(folder)
        except UserError as error:
            print(f"step {step}: not verified: {plain(str(error))}", flush=True)
            unread += 1
            continue
        if not folder.exists():
            print(f"step {step}: was removed meanwhile", flush=True)
        elif problems:
            damaged.append(step)
            # What was whole once no longer is: nobody shall rely on it.
            catalog.forget_verified(folder)
            print("\n  ".join([f"step {step}: damaged", *map(plain, problems)]), flush=True)
        else:
            catalog.note_verified(folder)
            print(f"step {step}: whole, {size(read_manifest(folder).num_bytes)}", flush=True)
    if damaged:
        steps = " ".join(f"--step {step}" for step in damaged)
        print(
            f"{len(damaged)} of {len(folders)} damaged: a resume goes back to the newest whole one, if there is any; "
            f"limoe checkpoint rm {shlex.quote(str(run_dir))} {steps} removes what is damaged"
        )
    return 1 if damaged or unread else 0


def _faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, in sentences. Raises UserError for another version's format."""
    try:
        manifest = read_manifest(folder)
        with _bar(f"step {manifest.step}", manifest.num_bytes) as progress:
            if problems := verify(folder, manifest.files, progress=progress):
                return problems
        if (step := read_state(folder).step) != manifest.step:
            return [f"{folder / STATE} is of step {step}, its manifest of {manifest.step}"]
        return misplaced(contents(folder, manifest))
    except Damaged as error:
        return str(error).splitlines()


@contextmanager
def _bar(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Counts bytes up to `num_bytes`, on a terminal only; wiped away at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task(what, total=num_bytes)
        yield lambda count: bars.advance(task, count)


def _rm(run_dir: Path, options: RmOptions) -> int:
    if not (options.step or options.leftovers or options.damaged):
        raise UserError("say what shall go: --step N, --leftovers or --damaged (see limoe checkpoint rm --help)")
    entries = survey(run_dir)
    chosen = _chosen(run_dir, entries, options)
    if not chosen:
        print("there is nothing to remove")
        return 0
    # After the listing: the saves of a run that starts from now on are not among the chosen.
    _refuse_live_saves(run_dir, chosen, force=options.force)
    if not options.force:
        _refuse_last(run_dir, entries, chosen)
    total = size(sum(entry.num_bytes for entry in chosen))
    for entry in chosen:
        print(f"{plain(str(entry.path))}  {size(entry.num_bytes)}, {_WORDS.get(entry.kind, entry.kind)}")
    if options.dry_run:
        print(f"would free {total}; nothing was removed")
        return 0
    if not (options.yes or _agreed(f"remove {'this' if len(chosen) == 1 else f'these {len(chosen)}'}, {total}?")):
        print("nothing was removed")
        return 1
    _remove(chosen)
    print(f"removed, {total} freed")
    return 0


def _chosen(run_dir: Path, entries: list[Entry], options: RmOptions) -> list[Entry]:
    """Raises UserError for a step that is not there."""
    by_step = {entry.step: entry for entry in entries if entry.kind in (*CHECKPOINTS, "no manifest")}
    for step in options.step:
        if step not in by_step:
            raise catalog.no_checkpoint(run_dir, step)
    wanted = {*(LEFTOVERS if options.leftovers else ()), *(BROKEN if options.damaged else ())}
    named = [by_step[step] for step in options.step]
    return [entry for entry in entries if entry in named or entry.kind in wanted]


def _refuse_live_saves(run_dir: Path, chosen: list[Entry], *, force: bool) -> None:
    if not any(entry.kind in LEFTOVERS for entry in chosen):
        return
    try:
        owner = trainer(run_dir)
    except UserError as error:
        if force:
            return
        raise UserError(f"{error}: where none does, --force removes the leftovers") from None
    if owner is not None:
        raise UserError(
            f"{run_dir} is being trained by {plain(owner)}: what looks left over may be its save; "
            "its next save removes what is, or try again when it has ended"
        )


def _refuse_last(run_dir: Path, entries: list[Entry], chosen: list[Entry]) -> None:
    """Raises UserError where no verified checkpoint would be left of those there are, or none that looks whole."""
    rest = {entry.kind for entry in entries if entry not in chosen}
    lost = {entry.kind: entry.step for entry in chosen}
    if "verified" in lost and "verified" not in rest:
        raise UserError(
            f"step {lost['verified']} is the last checkpoint of {run_dir} that was verified: "
            f"limoe checkpoint verify {shlex.quote(str(run_dir))} tries the others; --force removes it all the same"
        )
    whole = ("verified", "looks whole", "other format")
    steps = [lost[kind] for kind in whole if kind in lost]
    if steps and not rest.intersection(whole):
        raise UserError(f"step {max(steps)} is the last whole checkpoint of {run_dir}: --force removes it all the same")


def _agreed(question: str) -> bool:
    """Raises UserError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise UserError("nothing was removed: there is no terminal to ask at, so give --yes (or --dry-run)")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _remove(chosen: Iterable[Entry]) -> None:
    """Raises UserError, when it has tried all, for what could not be removed."""
    problems = []
    for entry in chosen:
        try:
            if entry.path.name.startswith("step-"):
                catalog.remove(entry.path)
            else:
                disk.remove(entry.path)
        except FileNotFoundError:
            pass  # the run that trains there has retired it meanwhile
        except OSError as error:
            problems.append(f"{error.filename or entry.path}: cannot be removed: {error.strerror}")
    if problems:
        raise UserError("\n".join(problems))


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))
