"""Drawings of routing, as SVG for a page: text by expert over time, image share by expert, places in the order."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from limoe_dist.analysis.history import Column, History
from limoe_dist.analysis.patches import OTHERS, PALETTE
from limoe_dist.analysis.plots import COLOURS, INK, QUIET, SIZE_INCHES, STYLE, inline
from limoe_dist.analysis.routing_record import RANK_BINS, BlockRouting, ExpertRouting, Ranks

MOST_NAMED = 6
"""Experts with a colour of their own in a drawing over time; the others are drawn as one."""
_MOST_COLUMNS = 120
_SHARES = FuncFormatter(lambda value, _: f"{100 * value:g} %")


@dataclass(frozen=True)
class TextShares:
    """Where the text tokens that some expert of a block processed went, line by line of metrics.jsonl."""

    block: int
    steps: Column
    """(n,)"""
    shares_En: npt.NDArray[np.float64]
    """(E, n); each column sums to 1."""

    @property
    def named(self) -> list[int]:
        """The experts with the largest share at any time, by their number."""
        peaks = self.shares_En.max(axis=1)
        most = sorted(range(len(peaks)), key=lambda expert: (-peaks[expert], expert))[:MOST_NAMED]
        return sorted(expert for expert in most if peaks[expert] > 0)


def text_shares(history: History, block: int) -> TextShares | None:
    """From `kept` in metrics.jsonl, without the lines that have no text token of the block; None where none has."""
    names: list[str] = []
    while (name := f"blocks.{block}.kept.{len(names)}.1") in history.columns:
        names.append(name)
    if not names:
        return None
    counts_En = np.stack([history.columns[name] for name in names])
    total_n = counts_En.sum(axis=0)
    # A sum of infinite or missing counts is not above 0, or not finite.
    good = np.isfinite(total_n) & (total_n > 0) & (counts_En >= 0).all(axis=0)
    if not good.any():
        return None
    return TextShares(block, history.steps[good], counts_En[:, good] / total_n[good])


def text_shares_svg(shares: TextShares, *, prefix: str) -> str:
    """Bands that fill the height: each named expert's, and one for all others."""
    chosen = np.unique(np.linspace(0, len(shares.steps) - 1, _MOST_COLUMNS).round().astype(int))
    steps, shares_En, named = shares.steps[chosen], shares.shares_En[:, chosen], shares.named
    rest = 1 - shares_En[named].sum(axis=0)
    bands = [*shares_En[named], rest.clip(min=0)]
    names = [f"expert {expert}" for expert in named] + ["others"]
    if len(named) == int((shares.shares_En.max(axis=1) > 0).sum()):
        bands, names = bands[:-1], names[:-1]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        if len(steps) == 1:
            # One log line: a band needs a breadth.
            steps, bands = np.array([steps[0] - 0.5, steps[0] + 0.5]), [band.repeat(2) for band in bands]
        colours = [*PALETTE[: len(named)], OTHERS]
        axes.stackplot(steps, bands, colors=colours, labels=names, edgecolor="white", linewidth=0.4)
        axes.set_xlim(steps[0], steps[-1])
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(_SHARES)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        _legend(figure, columns=4)
        last = ", ".join(f"{name} {band[-1]:.0%}" for name, band in zip(names, bands, strict=True))
        return _svg(figure, f"Share of text tokens by expert, block {shares.block}. At the last step: {last}.", prefix)


def image_shares_svg(block: BlockRouting, *, number: str, prefix: str) -> str:
    """A bar for each expert that processed tokens, the most image-like first: image below, text above."""
    experts = by_image_share(block)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        places = np.arange(len(experts))
        image = np.array([expert.image_frac or 0.0 for expert in experts])
        axes.bar(places, image, width=0.86, color=COLOURS["image"], label="image")
        axes.bar(places, 1 - image, width=0.86, bottom=image, color=COLOURS["text"], label="text")
        axes.set_xticks(places, [str(expert.expert) for expert in experts], fontsize=9.5 if len(places) <= 20 else 6.5)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(_SHARES)
        axes.set_xlabel("expert")
        axes.grid(visible=False, axis="x")
        _legend(figure, columns=2)
        told = ", ".join(f"expert {expert.expert} {expert.image_frac or 0:.0%}" for expert in experts)
        return _svg(figure, f"Share of image tokens among those of each expert, block {number}: {told}.", prefix)


def by_image_share(block: BlockRouting) -> list[ExpertRouting]:
    """Experts that processed tokens and are not idle, by their share of image tokens, the largest first."""
    busy = [expert for expert in block.experts if expert.image_frac is not None and expert.kind != "idle"]
    return sorted(busy, key=lambda expert: (-(expert.image_frac or 0), expert.expert))


def ranks_svg(block: BlockRouting, *, number: str, prefix: str) -> str:
    """How image and text tokens spread over the order of service, each modality on its own scale of shares."""
    edges = np.linspace(0, 1, RANK_BINS + 1)
    told = []
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for name, ranks in _ranks(block):
            colour = COLOURS[name]
            axes.stairs(ranks.histogram, edges, color=colour, linewidth=1.3, label=name)
            axes.stairs(ranks.histogram, edges, color=colour, alpha=0.15, fill=True)
            axes.axvline(ranks.median, color=colour, linewidth=1, linestyle=(0, (3, 3)))
            told.append(
                f"{name}: median {ranks.median:.2f}, half of them between {ranks.lower_quartile:.2f} "
                f"and {ranks.upper_quartile:.2f}"
            )
        axes.axhline(1 / RANK_BINS, color=QUIET, linewidth=1, linestyle=(0, (1, 2)), label="evenly spread")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["first", "", "middle", "", "last"])
        axes.yaxis.set_major_formatter(_SHARES)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("place in the order of service")
        _legend(figure, columns=3)
        return _svg(figure, f"Places in the order of service, block {number}. {'; '.join(told)}.", prefix)


def _ranks(block: BlockRouting) -> Sequence[tuple[str, Ranks]]:
    both = (("image", block.image), ("text", block.text))
    return [(name, routing.ranks) for name, routing in both if routing is not None and routing.ranks is not None]


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    return figure, figure.add_subplot()


def _legend(figure: Figure, *, columns: int) -> None:
    settings: dict[str, Any] = {"handlelength": 1.1, "columnspacing": 1.0, "borderaxespad": 0.1, "labelcolor": INK}
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, **settings)


def _svg(figure: Figure, words: str, prefix: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return inline(buffer.getvalue(), words, prefix)
