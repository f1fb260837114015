from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from limoe_dist.analysis.history import read_metrics
from limoe_dist.analysis.routing_plots import TextShares, text_shares, text_shares_svg
from tests.analysis.lines import Parsed, metrics_line, write


def test_text_shares_are_of_the_text_that_was_processed(tmp_path: Path) -> None:
    lines = [metrics_line(step, blocks=(5,)) for step in (10, 20, 30)]
    lines[1]["blocks"]["5"] = lines[1]["blocks"]["5"] | {"kept": [[9.0, 1.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0]]}
    # A line without text says nothing, and is left out.
    lines[2]["blocks"]["5"] = lines[2]["blocks"]["5"] | {"kept": [[9.0, 0.0]] * 4}
    found = text_shares(read_metrics(write(tmp_path / "metrics.jsonl", lines)), 5)
    assert found is not None
    assert found.steps.tolist() == [10, 20]
    # KEPT: 10 and 9 of 19 text tokens; then 1, 1 and 2 of 4.
    assert found.shares_En.tolist() == [[10 / 19, 0.25], [0.0, 0.25], [9 / 19, 0.5], [0.0, 0.0]]
    # Expert 3 never has one.
    assert found.named == [0, 1, 2]


def test_no_kept_tokens_no_drawing(tmp_path: Path) -> None:
    lines = [metrics_line(10, blocks=(5,))]
    history = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert text_shares(history, 3) is None
    del lines[0]["blocks"]["5"]["kept"]
    assert text_shares(read_metrics(write(tmp_path / "metrics.jsonl", lines)), 5) is None


def test_of_many_experts_the_largest_have_a_band_of_their_own() -> None:
    shares_En = np.zeros((32, 3))
    shares_En[:7] = np.array([0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04])[:, None]
    shares = TextShares(1, np.array([1.0, 2.0, 3.0]), shares_En)
    assert shares.named == [0, 1, 2, 3, 4, 5]
    (drawn,) = Parsed(text_shares_svg(shares, prefix="w")).named("svg")
    label = drawn.get("aria-label") or ""
    assert "expert 0 40%" in label
    assert "others 4%" in label


@pytest.mark.parametrize("lines", [1, 5000])
def test_a_drawing_over_time_stays_small(lines: int) -> None:
    noise: npt.NDArray[np.float64] = np.random.default_rng(0).random((8, lines))
    steps = np.arange(1, lines + 1, dtype=np.float64)
    drawn = text_shares_svg(TextShares(1, steps, noise / noise.sum(0)), prefix="w")
    assert 1000 < len(drawn) < 40_000
