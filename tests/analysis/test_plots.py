from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from limoe_dist.analysis.plots import Line, Marks, Panel, Reference, alternative, not_finite, svg
from limoe_dist.analysis.summary import duration

STEPS = np.arange(10.0, 60, 10)


def panel(values: list[float], **others: object) -> Panel:
    return Panel("Loss", "nats", (Line("loss", STEPS[: len(values)], np.array(values)),), **others)  # type: ignore[arg-type]


def labels(text: str) -> list[str]:
    return [
        "".join(found.itertext()) for found in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")
    ]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_few_points_are_drawn_as_dots_and_the_axes_are_named(count: int) -> None:
    text = svg(panel([5.0, 4, 3, 2, 1][:count]), prefix="a")
    assert text.count("<use ") >= count
    assert {"step", "nats"} <= set(labels(text))


def test_a_curve_without_a_value_is_still_a_panel() -> None:
    assert "nats" in labels(svg(panel([np.nan, np.inf]), prefix="a"))
    assert alternative(panel([np.nan])) == "Loss. loss: no value."


def test_small_values_keep_their_digits_on_the_axis() -> None:
    shown = [float(label) for label in labels(svg(panel([0.0004, 0.0002, 0.0003], low=0), prefix="a")) if "." in label]
    assert 0.0002 in shown
    assert len(set(shown)) == len(shown)


def test_the_panel_is_told_in_words() -> None:
    told = alternative(panel([5.0, 7.5, 2.25], references=(Reference(4.852, "chance"),)))
    assert told == "Loss. loss: 5 at step 10, 2.25 at step 30, between 2.25 and 7.5; chance: 4.852."
    assert 'aria-label="Loss. loss: 5 at step 10' in svg(panel([5.0]), prefix="a")


def test_marks_stand_upright_over_the_whole_height_and_are_named() -> None:
    marks = (Marks((20, 40), "left out"), Marks((30,), "stopped", "text"))
    text = svg(panel([5.0, 4, 3, 2, 1], marks=marks), prefix="a")
    assert {"left out", "stopped"} <= set(labels(text))
    assert "left out: at 2 steps from 20 to 40; stopped: at step 30." in text
    # A path straight up: two ends with one x.
    upright = [
        (x, y, high) for x, y, to, high in re.findall(r"M ([\d.]+) ([\d.]+) *\nL ([\d.]+) ([\d.]+)", text) if x == to
    ]
    tallest = max(float(y) - float(high) for _, y, high in upright)
    assert tallest > 80


def test_marks_leave_the_vertical_axis_to_the_curve() -> None:
    plain, marked = (
        labels(svg(panel([500.0, 504.0], marks=marks), prefix="a")) for marks in ((), (Marks((15,), "x"),))
    )
    assert [label for label in marked if label not in ("x", "loss")] == plain


def test_two_panels_share_no_id() -> None:
    ids = [re.findall(r'\sid="([^"]*)"', svg(panel([1.0, 2.0]), prefix=prefix)) for prefix in ("a", "b")]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])


def test_references_inside_a_panel_lead_somewhere() -> None:
    text = svg(panel([1.0, 2.0]), prefix="a")
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(re.findall(r'\sid="([^"]*)"', text))


def test_a_value_outside_of_the_named_ends_is_not_cut_off() -> None:
    text = svg(panel([0.5, 3.0], low=0, high=1.0), prefix="a")
    assert "3" in labels(text)


def test_infinite_values_are_counted_and_absent_ones_are_not() -> None:
    assert not_finite(panel([1.0, np.inf, np.nan, -np.inf])) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (61, "1 min 1 s"), (3 * 3600 + 120, "3 h 2 min"), (50 * 3600, "2 d 2 h")]
)
def test_durations_are_read_by_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
