"""The tables that `limoe eval` prints."""

from __future__ import annotations

from rich.table import Table

from limoe_dist.eval.contrastive import Contrastive
from limoe_dist.eval.fewshot import FewShot
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
    table.caption = _left_out(
        {
            "undecodable": found.bad_rows,
            "without a picture": found.pictureless_rows,
            "without a concept": found.unnamed_rows,
        }
    )
    return table


def retrieval_table(found: Retrieval, *, step: int) -> Table:
    """Both directions, each above its chance."""
    of = " (all captions)" if found.captions == "all" else ""
    table = _table(
        f"retrieval at step {step}: {found.rows} pictures, {found.texts} texts{of}", ("", "R@1", "R@5", "R@10")
    )
    for name, recall in (
        ("image to text", found.image_to_text),
        ("  chance", found.chance_image_to_text),
        ("text to image", found.text_to_image),
        ("  chance", found.chance_text_to_image),
    ):
        table.add_row(name, *(_percent(share) for share in (recall.at1, recall.at5, recall.at10)))
    table.caption = _left_out(
        {
            "undecodable": found.bad_rows,
            "without a picture": found.pictureless_rows,
            "without a caption": found.uncaptioned_rows,
        }
    )
    return table


def contrastive_table(found: Contrastive, *, step: int) -> Table:
    """Both directions, their mean, and chance."""
    what = f"{found.minibatches} minibatch{'es' if found.minibatches > 1 else ''} of {found.minibatch} pairs"
    table = _table(f"contrastive accuracy at step {step}: {what}", ("", "accuracy"))
    for name, share in (
        ("image to text", found.image_to_text),
        ("text to image", found.text_to_image),
        ("mean", found.accuracy),
        ("chance", found.chance),
    ):
        table.add_row(name, _percent(share))
    notes = []
    if found.minibatch < found.asked:
        notes.append(f"fewer than the {found.asked} pairs of a minibatch: all are one")
    left_out = _left_out(
        {
            "of the last minibatch": found.left_out,
            "undecodable": found.bad_rows,
            "without a picture": found.pictureless_rows,
            "without a caption": found.uncaptioned_rows,
        }
    )
    table.caption = "\n".join([*notes, *([left_out] if left_out else [])]) or None
    return table


def fewshot_table(found: FewShot, *, step: int) -> Table:
    """A row for each penalty: mean and standard deviation over the seeds, and the least and the most."""
    title = f"{found.shots}-shot at step {step}: {found.rows} pictures, {found.classes} classes"
    table = _table(title, ("l2", "accuracy", "std", "least", "most"))
    for at in found.accuracies:
        shares = (_percent(share) for share in (min(at.of_seeds), max(at.of_seeds)))
        table.add_row(f"{at.l2:g}", _percent(at.mean), "-" if at.std is None else _percent(at.std), *shares)
    table.add_row("chance", _percent(found.chance))
    done = {"skip": "left out", "use": "used with all they have"}[found.short]
    notes = [f"{found.seeds} draws of about {found.training_rows} training pictures, {found.features} features"]
    if found.short_classes:
        notes.append(f"{found.short_classes} classes have fewer than {found.shots} training pictures: {done}")
    left_out = _left_out(
        {
            "of classes that were not learned": found.other_rows,
            "undecodable": found.bad_rows,
            "without a picture": found.pictureless_rows,
            "without a concept": found.unnamed_rows,
            "undecodable training pictures": found.bad_training_rows,
        }
    )
    table.caption = "\n".join([*notes, *([left_out] if left_out else [])])
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    # The width keeps a long title in one line above a narrow table.
    table = Table(title=title, title_justify="left", caption_justify="left", min_width=len(title))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _left_out(counts: dict[str, int]) -> str | None:
    parts = [f"{count} {why}" for why, count in counts.items() if count]
    return f"left out: {', '.join(parts)}" if parts else None
