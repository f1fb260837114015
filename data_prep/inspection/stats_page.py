"""The page of `limoe prep stats`: one file, everything inside it, nothing fetched, no script."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_prep.inspection.histogram import short, svg
from data_prep.inspection.stats import Stats
from data_prep.inspection.tallies import Bin, Distribution

TEMPLATE = "stats.html.j2"


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    note: str


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str = ""


def page(stats: Stats, content: dict[str, Any], *, made: date) -> str:
    """The HTML. content: of `stats.to_json()`, which is computed once."""
    values = {
        "content": content,
        "made": made.isoformat(),
        "title": ", ".join(one["name"] or one["manifest"] for one in content["sets"]),
        "tiles": _tiles(stats, content),
        "pictures": _pictures(stats),
        "captions": _captions(stats),
        "tokens": _tokens(stats),
        "cards": stats.cards,
    }
    # A lone surrogate, in a name that came from JSON, cannot be written as UTF-8.
    return _environment().get_template(TEMPLATE).render(values).encode("utf-8", "replace").decode("utf-8")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %" if 0 < share < 0.01 else f"{100 * share:.1f} %"


def _environment() -> Environment:
    # Captions, keys and names are strangers' text: every value is escaped, but for the SVG that is made here.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": "{:,}".format, "short": short}
    return environment


def _tiles(stats: Stats, content: dict[str, Any]) -> list[Tile]:
    rows, twice = content["rows"], content["duplicates"]
    alone = [
        f"{count:,} {what}"
        for what, count in (
            ("without a caption", rows["without_caption"]),
            ("without a picture", rows["without_picture"]),
        )
        if count
    ]
    captions = content["captions"]["total"]
    size = sum(one["bytes"] for one in content["sets"])
    return [
        Tile("Rows", f"{rows['total']:,}", ", ".join(alone) or "all of them pairs"),
        Tile(
            "Shards",
            f"{sum(one['shards'] for one in content['sets']):,}",
            f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB",
        ),
        Tile("Captions", f"{captions:,}", f"{stats.words.sum / max(1, captions):.1f} words each"),
        Tile("Shorter side", f"{stats.shorter_side.quantile(0.5):,} px", "median"),
        Tile("Picture", f"{stats.encoded_bytes.quantile(0.5) / 1e3:,.1f} kB", "median, encoded"),
        Tile("Same pictures", f"{twice['pictures']['surplus']:,}", "rows more than different pictures"),
        Tile("Same captions", f"{twice['captions']['surplus']:,}", "more than different captions"),
    ]


def _chart(title: str, distribution: Distribution, *, unit: str = "", scale: float = 1.0) -> list[Chart]:
    """One chart, or none of nothing. scale: what one of the distribution is worth in `unit`."""
    if not distribution.count:
        return []
    middle, low, high = (short(scale * distribution.quantile(share)) for share in (0.5, 0.05, 0.95))
    bins = [Bin(scale * one.low, scale * one.high, one.count) for one in distribution.bins()]
    note = f"median {middle}{unit}; 5 % are at most {low}{unit}, 5 % above {high}{unit}; largest "
    return [Chart(title, svg(title, bins), f"{note}{short(scale * distribution.max)}{unit}")]


def _pictures(stats: Stats) -> list[Chart]:
    return [
        *_chart("Width", stats.width, unit=" px"),
        *_chart("Height", stats.height, unit=" px"),
        *_chart("Shorter side", stats.shorter_side, unit=" px"),
        *_chart("Width / height", stats.aspect, scale=0.001),
        *_chart("Encoded size", stats.encoded_bytes, unit=" kB", scale=0.001),
    ]


def _captions(stats: Stats) -> list[Chart]:
    return [
        *_chart("Characters of a caption", stats.characters),
        *_chart("Words of a caption", stats.words),
        *_chart("Captions of a row", stats.captions_a_row),
    ]


def _tokens(stats: Stats) -> list[Chart]:
    return _chart("Tokens of a caption", stats.tokens.tokens) if stats.tokens else []
