from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from limoe_dist.analysis.history import read_evaluations, read_metrics
from limoe_dist.config.errors import UserError
from tests.analysis.lines import metrics_line, write


def test_a_column_holds_the_figure_of_every_line(tmp_path: Path) -> None:
    lines = [metrics_line(step, contrastive=6.0 - step / 10) for step in (10, 20, 30)]
    history = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert history.steps.tolist() == [10, 20, 30]
    assert history.column("contrastive").tolist() == [5.0, 4.0, 3.0]
    assert history.column("blocks.3.success_text").tolist() == [0.875] * 3
    assert history.latest("blocks.1.entropy_image") == 1.25
    # Expert 0 of block 3 kept 30 image and 10 text tokens.
    assert history.column("blocks.3.kept.0.1").tolist() == [10.0] * 3
    assert history.blocks == (1, 3)


def test_a_figure_that_some_lines_lack_is_nan_there(tmp_path: Path) -> None:
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "b": 5.0, "a": None}, {"step": 3, "a": 3.0, "c": True}]
    history = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    a, b = history.column("a").tolist(), history.column("b").tolist()
    assert (a[0], a[2], b[1]) == (1.0, 3.0, 5.0)
    assert all(math.isnan(value) for value in (a[1], b[0], b[2]))
    assert len(history.column("no such")) == 3
    assert history.latest("c") is None


def test_a_step_that_was_done_again_counts_once_as_it_was_logged_last(tmp_path: Path) -> None:
    lines = [{"step": step, "a": value} for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0))]
    lines[1]["only_then"] = 7.0
    history = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert history.steps.tolist() == [1, 2, 3]
    assert history.column("a").tolist() == [1.0, 20.0, 30.0]
    assert all(math.isnan(value) for value in history.column("only_then")[[0, 2]])


def test_lines_that_a_crash_cut_or_somebody_else_wrote_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(metrics_line(10))
    others = [good[:40], "[1, 2]", '{"step": "ten"}', '{"loss": 1}', '{"step": true}', "[" * 100_000, "\udcff"]
    path.write_bytes("\n".join([*others[:3], good, "", *others[3:]]).encode("utf-8", "surrogateescape"))
    history = read_metrics(path)
    assert (history.steps.tolist(), history.unreadable) == ([10], 7)


def test_no_line_of_metrics_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has not logged anything yet"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="no line of metrics yet"):
        read_metrics(write(tmp_path / "metrics.jsonl", []))


def test_evaluations_may_be_missing(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path / "evaluations.jsonl") is None
    assert read_evaluations(write(tmp_path / "evaluations.jsonl", [])) is None
