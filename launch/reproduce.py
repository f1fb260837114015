"""`limoe reproduce`: one of the paper's comparisons, in miniature, on the demo data."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from launch.reproduction.board import Board
from launch.reproduction.demo import demo_data
from launch.reproduction.few_shot import few_shot
from launch.reproduction.figure import Figure, Variant, figure_named, names, run_of
from launch.reproduction.measures import value
from launch.reproduction.page import Row, better, cells, headings, write
from launch.reproduction.runs import Data, Planned, planned, train_all
from limoe_dist.config.errors import UserError

USAGE = """\
usage: limoe reproduce FIGURE... --out DIR [--jobs N] [--seeds 0 1 2] [--set name=value]... [--dry-run]

figures of the paper, at a size for two CPU cores (`all`: every one):
{figures}

Each run is a `limoe train` of its own in DIR/runs; runs that figures share are trained once. The same command goes on
after Ctrl-C or a crash. At the end: DIR/FIGURE.json, .md and .svg, with the paper's figures beside the measured ones.
docs/reproduction.md tells what was measured, and where the miniature does not show the paper's effect.

exit status: 0 done, 1 failed, 2 a setting or file that you can mend, 130 interrupted"""


@dataclass(frozen=True)
class Options:
    figures: tyro.conf.Positional[tuple[str, ...]]
    """Names of figures, or all."""
    out: str = ""
    """Directory of runs, tables and plots; an earlier one goes on."""
    data: str = ""
    """Directory with train/manifest.json and validation/manifest.json; empty: the demo data, in DIR/data."""
    jobs: int = field(default_factory=lambda: max(1, len(os.sched_getaffinity(0))))
    """Runs at a time, each on one core; by default as many as there are cores."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of each figure's own."""
    set: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")]] = ()
    """A setting of every run, above all others, as in --set train.steps=100: for a trial. May be given repeatedly."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """List the runs and what is done of them, and end."""


def main(argv: list[str]) -> int:
    """Runs `limoe reproduce`; returns its exit status. Lets UserError pass."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, names()))
        figures = "\n".join(f"  {name:<{width}}  {title}" for name, title in names().items())
        print(USAGE.format(figures=figures), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    try:
        options = tyro.cli(Options, args=argv, prog="limoe reproduce")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    chosen, changes = _checked(options)
    out = Path(options.out)
    data = demo_data(Path(options.data) if options.data else out / "data", print)
    # A batch system ends us with SIGTERM: the runs save, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    study = Study(chosen, data, out, changes, jobs=options.jobs)
    if options.dry_run:
        study.list_runs()
    else:
        study.carry_out()
    return 0


def _checked(options: Options) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Everything that can be wrong with the options. Raises UserError."""
    if not options.out:
        raise UserError("--out is missing: a directory for runs, tables and plots")
    if options.jobs < 1:
        raise UserError(f"--jobs={options.jobs}: must be 1 or more")
    if len(set(options.seeds)) != len(options.seeds):
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))}: each seed once")
    if not options.figures:
        raise UserError(f"name a figure, or all: {', '.join(names())}")
    chosen = list(names()) if "all" in options.figures else list(dict.fromkeys(options.figures))
    changes = dict(_change(text) for text in options.set)
    figures = {}
    for name in chosen:
        figure = figure_named(name)
        figures[name] = figure.model_copy(update={"seeds": options.seeds}) if options.seeds else figure
        for variant in figure.variants:
            run_of(figure, variant, seed=0, changes=changes)
    return figures, changes


def _change(text: str) -> tuple[str, Any]:
    name, separator, word = text.partition("=")
    if not separator:
        raise UserError(f"--set {text}: give it as NAME=VALUE, for example train.steps=100")
    try:
        return name, json.loads(word)
    except ValueError:
        return name, word


class Study:
    """Figures and the runs that they need, in two rounds: what a sweep tries, then what it chose on the other seeds."""

    def __init__(
        self, figures: dict[str, Figure], data: Data, out: Path, changes: dict[str, Any], *, jobs: int
    ) -> None:
        self.figures, self.data, self.out, self.changes, self.jobs = figures, data, out, changes, jobs

    def list_runs(self) -> None:
        """The runs of the first round; those of the second depend on what a sweep finds."""
        runs = self._unique(self._first_round())
        for run in runs:
            state = "done" if run.finished else f"at step {run.step}" if run.step else "to do"
            print(f"{run.folder.name}  {state:<12} {run.label}")
        later = sum(
            len(figure.variants) * (len(figure.seeds) - 1)
            for figure in self.figures.values()
            if figure.sweep is not None
        )
        print(f"{len(runs)} runs, {sum(run.finished for run in runs)} done" + (f"; then {later} more" if later else ""))

    def carry_out(self) -> None:
        """Trains what is missing, then writes and shows every figure."""
        self._train("round 1", self._first_round())
        rows = {name: self._rows(name, figure) for name, figure in self.figures.items()}
        self._train("round 2", [run for found in rows.values() for row in found for run in row.runs])
        for name, figure in self.figures.items():
            if "fewshot" in figure.measures:
                few_shot([run for row in rows[name] for run in row.runs], self.data)
            paths = write(name, figure, rows[name], self.out)
            _show(name, figure, rows[name])
            print(f"written: {', '.join(map(str, paths))}")

    def _train(self, what: str, runs: Sequence[Planned]) -> None:
        runs = self._unique(runs)
        if all(run.finished for run in runs):
            return
        with Board(what, runs) as board:
            train_all(runs, jobs=self.jobs, tell=board.tell, watch=board.watch)

    def _first_round(self) -> list[Planned]:
        runs = []
        for name, figure in self.figures.items():
            for variant in figure.variants:
                if figure.sweep is None:
                    runs += [self._run(name, figure, variant, seed=seed) for seed in figure.seeds]
                else:
                    runs += list(self._swept(name, figure, variant).values())
        return runs

    def _run(self, name: str, figure: Figure, variant: Variant, *, seed: int, swept: float | None = None) -> Planned:
        run = run_of(figure, variant, seed=seed, changes=self.changes, swept=swept)
        tried = f", {figure.sweep.setting}={swept:g}" if figure.sweep is not None and swept is not None else ""
        return planned(f"{name}: {variant.name}, seed {seed}{tried}", run, self.data, self.out)

    def _swept(self, name: str, figure: Figure, variant: Variant) -> dict[float, Planned]:
        assert figure.sweep is not None
        return {at: self._run(name, figure, variant, seed=figure.seeds[0], swept=at) for at in figure.sweep.values}

    def _rows(self, name: str, figure: Figure) -> list[Row]:
        """One for each variant; where there is a sweep, its runs must be done."""
        rows = []
        for variant in figure.variants:
            tried: dict[str, float | None] = {}
            chosen = None
            if figure.sweep is not None:
                for at, run in self._swept(name, figure, variant).items():
                    found = tried[f"{at:g}"] = value(run.folder, figure.sweep.by, steps=run.run.train.steps)
                    best = tried.get(f"{chosen:g}") if chosen is not None else None
                    if chosen is None or (found is not None and (best is None or better(found, best, figure.sweep.by))):
                        chosen = at
            runs = tuple(self._run(name, figure, variant, seed=seed, swept=chosen) for seed in figure.seeds)
            rows.append(Row(variant, runs, tried, chosen))
        return rows

    @staticmethod
    def _unique(runs: Sequence[Planned]) -> list[Planned]:
        found: dict[Path, Planned] = {}
        for run in runs:
            found.setdefault(run.folder, run)
        return list(found.values())


def _show(name: str, figure: Figure, rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    spread = "mean [lowest, highest] over seeds" if len(figure.seeds) > 1 else "ONE seed"
    table = Table(title=f"{name}: {figure.title} ({spread})", title_justify="left", box=box.SIMPLE)
    for number, heading in enumerate(headings(figure)):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*cells(figure, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        # A log is as wide as it has to be.
        console = Console(highlight=False, width=200)
    console.print(table)
    console.print(f"{figure.source}: {figure.paper_says}")
