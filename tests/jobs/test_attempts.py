"""What the lines of attempts.jsonl and faults.jsonl mean for restarts and hosts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slurm.attempts import (
    ATTEMPTS,
    Attempt,
    append,
    attempts,
    ended_by,
    exclusion,
    failures,
    family,
    for_good,
    idle,
    lines,
    read_ended,
    worth_another,
)


def tried(job: str, restart: int = 0, *, step: int = 0, action: str = "requeue", **more: Any) -> Attempt:
    given = {"nodes": ("n1", "n2"), "began": 0.0, "status": 1} | more
    return Attempt(job=job, restart=restart, step=step, action=action, **given)


def fault(*hosts: str, job: str = "1", restart: int = 0) -> dict[str, Any]:
    return {"kind": "hang", "hosts": list(hosts), "job": job, "restart": restart}


def test_a_begin_is_closed_by_the_end_or_the_loss_of_the_same_restart(tmp_path: Path) -> None:
    path = tmp_path / ATTEMPTS
    append(path, {"event": "begin", "time": 10.0, "job": "1", "restart": 0, "nodes": ["n1", "n2"], "step": 0})
    append(path, {"event": "end", "time": 20.0, "job": "1", "restart": 0, "status": 75, "step": 5, "action": "requeue"})
    append(path, {"event": "begin", "time": 30.0, "job": "1", "restart": 1, "nodes": ["n1", "n2"], "step": 5})
    append(path, {"event": "lost", "time": 40.0, "job": "1", "restart": 1, "hosts": ["n2"], "step": 7})
    append(path, {"event": "begin", "time": 50.0, "job": "1", "restart": 2, "nodes": ["n1", "n3"], "step": 7})
    first, second, third = attempts(tmp_path)
    assert (first.status, first.action, first.ended, first.end_step, first.step) == (75, "requeue", 20.0, 5, 0)
    # Nobody knows when a lost attempt ended: the time of the line is that of its successor.
    assert (second.action, second.lost, second.ended) == ("lost", ("n2",), None)
    assert (third.action, third.nodes, third.key) == ("", ("n1", "n3"), ("1", 2))


def test_a_host_that_is_lost_may_be_noted_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / ATTEMPTS
    append(path, {"event": "begin", "time": 1.0, "job": "1", "restart": 0, "nodes": ["n1"], "step": 0})
    append(path, {"event": "end", "time": 2.0, "job": "1", "restart": 0, "status": 1, "action": "cancelled"})
    append(path, {"event": "lost", "time": 2.1, "job": "1", "restart": 0, "hosts": ["n1"]})
    (one,) = attempts(tmp_path)
    assert (one.action, one.status, one.lost) == ("cancelled", 1, ("n1",))


def test_that_it_was_preempted_may_be_noted_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / ATTEMPTS
    append(path, {"event": "begin", "time": 1.0, "job": "1", "restart": 0, "nodes": ["n1"], "step": 0})
    for action in ("cancelled", "preempted", "cancelled"):
        append(path, {"event": "end", "time": 2.0, "job": "1", "restart": 0, "status": 143, "action": action})
    assert [one.action for one in attempts(tmp_path)] == ["preempted"]


ODD = (None, [], {}, "x", True, float("nan"), float("inf"), -1, 10**400)


def test_odd_values_of_a_file_are_none_and_no_error(tmp_path: Path) -> None:
    path = tmp_path / ATTEMPTS
    for odd in ODD:
        fields = {"time": odd, "job": "1", "restart": odd, "nodes": odd, "step": odd, "mark": odd, "slurmd": {"n": odd}}
        append(path, {"event": "begin"} | fields)
        append(path, {"event": "end", "status": odd, "action": odd} | fields)
        (tmp_path / "ended.json").write_text(json.dumps({"step": odd, "signal": odd, "status": odd}))
        ended = read_ended(tmp_path)
        assert ended is None or (ended.step, ended.status) == (1, 1)
        (tmp_path / "ended.json").write_text(json.dumps({"step": odd, "signal": 0, "status": 75}))
        ended = read_ended(tmp_path)
        assert ended.step in (0, 1) if isinstance(odd, int) and ended is not None else ended is None
    for one in attempts(tmp_path):
        # True is 1 in Python; anything else is no number of a restart, and no time.
        assert (one.restart, one.step) in ((0, 0), (1, 1))
        assert one.began in (0.0, 1.0, -1.0)
        assert one.status in (None, 1)
    assert len(attempts(tmp_path)) == len(ODD)


def test_a_line_that_a_power_cut_left_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append(path, {"step": 1})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "te\xc3')
    append(path, {"step": 3})
    with path.open("a") as file:
        file.write('\n[1]\n"text"\n\x00\x00\n')
    assert lines(path) == [{"step": 1}, {"step": 3}]
    assert lines(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ({"step": 3, "signal": 0, "status": 3}, 3),
        ({"step": 3, "signal": 10, "status": 75}, 75),
        ({"step": 3, "signal": 0}, 0),
        ({"step": 3, "signal": 15}, 143),
    ],
)
def test_how_a_run_ended_is_read(tmp_path: Path, content: dict[str, Any], status: int) -> None:
    (tmp_path / "ended.json").write_text(json.dumps(content))
    ended = read_ended(tmp_path)
    assert ended is not None
    assert (ended.step, ended.status) == (3, status)
    (tmp_path / "ended.json").write_text('{"step": ')
    assert read_ended(tmp_path) is None


def test_an_end_that_was_there_before_is_not_of_this_attempt(tmp_path: Path) -> None:
    (tmp_path / "ended.json").write_text('{"step": 3, "signal": 0}')
    ended = read_ended(tmp_path)
    assert ended is not None
    assert ended_by(tried("1", mark=ended.mark), ended) is None
    assert ended_by(tried("1", mark=None), ended) == ended


def test_a_chain_and_what_jobs_submit_in_their_place_are_one_family() -> None:
    past = [tried("1"), tried("2"), tried("7", action="resubmit"), tried("8"), tried("9")]
    submissions = [{"jobs": ["1", "2"]}, {"jobs": ["7"]}, {"jobs": ["9"]}]
    assert family(past, submissions, "2") == {"1", "2"}
    # 8 is in no list, and comes right after one that was submitted anew.
    assert family(past, submissions, "8") == {"7", "8"}
    # 9 is a person's.
    assert family(past, submissions, "9") == {"9"}
    assert family(past, [{"jobs": ["7"]}, {"jobs": ["20"], "after": "7"}], "20") == {"7", "20"}
    assert family([], [], "1") == {"1"}


def test_a_host_fails_once_in_an_attempt_however_many_say_so() -> None:
    past = [tried("1", lost=("n2",)), tried("1", 1)]
    both = [fault("n2.cluster.example"), fault("n2", restart=1), fault("n1", restart=1)]
    assert failures(past, both) == {"n2": {("1", 0), ("1", 1)}, "n1": {("1", 1)}}
    assert exclusion(past, both, ["n1", "n2"]).hosts == ("n2",)
    assert exclusion(past, both[:1], ["n1", "n2"]).hosts == ()


def test_never_more_than_half_of_the_nodes_are_excluded() -> None:
    past = [tried("1", restart) for restart in range(3)]
    all_fail = [fault("n1", "n2", restart=restart) for restart in range(2)] + [fault("n2", restart=2)]
    found = exclusion(past, all_fail, ["n1", "n2"])
    # n2 failed three times, n1 twice; one of two may go.
    assert (found.hosts, found.spared) == (("n2",), ("n1",))
    assert exclusion(past, all_fail, ["n3", "n4"]).hosts == ("n2", "n1")
    alone = [tried("1", restart, nodes=("n1",)) for restart in range(2)]
    assert exclusion(alone, [fault("n1"), fault("n1", restart=1)], ["n1"]).hosts == ()


def test_a_host_that_the_run_never_had_is_not_excluded() -> None:
    assert exclusion([tried("1")], [fault("login"), fault("login", restart=1)], ["n1", "n2"]).hosts == ()


def test_starts_without_a_new_step_are_counted_back_to_the_last_that_brought_one() -> None:
    past = [tried("1", 0, step=0), tried("1", 1, step=10), tried("1", 2, step=10)]
    found = idle(past, [], step=10, nodes=["n1", "n2"])
    assert [attempt.restart for attempt in found.counted] == [1, 2]
    assert found.total == 2
    assert idle(past, [], step=11, nodes=["n1", "n2"]).total == 0


def test_a_run_that_went_back_to_an_older_checkpoint_and_on_from_there_made_steps() -> None:
    past = [tried("1", 0, step=100), tried("1", 1, step=90)]
    assert idle(past, [], step=95, nodes=["n1"]).total == 0


@pytest.mark.parametrize(
    "wished",
    [
        {"action": "cancelled"},
        {"action": "preempted"},
        {"action": "lost"},
        {"action": ""},
        {"action": "stop", "status": 143},
    ],
)
def test_what_others_ended_counts_among_all_kinds_only(wished: dict[str, Any]) -> None:
    past = [tried("1", 0, **wished), tried("1", 1)]
    found = idle(past, [], step=0, nodes=["n1", "n2"])
    assert [attempt.restart for attempt in found.counted] == [1]
    assert found.total == 2


def test_a_start_that_failed_by_a_host_which_is_gone_does_not_count() -> None:
    past = [tried("1", 0), tried("1", 1)]
    faults = [fault("n2"), fault("n2", restart=1)]
    assert idle(past, faults, step=0, nodes=["n1", "n3"]).counted == ()
    assert len(idle(past, faults, step=0, nodes=["n1", "n2"]).counted) == 2


def test_a_job_that_was_sent_away_is_no_start() -> None:
    past = [tried("1", 0), tried("1", 1, trained=False, action="stop")]
    assert idle(past, [], step=0, nodes=["n1"]).total == 1
    assert for_good([tried("1", status=2), tried("1", 1, trained=False)], "1") is not None


def test_only_the_newest_start_stops_a_run_for_good() -> None:
    assert for_good([tried("1", status=3)], "1") is not None
    assert for_good([tried("1", status=2), tried("1", 1, status=1)], "1") is None
    assert for_good([], "1") is None


@pytest.mark.parametrize(
    ("status", "action", "job", "stops"),
    [
        (143, "stop", "2", True),
        (130, "stop", "2", True),
        # Somebody put that job into the queue again.
        (143, "stop", "1", False),
        (143, "preempted", "2", False),
        # scancel, or a preemption: nobody can tell.
        (143, "cancelled", "2", False),
        (143, "lost", "2", False),
    ],
)
def test_a_persons_signal_stops_the_next_job_and_a_preemption_does_not(
    status: int, action: str, job: str, stops: bool
) -> None:
    assert (for_good([tried("1", status=status, action=action)], job) is not None) is stops


def test_what_another_start_may_help() -> None:
    assert [status for status in (0, 1, 2, 3, 75, 130, 137, 139, 143) if worth_another(status)] == [1, 75, 137, 139]
