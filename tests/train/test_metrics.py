"""A run goes on from the logs that a power cut or a person has damaged: what is no line of a step is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from limoe_dist.config.schema import Log, Run
from limoe_dist.train import metrics

QUIET = Run(log=Log(tensorboard=False))
DAMAGED = [
    b"5",
    b"null",
    b"[1]",
    b'"x"',
    b"{}",
    b'{"step": "1"}',
    b'{"step": null}',
    b'{"step": true}',
    b'{"step": 1',
    b"\xff\xfe",
    b"\0" * 40,
    b"[" * 100_000,
    b"1" * 10_000,
]
NAMES = ("metrics.jsonl", "evaluations.jsonl", "positions.jsonl")


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: repr(damage[:16]))
def test_a_damaged_line_is_dropped_and_whole_ones_stay(tmp_path: Path, damage: bytes) -> None:
    first, second = b'{"step": 1, "end": 8}', b'{"step": 2, "end": 16}'
    for name in NAMES:
        (tmp_path / name).write_bytes(b"\n".join([first, damage, second, b'{"step": 3, "end": 24}', damage, b""]))
    log = metrics.Log(tmp_path, QUIET, first_step=2, writes=True)
    for name in NAMES:
        assert (tmp_path / name).read_bytes().splitlines() == [first, second]
    assert log.newest_positions() == {"step": 2, "end": 16}
    assert [log.has_evaluation(step) for step in (1, 2, 3)] == [True, True, False]


def test_the_newest_positions_are_those_of_the_last_line_that_says_their_end(tmp_path: Path) -> None:
    (tmp_path / "positions.jsonl").write_text('{"step": 1, "end": 8}\n{"step": 2}\n{"step": 3, "end": "24"}\n')
    assert metrics.Log(tmp_path, QUIET, first_step=4, writes=True).newest_positions() == {"step": 1, "end": 8}


def test_a_line_with_strange_bytes_in_it_still_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "note": "\xff"}\n')
    metrics.Log(tmp_path, QUIET, first_step=1, writes=True)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 1, "note": "\ufffd"}\n'


def test_without_files_there_are_no_positions_and_no_evaluations(tmp_path: Path) -> None:
    for writes in (True, False):
        log = metrics.Log(tmp_path, QUIET, first_step=0, writes=writes)
        assert (log.newest_positions(), log.has_evaluation(0)) == (None, False)
