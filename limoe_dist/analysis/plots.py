"""Curves as SVG to stand in a page: no file, no font and no script of its own, and ids that clash with no other."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from limoe_dist.analysis.history import Column
from limoe_dist.analysis.thin import MOST_POINTS, thin

INK, QUIET = "#1c2733", "#5a6672"
# Told apart by people who do not see all colours, and at least 4.5 : 1 against white but for the text colour's 4.0.
COLOURS = {"image": "#0066a8", "text": "#c84f00", "one": "#1c4f72", "two": "#9a3fa0", "three": "#2f7d4f"}
Tone = Literal["image", "text", "one", "two", "three"]
SIZE_INCHES = (4.2, 2.45)
_MARKED_POINTS = 30
"""Up to so many points are drawn as dots, too: a curve of one or two points would else be hard to see."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "limoe",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Line:
    name: str
    steps: Column
    """(n,)"""
    values: Column
    """(n,); what is not finite is left out."""
    tone: Tone = "one"


@dataclass(frozen=True)
class Reference:
    """A level to compare with, drawn across."""

    value: float
    name: str
    tone: Tone | None = None


@dataclass(frozen=True)
class Marks:
    """Steps at which something happened, each a thin line from the bottom to the top."""

    steps: tuple[int, ...]
    """At least one."""
    name: str
    tone: Tone | None = None
    style: Literal["solid", "dashed", "dashdot", "dotted"] = "solid"


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    """Of the vertical axis; "%" shows shares as percent."""
    lines: tuple[Line, ...]
    references: tuple[Reference, ...] = ()
    low: float | None = None
    high: float | None = None
    """Ends of the vertical axis, so that panels beside one another can be compared."""
    scale: Literal["linear", "log"] = "linear"
    """log: for values above 0 of which a few are far above the others."""
    marks: tuple[Marks, ...] = ()


def svg(panel: Panel, *, prefix: str) -> str:
    """An <svg> element that fills the width it is given. prefix: unique in the page, for the ids inside."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for line in panel.lines:
            _draw(axes, line)
        for reference in panel.references:
            colour = COLOURS[reference.tone] if reference.tone else QUIET
            axes.axhline(reference.value, color=colour, linewidth=1, linestyle=(0, (3, 3)), label=reference.name)
        for marks in panel.marks:
            _mark(axes, marks)
        _scale(axes, panel)
        if len(panel.lines) + len(panel.references) + len(panel.marks) > 1:
            figure.legend(
                loc="outside upper left",
                ncols=3,
                frameon=False,
                handlelength=1.4,
                columnspacing=1.2,
                borderaxespad=0.1,
                labelcolor=INK,
            )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return inline(buffer.getvalue(), alternative(panel), prefix)


def alternative(panel: Panel) -> str:
    """The panel in words, for those who do not see it."""
    told = []
    for line in panel.lines:
        steps, values = _finite(line)
        if not len(values):
            told.append(f"{line.name}: no value")
            continue
        first, last = shown(values[0], panel.unit), shown(values[-1], panel.unit)
        low, high = shown(values.min(), panel.unit), shown(values.max(), panel.unit)
        told.append(
            f"{line.name}: {first} at step {steps[0]:,.0f}, {last} at step {steps[-1]:,.0f}, between {low} and {high}"
        )
    told += [f"{reference.name}: {shown(reference.value, panel.unit)}" for reference in panel.references]
    told += [f"{marks.name}: {_steps(marks.steps)}" for marks in panel.marks]
    return f"{panel.title}. {'; '.join(told)}."


def not_finite(panel: Panel) -> int:
    """Values that are infinite: a run that diverged. (A figure that a line does not have is NaN, and no fault.)"""
    return sum(int(np.isinf(line.values).sum()) for line in panel.lines)


def shown(value: float, unit: str) -> str:
    """A value as a person reads it: percent for "%", else four figures."""
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _steps(steps: tuple[int, ...]) -> str:
    if len(steps) == 1:
        return f"at step {steps[0]:,}"
    return f"at {len(steps):,} steps from {steps[0]:,} to {steps[-1]:,}"


def _finite(line: Line) -> tuple[Column, Column]:
    good = np.isfinite(line.values)
    return line.steps[good], line.values[good]


def _draw(axes: Axes, line: Line) -> None:
    steps, values = thin(*_finite(line))
    # A curve of hundreds of points is a band: a thinner line keeps its inside open.
    width = 0.8 if len(steps) > MOST_POINTS // 2 else 1.3
    marker = "o" if len(steps) <= _MARKED_POINTS else ""
    axes.plot(
        steps,
        values,
        color=COLOURS[line.tone],
        linewidth=width,
        marker=marker,
        markersize=3,
        label=line.name,
        solid_joinstyle="round",
        # A line along the edge of the panel, at 100 % or at 0, is seen whole.
        clip_on=False,
    )


def _mark(axes: Axes, marks: Marks) -> None:
    colour = COLOURS[marks.tone] if marks.tone else QUIET
    axes.vlines(
        marks.steps,
        0,
        1,
        transform=axes.get_xaxis_transform(),
        colors=colour,
        linewidth=1.1,
        linestyles=marks.style,
        label=marks.name,
        # Below the curve, which they would cut into pieces.
        zorder=1.5,
    )


def _scale(axes: Axes, panel: Panel) -> None:
    if panel.scale == "log":
        axes.set_yscale("log")
    else:
        axes.set_ylim(*_ends(axes, panel))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=panel.unit == "experts"))
    axes.set_xlabel("step")
    axes.set_ylabel("" if panel.unit == "%" else panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    share = panel.unit == "%"
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{_short(100 * value)} %" if share else _short(value))
    )


def _ends(axes: Axes, panel: Panel) -> tuple[float, float]:
    """Of the vertical axis: the panel's, made wider where a value lies outside, with room above where it names none."""
    levels = [reference.value for reference in panel.references]
    values = np.concatenate([_finite(line)[1] for line in panel.lines] + [np.array(levels)])
    if not len(values):
        return panel.low or 0.0, panel.high or 1.0
    bottom, top = axes.get_ylim()
    if panel.low is not None:
        bottom = min(panel.low, float(values.min()))
        top = float(values.max()) + 0.06 * (float(values.max()) - bottom)
    if panel.high is not None:
        top = max(panel.high, float(values.max()))
    return bottom, top if top > bottom else bottom + 1


def _short(value: float) -> str:
    """1200 as 1,200; 45000 as 45k; 2e6 as 2M; small numbers without trailing zeros."""
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def inline(text: str, words: str, prefix: str) -> str:
    """The <svg> element alone, with an accessible name; without size, metadata, style sheet and unused ids."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    # The page's own font: its names would take a third of the file.
    text = re.sub(r" font-family: [^;]*;", "", text)
    # Tenths of a point are enough for coordinates; what stands between the tags are the labels.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)
    return re.sub(r"\n\s*", "\n", text)
