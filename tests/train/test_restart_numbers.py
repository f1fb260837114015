"""The arithmetic of a resumed run, by hand: steps, pairs and positions, quarantined ranges, lines, and the clock.

A `Restart` without a model: batches of 10 pairs, and where a checkpoint is needed, one of 4 steps.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Checkpoint, Data, Run, Train
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.train import restart as module
from limoe_dist.train.preemption import StopFlag
from limoe_dist.train.restart import Restart

CPU = torch.device("cpu")
RUN = Run(train=Train(batch_pairs=10), checkpoint=Checkpoint(every_minutes=2))


def restart(tmp_path: Path, *, run: Run = RUN, mesh: Mesh | None = None) -> Restart:
    none: Any = None
    return Restart(run, tmp_path, none, none, Mesh.single() if mesh is None else mesh, CPU)


def resumed(tmp_path: Path) -> Restart:
    """Resumed at step 4 from position 40, of which 3 positions were quarantined: 37 pairs read."""
    found = restart(tmp_path)
    found.first_step = found.step = found.saved = 4
    found.first_pair = 37
    found.quarantined = ((5, 8),)
    found._saved_position = found._told = 40
    return found


def test_a_new_run_reads_whole_batches_from_the_first_position(tmp_path: Path) -> None:
    new = restart(tmp_path)
    assert (new.step, new.saved, new.pairs, new.position) == (0, 0, 0, 0)
    new.step = 3
    assert (new.pairs, new.position) == (30, 30)


def test_a_resumed_run_counts_on_from_the_pairs_of_its_checkpoint(tmp_path: Path) -> None:
    run = resumed(tmp_path)
    assert (run.pairs, run.position) == (37, 40)
    run.step = 6
    assert (run.pairs, run.position) == (57, 60)
    # Counted in batches of now.
    run._batch_before = 20
    assert (run.pairs, run.position) == (57, 60)


def test_a_skipped_batch_moves_the_position_and_not_the_step(tmp_path: Path) -> None:
    run = resumed(tmp_path)
    assert run.leave_out() == (40, 50)
    assert run.quarantined == ((5, 8), (40, 50))
    assert (run.step, run.pairs, run.position) == (4, 37, 50)
    run.step = 5
    assert run.leave_out() == (60, 70)
    assert run.quarantined == ((5, 8), (40, 50), (60, 70))


class SavedAt4:
    """A replacement for what reads and lists checkpoints: there is one, of step 4 and position 40."""

    def __init__(self, run: Restart, monkeypatch: pytest.MonkeyPatch, *, there: bool = True) -> None:
        self.calls: list[str] = []
        run.saver = SimpleNamespace(finish=lambda: self.calls.append("finish"))  # type: ignore[assignment]
        monkeypatch.setattr(module.catalog, "checkpoints", lambda out: [out / "step-00000004"] if there else [])
        monkeypatch.setattr(run, "restore", lambda: self.calls.append("restore") or self.restore(run))
        monkeypatch.setattr(run, "_put_aside", lambda: self.calls.append("put aside"))

    def restore(self, run: Restart) -> None:
        run.first_step = run.step = 4
        run.first_pair, run._saved_position = 37, 40


@pytest.mark.parametrize(
    ("batches", "behind", "span"),
    [
        # Steps 6 and 7 read positions 60 to 79.
        (2, 8, (60, 80)),
        (1, 8, (70, 80)),
        # More batches than there are since the checkpoint: from its position on.
        (9, 6, (40, 60)),
        (4, 8, (40, 80)),
        (3, 8, (50, 80)),
        (0, 8, (80, 80)),
    ],
)
def test_a_rollback_passes_over_the_last_batches_behind_the_checkpoint(
    batches: int, behind: int, span: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resumed(tmp_path)
    run.step = behind
    saved = SavedAt4(run, monkeypatch)
    assert run.go_back(batches, behind=behind) == span
    assert run.quarantined == (((5, 8), span) if span[0] < span[1] else ((5, 8),))
    assert run.step == 4
    assert saved.calls == ["finish", "restore", "put aside"]


def test_a_rollback_never_passes_over_what_comes_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A run that began at step 0 and saved step 4 (position 40): of 6 batches before step 8, four lie behind it.
    run = restart(tmp_path)
    run.step = 8
    SavedAt4(run, monkeypatch)
    assert run.go_back(6, behind=8) == (40, 80)


def test_a_rollback_without_a_checkpoint_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = restart(tmp_path)
    run.step = 3
    saved = SavedAt4(run, monkeypatch, there=False)
    assert run.go_back(2, behind=3) is None
    assert (run.step, run.quarantined, saved.calls) == (3, (), ["finish"])


def test_lines_of_positions_follow_each_other_and_name_what_is_quarantined_inside(tmp_path: Path) -> None:
    run = resumed(tmp_path)
    run.quarantined = ((5, 8), (38, 42), (55, 57), (60, 65))
    assert run._line(4, 6, 60) == {
        "step": 6,
        "from_step": 4,
        "first": 40,
        "end": 60,
        "quarantined": [(40, 42), (55, 57)],
    }
    assert run._line(6, 7, 62) == {"step": 7, "from_step": 6, "first": 60, "end": 62, "quarantined": [(60, 62)]}
    assert run._line(7, 8, 80)["quarantined"] == [(62, 65)]
    assert run._line(8, 9, 90) == {"step": 9, "from_step": 8, "first": 80, "end": 90}
    # What ends where a line begins is not inside.
    run.quarantined = ((85, 90),)
    assert run._line(9, 10, 100) == {"step": 10, "from_step": 9, "first": 90, "end": 100}


@pytest.mark.parametrize(
    ("newest", "line"),
    [
        ({"step": 2, "end": 23}, {"step": 4, "from_step": 2, "first": 23, "end": 40}),
        ({"step": 3, "end": 30}, {"step": 4, "from_step": 3, "first": 30, "end": 40}),
        (None, {"step": 4, "from_step": 0, "first": 0, "end": 40, "quarantined": [(5, 8)]}),
        ({"step": 4, "end": 40}, None),
        ({"step": 5, "end": 50}, None),
    ],
)
def test_the_line_that_a_killed_run_did_not_write_is_written_by_the_next(
    newest: dict[str, Any] | None, line: dict[str, Any] | None, tmp_path: Path
) -> None:
    run = resumed(tmp_path)
    assert run.missed(newest) == line
    assert run._told == (40 if line or newest is None else newest["end"])


def test_the_checksum_of_a_line_is_the_sum_of_what_all_steps_read_modulo_2_64(tmp_path: Path) -> None:
    run = resumed(tmp_path)
    for checksum in (2**64 - 2, 5, 2**63):
        run.count_rows(checksum)
    run.step = 6
    assert run._consumed(4, 6) == {
        "step": 6,
        "from_step": 4,
        "first": 40,
        "end": 60,
        "rows": "8000000000000003",
    }
    # The next line begins anew.
    assert run._consumed(6, 6)["rows"] == "0" * 16
    run.count_rows(7)
    assert run._consumed(6, 7)["rows"] == "0000000000000007"
    assert np.uint64(2**63 + 3) == np.uint64(0x8000000000000003)


@pytest.mark.parametrize(
    ("minutes", "elapsed_s", "rank", "due"),
    [(2.0, 119.9, 0, False), (2.0, 120.0, 0, True), (2.0, 500.0, 1, False), (0.0, 1e6, 0, False), (0.5, 30.0, 0, True)],
)
def test_a_save_is_due_when_the_minutes_have_passed_on_rank_0(
    minutes: float, elapsed_s: float, rank: int, due: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=5000.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    mesh = Mesh.single() if rank == 0 else SimpleNamespace(rank=1, world=Axis("world", 2, 1, None))
    run = restart(
        tmp_path,
        run=RUN.model_copy(update={"checkpoint": Checkpoint(every_minutes=minutes)}),
        mesh=mesh,  # type: ignore[arg-type]
    )
    clock.now += elapsed_s
    assert run.due_by_the_clock() is due


@pytest.mark.parametrize("mixture", [(), ("a=1", "b=2")])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, None),
        ({"data": "0" * 64}, "other training shards"),
        ({"tokenizer": "0" * 64}, "other vocabulary"),
        ({"quarantined": ((30, 50),)}, "no run reads on there"),
    ],
)
def test_a_checkpoint_of_other_data_or_of_an_impossible_position_is_refused(
    change: dict[str, Any],
    named: str | None,
    mixture: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "changed_settings", lambda *_: [])
    run = restart(tmp_path, run=RUN.model_copy(update={"data": Data(mixture=mixture)}))
    monkeypatch.setattr(run, "_settings_of", lambda _: {})
    run.inputs = SimpleNamespace(data_hash="d" * 64, tokenizer_hash="e" * 64)  # type: ignore[assignment]
    saved = {"data": "d" * 64, "tokenizer": "e" * 64, "position": 40, "quarantined": ((5, 8),)} | change
    reader: Any = SimpleNamespace(state=SimpleNamespace(**saved), checkpoint="step-00000004")
    problems = run._differences(reader)
    assert len(problems) == (named is not None)
    assert not problems or named in problems[0]


def test_a_run_whose_first_weights_are_gone_does_not_begin(tmp_path: Path) -> None:
    run = restart(tmp_path, run=RUN.model_copy(update={"train": Train(init_from=str(tmp_path / "gone"))}))
    with pytest.raises(UserError, match=r"train\.init_from=.*gone is gone, and the run has no checkpoint of its own"):
        run.initialise()


def test_checkpoints_that_were_passed_by_are_put_aside_and_told_by_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.catalog, "set_aside", lambda folder: f"{folder}.aside")
    monkeypatch.setattr(module, "all_or_none", lambda *_: nullcontext())
    for rank, told in ((0, ["put aside: a.aside", "put aside: b.aside"]), (1, [])):
        mesh: Any = SimpleNamespace(rank=rank, world=None)
        run, found = restart(tmp_path, mesh=mesh), list[str]()
        run._passed, run._tell = [Path("a"), Path("b")], found.append
        run._put_aside()
        assert found == told


@pytest.mark.parametrize("owned", [True, False])
def test_saves_ask_whose_the_directory_is_and_heed_a_signal(
    owned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = mock.Mock()
    monkeypatch.setattr(module, "Saver", opened)
    run, stop, tell = restart(tmp_path), StopFlag(), mock.Mock()
    run.engine, claim = mock.Mock(), mock.Mock()
    run.open_saver(claim if owned else None, stop, tell)
    given = opened.call_args
    assert given.args == (tmp_path, run.engine.shards(), RUN.checkpoint, run.mesh, CPU)
    assert given.kwargs["check_owner"] is (claim.check if owned else module._nobody_asks)
    assert given.kwargs["tell"] is tell
    assert not given.kwargs["stopped"]()
    stop._received = 15
    assert given.kwargs["stopped"]()


@pytest.mark.parametrize("hurry", [True, False])
def test_the_last_save_is_read_back_where_there_is_time(hurry: bool, tmp_path: Path) -> None:
    run = restart(tmp_path)
    run.saver = mock.Mock(failure="")
    run.finish(hurry=hurry)
    assert run.saver.finish.call_args == mock.call(read_back=not hurry)
    run.saver.failure, run.saver.failed_by = "the disk is full", None
    with pytest.raises(UserError, match="the disk is full; older checkpoints stand"):
        run.finish(hurry=hurry)


@pytest.mark.parametrize(("before", "note"), [(None, ""), (10, ""), (20, "train.batch_pairs=10, where the checkpoint")])
def test_another_batch_size_is_told_with_the_pair_where_the_data_goes_on(
    before: int | None, note: str, tmp_path: Path
) -> None:
    run = resumed(tmp_path)
    run._batch_before = before
    assert run.batch_note().startswith(note)
    assert bool(run.batch_note()) is bool(note)
    assert not note or "checkpoint has 20: the data goes on at its pair 37;" in run.batch_note()
