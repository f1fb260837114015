"""The tables that `limoe prune` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from launch.prune_measure import Measured
from limoe_dist.analysis.prune import Kept, Usage
from limoe_dist.analysis.pruned import Modality


def kept_table(usage: Usage, kept: Sequence[Kept], *, num_experts: int) -> Table:
    """One line for each MoE block."""
    inputs = {"image": "pictures", "text": "texts"}[usage.modality]
    title = f"experts that the tokens of {usage.inputs:,} {inputs} use"
    table = _table(title, ("block", "kept", "of", "tokens served", "for 90, 99, 99.9, 100 %"))
    table.add_column("which", overflow="fold")
    for each in kept:
        needed = ", ".join(str(number) for number in each.needed_for.values())
        which = " ".join(map(str, each.experts))
        row = (str(each.block), str(len(each.experts)), str(num_experts), _percent(each.coverage), needed)
        table.add_row(*row, which)
    return table


def figures_table(found: Measured, modality: Modality) -> Table:
    """Before and after."""
    table = _table(f"{modality}s, before and after", ("", "before", "after", "change"))
    for name, (before, after) in _shares(found).items():
        table.add_row(name, _percent(before), _percent(after), f"{100 * (after - before):+.2f}")
    for name in ("total", "experts"):
        first, then = (getattr(each, name) for each in found.parameters)
        title = "parameters" if name == "total" else "  of experts"
        table.add_row(title, f"{first:,}", f"{then:,}", f"{100 * (then / first - 1):+.1f} %")
    speed, what = found.speed, {"image": "pictures/s", "text": "texts/s"}[modality]
    rates = [speed.batch / seconds for seconds in (speed.before_s, speed.after_s)]
    table.add_row(what, *(f"{rate:,.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}x")
    distance = found.distance
    table.caption = (
        f"embeddings of {distance.inputs:,}: {_percent(distance.equal_frac)} unchanged, distance "
        f"{distance.mean:.2g} in the mean, {distance.largest:.2g} at most (of 2)"
    )
    return table


def _shares(found: Measured) -> dict[str, tuple[float, float]]:
    """The accuracies, by the name of their line."""
    lines: dict[str, tuple[float, float]] = {}
    if tasks := found.accuracy.get("zeroshot"):
        for name, title in (("top1", "zero-shot top-1"), ("top5", "zero-shot top-5")):
            lines[title] = (tasks[0][name], tasks[1][name])
    if tasks := found.accuracy.get("retrieval"):
        for name, title in (("image_to_text", "image to text R@1"), ("text_to_image", "text to image R@1")):
            lines[title] = (tasks[0][name]["recall_at_1"], tasks[1][name]["recall_at_1"])
    return lines


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, min_width=len(title))
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
