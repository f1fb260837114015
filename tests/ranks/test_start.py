"""The start of ranks, and their end where one of them does not come, differs, raises, hangs or is killed.

Every rank is a process of its own, started as a launcher starts it, and ended by nobody but itself.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from launch.ranks import agreement
from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Run
from limoe_dist.parallel.watchdog import ANSWER_S, LAST_S, LOOK_S
from tests.ranks.starting import Ended, run_ranks

HOST = socket.gethostname()
HOSTS = {0: "n1", 1: "n2", 2: "n3"}


def told(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("limoe: error: ")]


def faults_of(ended: Ended) -> list[tuple[str, list[int], list[str]]]:
    """Kind, ranks and hosts of each line of faults.jsonl."""
    return [(fault["kind"], fault["ranks"], fault["hosts"]) for fault in ended.faults]


def test_a_rank_that_never_comes_is_named_with_its_host_on_all_that_came_and_told_once(tmp_path: Path) -> None:
    ended = run_ranks("meet", tmp_path, world=4, ranks=[0, 1, 3], start_s=2)
    # No setting is to blame: a job that is started again may go on.
    assert ended.statuses == {0: 1, 1: 1, 3: 1}
    (line,) = told(ended.printed)
    assert f"rank 2 (host {HOST}) of 4 did not come within parallel.start_timeout_s=2 seconds" in line
    assert f"ranks 0-1, 3 (host {HOST}) came" in line
    assert faults_of(ended) == [("absent", [2], [HOST])]


def test_without_rank_0_the_others_say_where_they_looked_for_it(tmp_path: Path) -> None:
    ended = run_ranks("meet", tmp_path, world=2, ranks=[1], start_s=1)
    assert ended.statuses == {1: 1}
    assert f"limoe: error: rank 1: this rank, on host {HOST}, did not reach rank 0 at 127.0.0.1:" in ended.printed
    assert "Connection refused" in ended.printed
    assert faults_of(ended) == [("absent", [0], [])]


def test_a_rank_0_that_never_comes_to_a_launchers_store_is_named_by_the_first_that_did(tmp_path: Path) -> None:
    ended = run_ranks("meet", tmp_path, world=3, ranks=[1, 2], start_s=1, launchers_store=True)
    assert ended.statuses == {1: 1, 2: 1}
    (line,) = told(ended.printed)
    assert "rank 1: rank 0 " in line
    assert "of 3 did not come" in line


def words_of(run: Run, manifest: Path) -> list[str]:
    words = agreement(run, files={"data.manifest": str(manifest)}, options={"--resume": False})
    return [f"{name}={value}" for name, value in words.items()]


def test_ranks_with_other_settings_or_other_data_are_refused_with_both_named(tmp_path: Path) -> None:
    run = preset("tiny")
    other = run.model_copy(update={"optim": run.optim.model_copy(update={"lr": 0.5})})
    manifests = [tmp_path / "a.json", tmp_path / "b.json"]
    for number, manifest in enumerate(manifests):
        manifest.write_text(json.dumps({"rows": number}))
    words = [words_of(run, manifests[0]), words_of(other, manifests[0]), words_of(run, manifests[1])]
    ended = run_ranks("meet", tmp_path, world=3, words=dict(enumerate(words)))
    assert ended.statuses == {0: 2, 1: 2, 2: 2}
    lr, data, last = told(ended.printed)
    assert f"optim.lr={run.optim.lr} on ranks 0, 2 (host {HOST}) but 0.5 on rank 1 (host {HOST})" in lr
    assert "sha256 of data.manifest=" in data
    assert f"on ranks 0-1 (host {HOST}) but " in data
    assert data.endswith(f"on rank 2 (host {HOST})")
    assert "same settings, code and data" in last
    assert ended.faults == []


def test_what_every_rank_found_before_the_start_is_told_once_and_what_one_found_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    alike = run_ranks("meet", tmp_path, world=2, problems={0: "ep=3 is wrong\nlr=0 too", 1: "ep=3 is wrong\nlr=0 too"})
    assert alike.statuses == {0: 2, 1: 2}
    assert alike.printed == "limoe: error: ep=3 is wrong\nlimoe: error: lr=0 too\n"
    one = run_ranks("meet", tmp_path / "one", world=2, problems={1: "m.json: cannot be read"})
    assert one.statuses == {0: 2, 1: 2}
    line, _ = told(one.printed)
    assert line.endswith(f"problem=none on rank 0 (host {HOST}) but m.json: cannot be read on rank 1 (host {HOST})")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_traceback_of_the_rank_that_raises_comes_first_and_every_rank_ends(tmp_path: Path, rank: int) -> None:
    ended = run_ranks("one_raises", tmp_path, world=3, rank=rank, hosts=HOSTS)
    assert ended.statuses == {0: 1, 1: 1, 2: 1}
    lines = [line for line in ended.printed.splitlines() if not line.endswith(" met")]
    assert lines[:2] == [f"limoe: rank {rank} (host {HOSTS[rank]}) failed:", "Traceback (most recent call last):"]
    end = lines.index("KeyError: 'planted'")
    others = {f"limoe: rank {other} (host {HOSTS[other]}) ends" for other in {0, 1, 2} - {rank}}
    assert {line.partition(" because")[0] for line in lines[end + 1 :]} == others
    assert all(line.endswith(f"rank {rank} (host {HOSTS[rank]}) failed with KeyError") for line in lines[end + 1 :])
    # The program's error would be the same on another host.
    assert faults_of(ended) == [("failed", [rank], [])]
    assert ended.faults[0]["text"] == f"rank {rank} (host {HOSTS[rank]}) failed with KeyError: 'planted'"


def test_a_hang_is_told_with_what_each_rank_was_in_and_where_the_missing_one_stood(tmp_path: Path) -> None:
    ended = run_ranks("one_sleeps", tmp_path, world=3, timeout_s=2, hosts=HOSTS)
    assert ended.statuses == {0: 1, 1: 1, 2: 1}
    lines = [line for line in ended.printed.splitlines() if not line.endswith(" met")]
    assert lines[0] == "limoe: error: no progress for parallel.timeout_s=2 seconds; what each rank is in:"
    for number, line in enumerate(lines[1:4]):
        assert line.startswith(f"  rank {number} (host {HOSTS[number]}): ")
    # 5 numbers of 8 bytes; the sleeping rank had left a sum of 3 numbers of 4 bytes.
    for line in (lines[1], lines[3]):
        assert "in all_reduce over world, 40 bytes, call " in line
        assert "parallel/collectives.py:" in line
        assert "flight recorder: gloo:all_reduce " in line
    assert "outside of collectives for " in lines[2]
    assert "last in all_reduce over world, 12 bytes, call " in lines[2]
    assert "ranks/starting.py:" in lines[2]
    assert " fall_asleep < " in lines[2]
    # The others only wait for it.
    assert faults_of(ended) == [("hang", [1], ["n2"])]
    # Whole stacks follow, first that of the odd one; those that are alike once.
    own, alike = ended.printed.partition("Stack of ")[2].split("Stack of ")
    name, *frames = own.splitlines()
    assert name == "the main thread of rank 1 (host n2), innermost first:"
    functions = [frame.split()[-1] for frame in frames if frame.startswith("    ")]
    assert functions[:4] == ["fall_asleep", "one_sleeps", "main", "main"]
    assert "_serve" in functions
    name, *frames = alike.splitlines()
    assert name == "the main thread of rank 0 (host n1), rank 2 (host n3), innermost first:"
    assert any(frame.endswith(" sum_over") for frame in frames)


def test_ranks_end_without_a_rank_that_stands_still_and_cannot_answer(tmp_path: Path) -> None:
    ended = run_ranks("one_is_stopped", tmp_path, world=3, timeout_s=2, awaits=[0, 2], hosts=HOSTS)
    assert ended.statuses == {0: 1, 1: None, 2: 1}
    assert "rank 1 (host n2) did not answer" in ended.printed
    assert "  rank 1 (host n2): silent" in ended.printed
    assert "Stack of the main thread of rank 0 (host n1), rank 2 (host n3), innermost first:\n" in ended.printed
    assert faults_of(ended) == [("hang", [1], ["n2"])]
    # The limit, a look, the time to answer and to end; and the start.
    assert ended.seconds < 2 + LOOK_S + ANSWER_S + LAST_S + 5


def test_where_the_rank_that_keeps_the_store_stands_still_the_others_end_too(tmp_path: Path) -> None:
    ended = run_ranks("one_is_stopped", tmp_path, world=2, timeout_s=2, rank=0, awaits=[1], hosts=HOSTS)
    assert ended.statuses == {0: None, 1: 1}
    gone = "limoe: rank 1 (host n2) ends because the store of rank 0 (host n1) is gone: its process stands still"
    assert gone in ended.printed
    assert "Stack of the main thread of rank 1 (host n2), innermost first:\n" in ended.printed
    assert faults_of(ended) == [("hang", [0], ["n1"])]


def test_a_killed_rank_is_named_beside_the_error_that_it_caused(tmp_path: Path) -> None:
    ended = run_ranks("one_is_killed", tmp_path, world=3, hosts=HOSTS)
    assert ended.statuses == {0: 1, 1: -9, 2: 1}
    (line,) = told(ended.printed)
    assert "rank 1 (host n2) did not answer" in line
    assert ended.printed.count("Traceback") == 1
    assert ended.printed.count("lost a connection in or after all_reduce over world, 12 bytes") == 2
    assert faults_of(ended) == [("broken", [1], ["n2"])]


def test_where_rank_0_is_killed_the_others_end_too(tmp_path: Path) -> None:
    ended = run_ranks("one_is_killed", tmp_path, world=3, rank=0, hosts=HOSTS)
    assert ended.statuses == {0: -9, 1: 1, 2: 1}
    for rank in (1, 2):
        line = f"limoe: rank {rank} (host {HOSTS[rank]}) ends because the store of rank 0 (host n1) is gone: it died"
        assert line in ended.printed
    assert "Traceback" not in ended.printed
    assert set(map(str, faults_of(ended))) == {str(("broken", [0], ["n1"]))}


def test_a_problem_of_all_ranks_is_told_once_and_one_of_a_single_rank_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    together = run_ranks("all_have_a_problem", tmp_path, world=2)
    assert together.statuses == {0: 2, 1: 2}
    assert together.printed == "limoe: error: rank 1: shard 7 is missing\n"
    assert together.faults == []
    alone = run_ranks("one_has_a_problem", tmp_path / "one", world=2)
    assert alone.statuses == {0: 1, 1: 2}
    assert "limoe: error: rank 1: only rank 1 has this problem\n" in alone.printed
    assert f"limoe: rank 0 (host {HOST}) ends because rank 1 (host {HOST}) ended with an error\n" in alone.printed
    assert "Traceback" not in alone.printed
    assert alone.faults == []


def test_the_rank_that_keeps_the_store_waits_for_those_that_leave_later(tmp_path: Path) -> None:
    ended = run_ranks("one_leaves_late", tmp_path, world=3)
    assert ended.statuses == {0: 0, 1: 0, 2: 0}
    assert sorted(ended.printed.splitlines()) == [f"rank {rank} met" for rank in range(3)]


@pytest.mark.parametrize("launchers_store", [True, False])
def test_ranks_start_twice_in_one_process(tmp_path: Path, launchers_store: bool) -> None:
    ended = run_ranks("meet", tmp_path, world=2, starts=2, launchers_store=launchers_store)
    assert ended.statuses == {0: 0, 1: 0}
    assert ended.printed.count("met") == 4
