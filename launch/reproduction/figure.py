"""A figure of the paper as data: what is trained, which settings differ, what is measured, and what the paper says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from limoe_dist.config.errors import UserError, nearest
from limoe_dist.config.parse import parse_model, preset_named, sentences
from limoe_dist.config.rules import ConfigError, check
from limoe_dist.config.schema import Run, Section

FIGURES = Path(__file__).parent / "figures"
BASE = "base"

Measure = Literal[
    "success_image",
    "success_text",
    "success_text_lowest",
    "entropy_text",
    "text_experts",
    "loss",
    "accuracy",
    "zeroshot_top1",
    "zeroshot_top5",
    "fewshot",
    "image_to_text",
    "text_to_image",
]
Settings = dict[str, Any]
"""Settings by dotted name, as "moe.load"."""


class Variant(Section):
    """One row of the figure: a run for each seed."""

    name: str
    settings: Settings = Field(default_factory=dict)
    """What differs from the figure's own settings."""
    paper: dict[Measure, float] = Field(default_factory=dict)
    """The paper's figures for this row, in per cent, where it prints them; at its own scale, of course."""
    x: float | None = None
    """Place on the horizontal axis of a "line" plot."""
    series: str = ""
    """The line of a "line" plot that this row belongs to."""


class Sweep(Section):
    """Every variant is trained with each value on every seed; it is shown with the value of the best mean."""

    setting: str
    values: Annotated[tuple[float, ...], Field(min_length=2)]
    by: Measure


class Plot(Section):
    kind: Literal["curve", "bars", "line"]
    """curve: over the steps, a line for each variant. bars: one for each variant, with the range over seeds. line: over
    the variants' x, a line for each series."""
    measure: Measure
    title: str
    x: str = ""
    """Name of a "line" plot's horizontal axis."""


class Figure(Section):
    title: str
    source: str
    """Where it is in the paper."""
    paper_says: str
    """What the paper shows, in our words."""
    settings: Settings = Field(default_factory=dict)
    """What differs from the common base."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]
    sweep: Sweep | None = None
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)]
    """Columns of the table."""
    plots: Annotated[tuple[Plot, ...], Field(min_length=1)]


class Base(Section):
    """What all figures have in common."""

    preset: str
    settings: Settings


def names() -> dict[str, str]:
    """Every figure with its title."""
    paths = sorted(path for path in FIGURES.glob("*.json") if path.stem != BASE)
    return {path.stem: parse_model(Figure, path).title for path in paths}


def figure_named(name: str) -> Figure:
    """Raises UserError with the nearest name."""
    known = names()
    if name not in known:
        raise UserError(f'unknown figure "{name}"{nearest(name, known)} (figures: {", ".join(known)}; or all)')
    return parse_model(Figure, FIGURES / f"{name}.json")


def run_of(
    figure: Figure, variant: Variant, *, seed: int, changes: Mapping[str, Any], swept: float | None = None
) -> Run:
    """The run of a variant and a seed: the base, then the figure's settings, the variant's, the sweep's, the caller's.

    Raises UserError for a setting that does not exist, or that cannot be trained with.
    """
    base = parse_model(Base, FIGURES / f"{BASE}.json")
    settings = base.settings | figure.settings | variant.settings | {"train.seed": seed}
    if figure.sweep is not None and swept is not None:
        settings |= {figure.sweep.setting: swept}
    run = with_settings(preset_named(base.preset), settings | dict(changes))
    try:
        check(run, world=1)
    except ConfigError as error:
        raise UserError("\n".join(f'variant "{variant.name}": {problem}' for problem in error.problems)) from None
    return run


def with_settings(run: Run, settings: Mapping[str, Any]) -> Run:
    """The run with some settings, by dotted name. Raises UserError for unknown names and values of a wrong type."""
    content = run.model_dump(mode="json")
    for name, value in settings.items():
        section, _, field = name.partition(".")
        if section not in content or not field:
            raise UserError(f'unknown setting "{name}": name it as section.setting, for example moe.load')
        content[section] = content[section] | {field: value}
    try:
        return Run.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(sentences(error, Run))) from None
