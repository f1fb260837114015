"""One self-contained page about a run: everything is inside it, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from limoe_dist.analysis import curves, routing_plots
from limoe_dist.analysis.curves import Note
from limoe_dist.analysis.evaluated import Result
from limoe_dist.analysis.examples import Examples
from limoe_dist.analysis.expert_matrix import expert_matrix
from limoe_dist.analysis.history import History
from limoe_dist.analysis.incidents import ACTIONS, FAULTS, KINDS, Incidents
from limoe_dist.analysis.plots import not_finite, svg
from limoe_dist.analysis.provenance import changed, data_sets, settings_by_section
from limoe_dist.analysis.routing_section import Section
from limoe_dist.analysis.summary import Facts, tiles
from limoe_dist.config.schema import Run

TEMPLATE = "report.html.j2"
_MODALITY_COLOURS = {"image": (0, 102, 168), "text": (200, 79, 0)}


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    text: str


def page(
    run: Run,
    history: History,
    evaluations: History | None,
    results: Iterable[Result],
    facts: Facts,
    examples: Examples | str,
    routed: Section | str,
    incidents: Incidents | None,
) -> str:
    """The HTML of the report. examples, routed: a sentence where there are none, saying what to do about it.

    incidents: None where no guard looked after the run.
    """
    moe, results = bool(run.moe.blocks), tuple(results)
    told = {(result.data, result.step, figure) for result in results for figure in result.figures}
    settings = settings_by_section(run)
    content = {
        "run": run,
        "facts": facts,
        "tiles": tiles(run, history, facts, stopped=incidents is not None and incidents.stopped),
        "results": results,
        "unreadable": history.unreadable,
        "last_step": int(history.steps[-1]),
        "training": _charts("t", curves.training_panels(history, run, incidents)),
        "incidents": incidents,
        "words": {"kind": KINDS, "action": ACTIONS, "fault": FAULTS},
        "success": _charts("s", curves.success_panels(history)) if moe else [],
        "entropy": _charts("e", curves.entropy_panels(history, run)) if moe else [],
        "experts": _charts("x", curves.experts_panels(history, run)) if moe else [],
        "aux": _charts("a", curves.aux_panels(history, run)) if moe else [],
        "matrix": expert_matrix(history.last) if moe else (),
        "text_shares": _text_shares(history) if moe else [],
        "routed": routed if isinstance(routed, Section) else None,
        "not_routed": routed if isinstance(routed, str) else "",
        "evaluation": _charts("v", curves.evaluation_panels(evaluations)) if evaluations else [],
        "examples": examples if isinstance(examples, Examples) else None,
        "example_figures": [
            figure
            for figure in (examples.figures if isinstance(examples, Examples) else ())
            if isinstance(examples, Examples) and (examples.data, examples.step, figure) not in told
        ],
        "no_examples": examples if isinstance(examples, str) else "",
        "settings": settings,
        "changed": changed(settings),
        "data_sets": data_sets(run, shown=examples.data if isinstance(examples, Examples) else None),
    }
    # A lone surrogate, in a name that came from JSON, cannot be written as UTF-8.
    return _environment().get_template(TEMPLATE).render(content).encode("utf-8", "replace").decode("utf-8")


def _environment() -> Environment:
    # Captions, keys and paths are strangers' text: every value is escaped, but for the SVG that is made here.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "tenths": tenths, "count": "{:,}".format, "heat": heat}
    return environment


def _charts(prefix: str, notes: Iterable[Note]) -> list[Chart]:
    charts = []
    for number, note in enumerate(notes):
        missing = not_finite(note.panel)
        warning = f" Infinite in {missing:,} log lines, which are left out." if missing else ""
        # Our own drawing: matplotlib escapes what it writes, and no name in it comes from outside.
        drawing = Markup(svg(note.panel, prefix=f"{prefix}{number}"))
        charts.append(Chart(note.panel.title, drawing, note.text + warning))
    return charts


def _text_shares(history: History) -> list[Chart]:
    """Which experts the text tokens of each block went to, over the steps: Figure 3, third column."""
    charts = []
    for block in history.blocks:
        shares = routing_plots.text_shares(history, block)
        if shares is not None:
            drawing = Markup(routing_plots.text_shares_svg(shares, prefix=f"w{block}"))
            charts.append(Chart(f"Block {block}", drawing, ""))
    return charts


def percent(share: float | None) -> str:
    """A share as a person reads it, small ones with more digits; a dash for none."""
    if share is None:
        return "\N{EN DASH}"
    return f"{100 * share:.2f} %" if share < 0.01 else f"{100 * share:.1f} %"


def tenths(share: float | None) -> str:
    """A share for a table in which all have the same digits; a dash for none."""
    return "\N{EN DASH}" if share is None else f"{100 * share:.1f} %"


def heat(share: float | None, modality: str) -> str:
    """A CSS colour from white to the modality's; black text stays readable on all of them."""
    red, green, blue = _MODALITY_COLOURS[modality]
    return f"rgba({red}, {green}, {blue}, {0.55 * min(1.0, max(0.0, share or 0.0)):.3f})"
