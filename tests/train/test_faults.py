"""The file of faults: whole lines, whoever else writes there, and no directory out of nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from limoe_dist.parallel.fault import Fault
from limoe_dist.train.faults import TEXT, attempt, fault_file

HANG = Fault("hang", (2, 3), ("n2",), "no progress")
SLURM = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "faults.jsonl").read_text().splitlines() if line]


def test_a_fault_is_a_line_with_the_job_and_its_restart(tmp_path: Path) -> None:
    fault_file(tmp_path, SLURM, wall=lambda: 50.0)(HANG)
    assert lines(tmp_path) == [
        {
            "time": 50.0,
            "kind": "hang",
            "ranks": [2, 3],
            "hosts": ["n2"],
            "text": "no progress",
            "job": "17",
            "restart": 2,
        }
    ]
    assert attempt({}) == {"job": None, "restart": 0}


def test_before_a_run_has_begun_its_directory_is_made_but_not_the_way_to_it(tmp_path: Path) -> None:
    fault_file(tmp_path / "run", {})(HANG)
    assert len(lines(tmp_path / "run")) == 1
    with pytest.raises(FileNotFoundError):
        fault_file(tmp_path / "mistyped" / "run", {})(HANG)
    assert not (tmp_path / "mistyped").exists()


def test_a_line_follows_a_whole_line_also_where_the_last_one_was_cut(tmp_path: Path) -> None:
    (tmp_path / "faults.jsonl").write_text('{"kind": "absent"}\n{"kind": "ha')
    fault_file(tmp_path, {})(HANG)
    *_, cut, last = (tmp_path / "faults.jsonl").read_text().splitlines()
    assert cut == '{"kind": "ha'
    assert json.loads(last)["kind"] == "hang"


def test_what_every_rank_finds_by_itself_is_noted_once_and_again_after_a_restart(tmp_path: Path) -> None:
    found = Fault("absent", (0,), (), "rank 1 did not reach rank 0")
    same = Fault("absent", (0,), (), "rank 2 did not reach rank 0")
    fault_file(tmp_path, SLURM, wall=lambda: 50.0)(found)
    fault_file(tmp_path, SLURM, wall=lambda: 51.0)(same)
    assert len(lines(tmp_path)) == 1
    fault_file(tmp_path, SLURM | {"SLURM_RESTART_COUNT": "3"}, wall=lambda: 52.0)(same)
    fault_file(tmp_path, SLURM, wall=lambda: 53.0)(HANG)
    # Without Slurm two starts have no number: time tells them apart.
    fault_file(tmp_path, SLURM, wall=lambda: 500.0)(found)
    assert [line["time"] for line in lines(tmp_path)] == [50.0, 52.0, 53.0, 500.0]


def test_many_writers_leave_whole_lines(tmp_path: Path) -> None:
    notes = [fault_file(tmp_path, {}) for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: notes[n](Fault("failed", (n,), (), "x" * 3 * TEXT)), range(16)))
    assert sorted(line["ranks"][0] for line in lines(tmp_path)) == list(range(16))
    assert {len(line["text"]) for line in lines(tmp_path)} == {TEXT}
