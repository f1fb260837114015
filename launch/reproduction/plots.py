"""The plots of a reproduction as one SVG: curves with their range over seeds, bars beside the paper's, and lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter

from launch.reproduction.figure import Figure, Plot
from launch.reproduction.measures import LOWER_IS_BETTER, SHARES, Column, curve

if TYPE_CHECKING:
    from launch.reproduction.page import Row

COLOURS = ("#0066a8", "#c84f00", "#2f7d4f", "#9a3fa0", "#6b5b00", "#1c2733", "#b0305c", "#4a6f8f")
INK, QUIET = "#1c2733", "#5a6672"
WIDTH, HEIGHT = 4.6, 3.1
"""Inches of a panel."""


def draw(figure: Figure, rows: Sequence[Row]) -> str:
    """An SVG with the figure's plots, two beside one another."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "limoe",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#b8c0c8",
        "text.color": INK,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
    }
    with mpl.rc_context(style):
        columns = min(2, len(figure.plots))
        lines = -(-len(figure.plots) // columns)
        drawing = Drawing(figsize=(WIDTH * columns, HEIGHT * lines), layout="constrained")
        places = drawing.subplots(lines, columns, squeeze=False).flatten()
        for place, plot in zip(places, figure.plots, strict=False):
            {"curve": _curves, "bars": _bars, "line": _lines}[plot.kind](place, plot, rows)
            arrow = ", lower is better" if plot.measure in LOWER_IS_BETTER else ""
            place.set_title(plot.title + arrow, loc="left", fontsize=10, fontweight="bold")
        for place in places[len(figure.plots) :]:
            place.set_axis_off()
        target = io.StringIO()
        drawing.savefig(target, format="svg", metadata={"Date": None})
    # matplotlib ends some lines with a blank.
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def _percent(axes: Axes, plot: Plot) -> None:
    if plot.measure.startswith("success"):
        axes.set_ylim(0, 1.03)
    if plot.measure in SHARES:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))


def _curves(axes: Axes, plot: Plot, rows: Sequence[Row]) -> None:
    for row, colour in zip(rows, _colours(len(rows)), strict=True):
        found = [line for each in row.runs if (line := curve(each.folder, plot.measure)) is not None]
        if not found:
            continue
        length = min(len(steps) for steps, _ in found)
        steps, values = found[0][0][:length], np.stack([_smooth(line[:length]) for _, line in found])
        axes.plot(steps, values.mean(0), color=colour, label=row.variant.name, linewidth=1.6)
        if len(found) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
    axes.set_xlabel("step", color=QUIET)
    axes.grid(axis="y", color="#e6eaee")
    _percent(axes, plot)
    axes.legend(frameon=False, fontsize=8)


def _smooth(values: Column, over: int = 5) -> Column:
    """The mean of each value and the four before it: single steps are noisy."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    first = np.maximum(np.arange(len(values)) + 1 - over, 0)
    last = np.arange(len(values)) + 1
    return np.asarray((total[last] - total[first]) / (last - first))


def _bars(axes: Axes, plot: Plot, rows: Sequence[Row]) -> None:
    """Horizontal, so that long names can be read; the paper's figures, at its own scale, are written beside them."""
    names, values = [row.variant.name for row in rows], [row.values(plot.measure) for row in rows]
    for place, (row, found, colour) in enumerate(zip(rows, values, _colours(len(rows)), strict=True)):
        if not found:
            axes.text(0, place, " none", va="center", color=QUIET)
            continue
        mean = float(np.mean(found))
        axes.barh(place, mean, color=colour, height=0.62, alpha=0.85)
        if len(found) > 1:
            axes.errorbar(mean, place, xerr=[[mean - min(found)], [max(found) - mean]], color=INK, capsize=3)
        scale, unit = (100, " %") if plot.measure in SHARES else (1, "")
        paper = row.variant.paper.get(plot.measure)
        told = f"{scale * mean:.1f}{unit}" + (f"  (paper {paper:g} %)" if paper is not None else "")
        end = (max(found), place)
        axes.annotate(told, end, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.45 if any(row.variant.paper.get(plot.measure) for row in rows) else 0.25)
    axes.set_xlim(left=0)
    if plot.measure in SHARES:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.tick_params(axis="y", length=0)


def _lines(axes: Axes, plot: Plot, rows: Sequence[Row]) -> None:
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(row.variant.series, []).append(row)
    for (name, members), colour in zip(series.items(), _colours(len(series)), strict=True):
        points = sorted(
            (row.variant.x, float(np.mean(row.values(plot.measure))))
            for row in members
            if row.variant.x is not None and row.values(plot.measure)
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name or None, linewidth=1.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row.variant.x for row in rows if row.variant.x is not None}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.minorticks_off()
    axes.set_xlabel(plot.x, color=QUIET)
    axes.grid(axis="y", color="#e6eaee")
    _percent(axes, plot)
    if any(series):
        axes.legend(frameon=False, fontsize=8)


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
