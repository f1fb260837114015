"""The tables that `limoe eval` prints."""

from __future__ import annotations

from rich.table import Table

from limoe_dist.eval.pixels import PixelNeighbour
from limoe_dist.eval.retrieval import Retrieval
from limoe_dist.eval.zeroshot import ZeroShot


def zeroshot_table(found: ZeroShot, neighbour: PixelNeighbour | None, *, step: int) -> Table:
    """The model between what needs no learning and what needs no picture."""
    table = _table(f"zero-shot at step {step}: {found.rows} pictures, {found.classes} classes", ("", "top-1", "top-5"))
    table.add_row("model", _percent(found.top1), _percent(found.top5))
    if neighbour is not None:
        name = f"nearest of {neighbour.training_rows} training pictures in pixels"
        table.add_row(name, _percent(neighbour.top1), _percent(neighbour.top5))
    table.add_row("chance", _percent(found.chance_top1), _percent(found.chance_top5))
    table.caption = _left_out(found.bad_rows, found.unnamed_rows, "without a concept")
    return table


def retrieval_table(found: Retrieval, *, step: int) -> Table:
    """Both directions, each above its chance."""
    table = _table(f"retrieval at step {step}: {found.rows} pictures, {found.texts} texts", ("", "R@1", "R@5", "R@10"))
    for name, recall in (
        ("image to text", found.image_to_text),
        ("  chance", found.chance_image_to_text),
        ("text to image", found.text_to_image),
        ("  chance", found.chance_text_to_image),
    ):
        table.add_row(name, *(_percent(share) for share in (recall.at1, recall.at5, recall.at10)))
    table.caption = _left_out(found.bad_rows, found.uncaptioned_rows, "without a caption")
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    # The width keeps a long title in one line above a narrow table.
    table = Table(title=title, title_justify="left", caption_justify="left", min_width=len(title))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _left_out(bad: int, without: int, lacking: str) -> str | None:
    parts = [f"{bad} undecodable" if bad else "", f"{without} {lacking}" if without else ""]
    return f"left out: {', '.join(part for part in parts if part)}" if bad or without else None
