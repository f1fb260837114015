from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from limoe_dist.analysis.curves import training_panels
from limoe_dist.analysis.history import read_metrics
from limoe_dist.analysis.incidents import MOST_EVENTS, MOST_FAULTS, read_incidents
from limoe_dist.config.presets import preset
from limoe_dist.train import ledger
from tests.analysis.lines import metrics_line, write


def fault(*hosts: str, **others: Any) -> dict[str, Any]:
    line = {"time": 1.7e9, "kind": "hang", "ranks": [1], "hosts": list(hosts), "text": "stands still", "job": "17"}
    return line | {"restart": 0} | others


def test_events_are_read_as_the_ledger_writes_them(tmp_path: Path) -> None:
    skip = ledger.Event("non_finite", "skip", 8, "step 8: the loss is not finite", time=1.7e9)
    back = ledger.Event("spike", "rollback", 13, "step 13: the loss leaps", loss=310.4, z=519.9, time=1.7e9 + 60)
    ledger.append(tmp_path, skip.passing(112, 128))
    ledger.append(tmp_path, back.passing(120, 208).told("back to step 10", to_step=10))
    found = read_incidents(tmp_path)
    assert found is not None
    first, second = found.events
    assert (first.what, first.when, first.span, first.to_step) == (
        "the loss is not finite",
        "2023-11-14 22:13:20",
        (112, 128),
        None,
    )
    assert (second.kind, second.action, second.step, second.to_step) == ("spike", "rollback", 13, 10)
    assert dict(found.counts) == {("non_finite", "skip"): 1, ("spike", "rollback"): 1}
    # 112 to 127 and 120 to 207: 96 positions, of which 8 lie in both.
    assert found.passed_over == 96
    assert found.problems == ()


def test_of_many_events_the_newest_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    lines = [{"kind": "spike", "action": "note", "step": step, "text": ""} for step in range(1, MOST_EVENTS + 8)]
    write(tmp_path / "guard.jsonl", lines)
    found = read_incidents(tmp_path)
    assert found is not None
    assert [event.step for event in found.events] == list(range(8, MOST_EVENTS + 8))
    assert found.counts["spike", "note"] == MOST_EVENTS + 7
    assert found.steps("note", until=10) == [8, 9, 10]
    assert found.steps("note", until=30) == [23, 24, 25, 26, 27, 28, 29, 30]


@pytest.mark.parametrize(
    "bad",
    [
        '{"kind": "spike", "action": "no',
        "[]",
        "[" * 20_000,
        '{"kind": "spike", "action": "note", "step": true}',
        '{"kind": "spike", "action": "note", "step": 1' + 20 * "0" + "}",
        '{"kind": ["spike"], "action": "note", "step": 1}',
        '{"kind": "spike", "action": "dance", "step": 1}',
        "\ufffd\x00",
    ],
)
def test_a_line_that_is_none_of_ours_is_counted_and_the_others_are_read(tmp_path: Path, bad: str) -> None:
    good = json.dumps({"kind": "spike", "action": "note", "step": 3})
    (tmp_path / "guard.jsonl").write_text(f"{bad}\n\n{good}\n", encoding="utf-8")
    found = read_incidents(tmp_path)
    assert found is not None
    assert [(event.step, event.when, event.what) for event in found.events] == [(3, "unknown", "")]
    assert found.problems == ("1 line of guard.jsonl could not be read and is left out.",)


def test_odd_values_leave_the_event(tmp_path: Path) -> None:
    odd = {"time": float("nan"), "text": "long " * 10_000, "first": 9, "end": 9, "to_step": -1}
    write(tmp_path / "guard.jsonl", [{"kind": "collapse", "action": "stop", "step": 1} | odd])
    found = read_incidents(tmp_path)
    assert found is not None
    (event,) = found.events
    assert (event.when, event.span, event.to_step, found.passed_over) == ("unknown", None, None, 0)
    assert len(event.what) < 600


def test_a_ledger_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "guard.jsonl").mkdir()
    found = read_incidents(tmp_path)
    assert found is not None
    assert found.problems == ("guard.jsonl cannot be read: Is a directory.",)


def test_faults_are_grouped_by_host_and_kind_the_most_frequent_first(tmp_path: Path) -> None:
    lines = [
        fault("n1", kind="broken"),
        fault("n2", "n1"),
        fault("n2", text="stands still again", time=1.7e9 + 60),
        fault(kind="broken", text="nobody knows"),
    ]
    write(tmp_path / "faults.jsonl", [*lines, fault(kind="other"), {"kind": "hang", "hosts": "n3"}])
    found = read_incidents(tmp_path)
    assert found is not None
    told = [(group.host, group.kind, group.count, group.what) for group in found.faults]
    assert told[0] == ("n2", "hang", 2, "stands still again")
    assert found.faults[0].when == "2023-11-14 22:14:20"
    assert sorted(told[1:]) == [
        ("", "broken", 1, "nobody knows"),
        ("n1", "broken", 1, "stands still"),
        ("n1", "hang", 1, "stands still"),
    ]
    assert found.fault_lines == 4
    assert found.problems == ("2 lines of faults.jsonl could not be read and are left out.",)


def test_of_many_hosts_the_most_frequent_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "faults.jsonl", [fault(f"n{number % 30}") for number in range(31)])
    found = read_incidents(tmp_path)
    assert found is not None
    assert (len(found.faults), found.fault_groups) == (MOST_FAULTS, 30)
    assert (found.faults[0].host, found.faults[0].count) == ("n0", 2)


@pytest.mark.parametrize(("settings", "watched"), [({"guard": {}}, True), ({"optim": {}}, False), (None, False)])
def test_a_run_from_before_the_guard_is_told_from_one_without_events(
    tmp_path: Path, settings: dict[str, Any] | None, watched: bool
) -> None:
    if settings is not None:
        write(tmp_path / "run.json", [settings])
    found = read_incidents(tmp_path)
    assert (found is not None) == watched
    assert found is None or found.events == ()


def test_marks_are_where_the_curve_is_and_not_where_the_run_went_back_from(tmp_path: Path) -> None:
    steps = ((12, "skip"), (12, "skip"), (39, "stop"), (2000, "rollback"))
    write(tmp_path / "guard.jsonl", [{"kind": "spike", "action": action, "step": step} for step, action in steps])
    history = read_metrics(write(tmp_path / "metrics.jsonl", [metrics_line(step) for step in (10, 20, 30)]))
    # The next line of metrics would be at 40.
    loss, *others = training_panels(history, preset("tiny"), read_incidents(tmp_path))
    assert [(marks.name, marks.steps) for marks in loss.panel.marks] == [("left out", (12,)), ("stopped", (39,))]
    assert not any(note.panel.marks for note in others)


def test_a_run_was_stopped_by_its_guard_until_the_next_start(tmp_path: Path) -> None:
    write(tmp_path / "guard.jsonl", [{"kind": "spike", "action": "stop", "step": 7}])
    found = []
    for status in (3, 75, None):
        (tmp_path / "ended.json").write_text(json.dumps({"step": 6, "status": status}))
        incidents = read_incidents(tmp_path)
        assert incidents is not None
        found.append(incidents.stopped)
    assert found == [True, False, False]
