"""What the rows of a manifest hold: pairs, pictures alone or texts alone; and refusals that say which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limoe_dist.config.errors import UserError
from limoe_dist.data.arrow import ShardSet


@dataclass(frozen=True)
class Holdings:
    """R rows, in the order of the manifest."""

    place: str
    """The manifest, for messages."""
    captions: tuple[tuple[str, ...], ...]
    """All captions of each row, none of them blank."""
    pictured: tuple[bool, ...]
    """False where the image column is empty. True says nothing about whether the picture can be decoded."""

    @property
    def pictureless(self) -> int:
        return self.pictured.count(False)

    @property
    def uncaptioned(self) -> int:
        return sum(not captions for captions in self.captions)

    @property
    def pairs(self) -> int:
        """Rows with both; a picture may still turn out to be damaged."""
        return sum(bool(captions) and pictured for captions, pictured in zip(self.captions, self.pictured, strict=True))


def holdings(shards: ShardSet) -> Holdings:
    """Looks at every row's columns; decodes nothing."""
    rows = [shards.row(number) for number in range(len(shards))]
    return Holdings(
        place=shards.path,
        captions=tuple(row.captions for row in rows),
        pictured=tuple(len(row.image) > 0 for row in rows),
    )


def check_pairs(rows: Holdings, *, needed_by: str) -> None:
    """Raises UserError where no row has both a picture and a caption. needed_by: the task, for the message."""
    if rows.pairs:
        return
    total = len(rows.pictured)
    both = sum(not captions and not pictured for captions, pictured in zip(rows.captions, rows.pictured, strict=True))
    raise UserError(
        f"{rows.place}: no row has both a caption and a picture (of its {total} rows, "
        f"{rows.uncaptioned - both} hold a picture alone, {rows.pictureless - both} a text alone, {both} neither), "
        f"and {needed_by} compares pictures with their captions: give --data the manifest of captioned pictures; "
        "pictures with concepts alone are for `limoe eval zeroshot` and `limoe eval fewshot`",
        told_by=0,
    )


def check_pictures(pictured: Sequence[bool], *, place: str) -> None:
    """Raises UserError where no row has a picture."""
    if not any(pictured):
        raise UserError(
            f"{place}: none of its {len(pictured)} rows holds a picture (texts alone): "
            "give --data the manifest of some pictures",
            told_by=0,
        )
