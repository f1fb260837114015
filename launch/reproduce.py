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
from launch.reproduction.page import Row, best_of, cells, headings, write
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
    """Figures and the runs that they need."""

    def __init__(
        self, figures: dict[str, Figure], data: Data, out: Path, changes: dict[str, Any], *, jobs: int
    ) -> None:
        self.figures, self.data, self.out, self.changes, self.jobs = figures, data, out, changes, jobs
        self.runs = self._unique([run for name, figure in figures.items() for run in self._runs_of(name, figure)])

    def list_runs(self) -> None:
        for run in self.runs:
            state = "done" if run.finished else f"at step {run.step}" if run.step else "to do"
            print(f"{run.folder.name}  {state:<12} {run.label}")
        print(f"{len(self.runs)} runs, {sum(run.finished for run in self.runs)} done")

    def carry_out(self) -> None:
        """Trains what is missing, then writes and shows every figure."""
        if not all(run.finished for run in self.runs):
            with Board(self.runs) as board:
                train_all(self.runs, jobs=self.jobs, tell=board.tell, watch=board.watch)
        for name, figure in self.figures.items():
            rows = self._rows(name, figure)
            if "fewshot" in figure.measures:
                few_shot([run for row in rows for run in row.runs], self.data)
            paths = write(name, figure, rows, self.out)
            _show(name, figure, rows)
            print(f"written: {', '.join(map(str, paths))}")

    def _runs_of(self, name: str, figure: Figure) -> list[Planned]:
        return [
            run
            for variant in figure.variants
            for at in (figure.sweep.values if figure.sweep is not None else (None,))
            for run in self._seeds(name, figure, variant, at)
        ]

    def _seeds(self, name: str, figure: Figure, variant: Variant, swept: float | None) -> tuple[Planned, ...]:
        tried = f", {figure.sweep.setting}={swept:g}" if figure.sweep is not None and swept is not None else ""
        return tuple(
            planned(
                f"{name}: {variant.name}, seed {seed}{tried}",
                run_of(figure, variant, seed=seed, changes=self.changes, swept=swept),
                self.data,
                self.out,
            )
            for seed in figure.seeds
        )

    def _rows(self, name: str, figure: Figure) -> list[Row]:
        """One for each variant, at the best value of a sweep; the runs must be done."""
        rows = []
        for variant in figure.variants:
            if figure.sweep is None:
                rows.append(Row(variant, self._seeds(name, figure, variant, None)))
                continue
            tried = {at: Row(variant, self._seeds(name, figure, variant, at)) for at in figure.sweep.values}
            rows.append(best_of(tried, figure.sweep.by))
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
