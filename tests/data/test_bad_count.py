"""When bad rows end a run, and what the message then says: thresholds one row below and above, names, and remedies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from limoe_dist.config.errors import UserError
from limoe_dist.data.header import NO_CAPTION, NO_PICTURE
from limoe_dist.data.loader import _append
from limoe_dist.data.stand_ins import MAX_TRIES, BadCount, BadRow, Filled, fill

PAIRS_ALONE = "training needs pairs, rows with a picture and a caption: pack those alone"


def filled(rows: int, reasons: list[str], *, first: int = 0) -> Filled:
    """A batch of that many rows for which bad ones were replaced."""
    none: Any = None
    bad = tuple(BadRow(first + i, first + i, f"k{first + i}", reason) for i, reason in enumerate(reasons))
    return Filled((), (none,) * rows, torch.zeros(0), bad)


def count(limit: float = 0.1, report: str = "") -> BadCount:
    return BadCount(limit, "data/train", report=report)


def test_sixteen_bad_rows_are_the_fewest_that_end_a_run() -> None:
    found = count()
    found.add(filled(5, ["broken"] * 15))
    assert (found.bad, found.seen) == (15, 20)
    with pytest.raises(UserError, match=r"^data/train: 16 of the 21 rows read so far are bad, more than data\.max_bad"):
        found.add(filled(0, ["broken"], first=15))


def test_a_share_of_bad_rows_that_equals_the_limit_is_allowed() -> None:
    found = count(0.1)
    # 20 of 200: each bad row was read, and the row that replaced it too.
    found.add(filled(180, ["broken"] * 20))
    assert (found.bad, found.seen) == (20, 200)
    other = count(0.0999)
    with pytest.raises(UserError, match=r"21 of the 210 rows .* data\.max_bad_frac=0\.0999 \(the first: \"k0\""):
        other.add(filled(189, ["broken"] * 21))


def test_the_first_five_are_named_whatever_the_batches() -> None:
    found = count(0.0)
    for first in (0, 3, 6, 9, 12):
        found.add(filled(1, ["broken"] * 3, first=first))
    with pytest.raises(UserError) as error:
        found.add(filled(1, ["broken"], first=15))
    assert [f'"k{i}"' in str(error.value) for i in range(7)] == [True] * 5 + [False] * 2
    assert "; all of them" not in str(error.value)


def test_the_message_names_the_file_with_all_of_them() -> None:
    with pytest.raises(UserError, match=r"\(the first: .*; all of them: replaced\.jsonl\): pack again"):
        count(report="replaced.jsonl").add(filled(0, ["broken"] * 16))


@pytest.mark.parametrize(
    ("reasons", "remedy"),
    [
        ([NO_CAPTION, NO_PICTURE], PAIRS_ALONE),
        ([NO_PICTURE, NO_PICTURE], PAIRS_ALONE),
        ([NO_CAPTION, "broken"], "pack again from whole pictures"),
        (["broken", NO_PICTURE], "pack again from whole pictures"),
    ],
)
def test_rows_of_one_modality_are_to_be_packed_apart_and_damage_is_to_be_packed_again(
    reasons: list[str], remedy: str
) -> None:
    with pytest.raises(UserError) as error:
        count().add(filled(0, reasons * 8))
    assert f"): {remedy}, or raise data.max_bad_frac" in str(error.value)


class Shard:
    """100 rows in one file; `next_in_shard` gives at most `tries` rows after a row."""

    def row(self, number: int) -> Any:
        return SimpleNamespace(number=number, key=f"k{number}", index_in_shard=number)

    def next_in_shard(self, number: int, tries: int) -> Any:
        assert tries == MAX_TRIES == 16
        return iter(range(number + 1, number + 1 + tries))

    def file_of(self, row: Any) -> str:
        return "shard-0.arrow"


class Reader:
    """A picture is the number of its row; some rows are bad."""

    def __init__(self, bad: dict[int, str]) -> None:
        self.bad = bad

    def read(self, rows: list[Any], params: Any) -> Any:
        numbers = [row.number for row in rows]
        images = torch.tensor([float(n) for n in numbers]).view(-1, 1, 1, 1) + params
        return SimpleNamespace(images=images, reasons=[self.bad.get(n) for n in numbers])


class Params(torch.Tensor):
    """Augmentation parameters that add a fraction to each picture."""

    def take(self, places: list[int]) -> torch.Tensor:  # type: ignore[override]
        return self[places]


def filling(numbers: list[int], bad: dict[int, str]) -> Filled:
    given: Any = (Shard(), Reader(bad), [10 * n for n in numbers], numbers)
    fractions = torch.arange(1, len(numbers) + 1).view(-1, 1, 1, 1) / 64
    return fill(*given, fractions.as_subclass(Params))


def test_the_next_good_row_of_the_shard_takes_the_place_and_keeps_its_parameters() -> None:
    found = filling([7, 20, 7], {20: "broken", 21: "cut", 7: "odd"})
    assert [row.number for row in found.rows] == [8, 22, 8]
    assert found.images.flatten().tolist() == [8 + 1 / 64, 22 + 2 / 64, 8 + 3 / 64]
    assert found.positions == (70, 200, 70)
    assert found.replaced == (
        BadRow(70, 7, "k7", "odd"),
        BadRow(200, 20, "k20", "broken"),
        BadRow(200, 21, "k21", "cut"),
        BadRow(70, 7, "k7", "odd"),
    )


def test_a_row_whose_sixteen_successors_are_bad_ends_the_run() -> None:
    bad = {n: f"r{n}" for n in range(3, 19)}
    assert filling([3], bad).rows[0].number == 19
    with pytest.raises(UserError) as error:
        filling([3], bad | {19: "r19"})
    assert str(error.value) == (
        'shard-0.arrow: row 3 (key "k3": r3) is bad, and so are the 16 rows after it that could stand in '
        "(the last: r19): pack the shard again from whole pictures"
    )


def test_the_file_of_replaced_rows_gets_whole_lines_in_a_directory_that_it_makes(tmp_path: Path) -> None:
    path = tmp_path / "run" / "logs" / "replaced.jsonl"
    _append(path, "1\n")
    _append(path, "2\n")
    assert path.read_text() == "1\n2\n"
    # What a kill cut off stays a line of its own.
    path.write_text("1\n2")
    _append(path, "3\n")
    assert path.read_text() == "1\n2\n3\n"
