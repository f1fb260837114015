"""What a reproduction ends with: one JSON, a table beside the paper's figures, and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from launch.reproduction.figure import Figure, Measure, Variant
from launch.reproduction.measures import LOWER_IS_BETTER, SHARES, TITLES, value
from launch.reproduction.runs import Planned
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically


@dataclass(frozen=True)
class Row:
    """A variant with its runs, one for each seed, at the value of the sweep that was best."""

    variant: Variant
    runs: tuple[Planned, ...]
    swept: dict[float, list[float]] = field(default_factory=dict)
    """Of each value that was tried, what the sweep goes by, seed by seed; empty without a sweep."""
    chosen: float | None = None
    """The value with the best mean."""

    def values(self, measure: Measure) -> list[float]:
        """Of each seed; empty where a run has none."""
        found = [value(each.folder, measure, steps=each.run.train.steps) for each in self.runs]
        return [number for number in found if number is not None]


def best_of(tried: dict[float, Row], by: Measure) -> Row:
    """The row of the value with the best mean over the seeds, the first of equal ones. Raises UserError for none."""
    swept = {at: row.values(by) for at, row in tried.items()}
    known = {at: float(np.mean(values)) for at, values in swept.items() if values}
    if not known:
        raise UserError(f"no run of {next(iter(tried.values())).variant.name} has {TITLES[by]}: nothing to choose by")
    best = min(known, key=known.__getitem__) if by in LOWER_IS_BETTER else max(known, key=known.__getitem__)
    return replace(tried[best], swept=swept, chosen=best)


def write(name: str, figure: Figure, rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes NAME.json, NAME.md and NAME.svg in `out`; returns their paths."""
    from launch.reproduction.plots import draw

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.{suffix}" for suffix in ("json", "md", "svg")]
    write_atomically(paths[0], json.dumps(content(name, figure, rows), indent=2) + "\n")
    write_atomically(paths[1], markdown(name, figure, rows))
    write_atomically(paths[2], draw(figure, rows))
    return paths


def content(name: str, figure: Figure, rows: Sequence[Row]) -> dict[str, Any]:
    """Every number of the figure, with those of each seed."""
    return {
        "figure": name,
        "title": figure.title,
        "source": figure.source,
        "seeds": list(figure.seeds),
        "spread": "lowest and highest over the seeds",
        "cpu_seconds": round(sum(folder_cost(rows).values()), 1),
        "cpu_seconds_of_the_longest_run": round(max(folder_cost(rows).values()), 1),
        "rows": [
            {
                "name": row.variant.name,
                "runs": [each.folder.name for each in row.runs],
                "settings": row.variant.settings,
                **({"sweep": _json_of_sweep(row), "chosen": row.chosen} if row.swept else {}),
                "measured": {measure: _summary(row.values(measure)) for measure in figure.measures},
                "paper": row.variant.paper,
            }
            for row in rows
        ],
    }


def _json_of_sweep(row: Row) -> dict[str, list[float]]:
    return {f"{at:g}": values for at, values in row.swept.items()}


def folder_cost(rows: Sequence[Row]) -> dict[str, float]:
    """CPU seconds of each run that a row shows, by its directory; those of a sweep that lost are not shown."""
    return {each.folder.name: each.cpu_s for row in rows for each in row.runs}


def _summary(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    return {"mean": float(np.mean(values)), "lowest": min(values), "highest": max(values), "by_seed": values}


def cells(figure: Figure, row: Row) -> list[str]:
    """The row as text: name, then each measure with its spread, and the paper's figure where it has one."""
    found = [row.variant.name]
    for measure in figure.measures:
        text = _cell(row.values(measure), measure)
        paper = row.variant.paper.get(measure)
        found.append(text + (f" (paper {paper:g})" if paper is not None else ""))
    return found


def headings(figure: Figure) -> list[str]:
    found = []
    for measure in figure.measures:
        unit = " %" if measure in SHARES else ""
        found.append(TITLES[measure] + unit)
    return ["", *found]


def _cell(values: list[float], measure: Measure) -> str:
    if not values:
        return "\N{EN DASH}"
    scale, digits = (100, 1) if measure in SHARES else (1, 2)
    mean, low, high = (scale * number for number in (np.mean(values), min(values), max(values)))
    text = f"{mean:.{digits}f}"
    return text if len(values) == 1 else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown(name: str, figure: Figure, rows: Sequence[Row]) -> str:
    """The figure as a section of a document."""
    seeds = f"{len(figure.seeds)} seeds" if len(figure.seeds) > 1 else "ONE seed: differences may be chance"
    costs = folder_cost(rows)
    printed = any(row.variant.paper for row in rows)
    numbers = "Its numbers are in the table, at its own scale." if printed else "It prints no numbers for these rows."
    lines = [
        f"## {name}: {figure.title}",
        "",
        f"**The paper** ({figure.source}): {figure.paper_says} {numbers}",
        "",
        f"![{name}]({name}.svg)",
        "",
        "| " + " | ".join(headings(figure)) + " |",
        "|---" + "|---:" * len(figure.measures) + "|",
        *("| " + " | ".join(cells(figure, row)) + " |" for row in rows),
        "",
        f"{seeds}" + ("; [lowest, highest] over them" if len(figure.seeds) > 1 else "") + ". "
        f"{rows[0].runs[0].run.train.steps} steps; CPU seconds of a run: {min(costs.values()):.0f} to "
        f"{max(costs.values()):.0f}, {sum(costs.values()):.0f} in all, runs shared with other figures included.",
    ]
    if figure.sweep is not None:
        lines += ["", f"`{figure.sweep.setting}` of each row, by the mean over the same seeds:", ""]
        lines += [f"- {row.variant.name}: {_swept(row, figure.sweep.by)}" for row in rows]
    return "\n".join(lines) + "\n"


def _swept(row: Row, by: Measure) -> str:
    scale = 100 if by in SHARES else 1
    tried = [
        f"{at:g}: {scale * np.mean(values):.1f}" if values else f"{at:g}: none" for at, values in row.swept.items()
    ]
    return f"{TITLES[by]} {', '.join(tried)}; taken: {row.chosen:g}"
