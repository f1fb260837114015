from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.cli import main
from data_prep.inspection import audit_tables
from data_prep.inspection.audit import audit
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import save_run
from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import Manifest, Shard, save_manifest
from limoe_dist.data.mixture import Mixture, entries_of, load_manifests, orders_of
from limoe_dist.data.order import rows_checksum


def a_source(folder: Path, *shard_rows: int) -> Path:
    """A manifest whose shards are there by name and size: an audit opens none of them."""
    folder.mkdir()
    shards = []
    for number, rows in enumerate(shard_rows):
        file = folder / f"shard-{number:05d}.arrow"
        file.write_bytes(b"x")
        shards.append(Shard(file=file.name, rows=rows, bytes=1, sha256=f"{number}"))
    manifest = Manifest(rows=sum(shard_rows), shards=tuple(shards))
    save_manifest(manifest, folder / "manifest.json")
    return folder / "manifest.json"


class Written:
    """A run's directory as training leaves it, line by line."""

    def __init__(self, folder: Path) -> None:
        a, b = a_source(folder / "a", 8, 8, 4), a_source(folder / "b", 6, 4)
        tiny = preset("tiny")
        data = tiny.data.model_copy(update={"mixture": (f"{a}=2", f"{b}=1"), "window_rows": 10})
        self.run: Run = tiny.model_copy(update={"data": data})
        self.folder = folder / "run"
        self.folder.mkdir()
        save_run(self.run, self.folder / "run.json")
        self.mixture = Mixture([entry.weight for entry in entries_of(data)])
        self.orders = orders_of(data, load_manifests(data), seed=self.run.train.seed)
        self.step = 0

    def rows(self, positions: list[int]) -> list[int]:
        drawn = self.mixture.at(np.array(positions), self.orders)
        return (np.array([0, 20])[drawn.sources] + drawn.rows).tolist()

    def stretch(self, first: int, end: int, *, jumped: tuple[int, int] | None = None, **changes: object) -> None:
        """The line of one step that read positions first to end - 1, without those that are jumped over."""
        read = [place for place in range(first, end) if not jumped or not jumped[0] <= place < jumped[1]]
        rows = self.rows(read)
        for place, stand_in in changes.pop("stand_ins", {}).items():
            rows[read.index(place)] = stand_in
        line = {"step": self.step + 1, "from_step": self.step, "first": first, "end": end}
        line["rows"] = f"{rows_checksum(np.array(read), np.array(rows)):016x}"
        line |= {"quarantined": [jumped]} if jumped else {}
        self.step += 1
        with (self.folder / "positions.jsonl").open("a") as file:
            file.write(json.dumps(line | changes) + "\n")

    def replaced(self, position: int, row: int, stand_in: int) -> None:
        line = {"position": position, "row": row, "key": f"row-{row}", "reason": "no picture", "stand_in": stand_in}
        (self.folder / "replaced").mkdir(exist_ok=True)
        with (self.folder / "replaced" / "rank-00003.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def test_a_run_that_read_on_in_other_batches_has_read_each_row_once(written: Written) -> None:
    for first, end in ((0, 12), (12, 36), (36, 44), (44, 62)):
        written.stretch(first, end)
    found = audit(written.folder)
    assert (found.faults, found.notes, found.checked, found.position) == ([], [], 4, 62)
    # 62 positions: 41 of the first source, 21 of the second.
    assert [(one.epoch, one.rows, one.once, one.ahead) for one in found.epochs] == [
        (0, 20, 20, 0),
        (1, 20, 20, 0),
        (2, 20, 1, 19),
        (0, 10, 10, 0),
        (1, 10, 10, 0),
        (2, 10, 1, 9),
    ]


def test_a_range_that_was_jumped_over_is_explained(written: Written) -> None:
    written.stretch(0, 12)
    written.stretch(12, 40, jumped=(12, 30))
    written.stretch(40, 60)
    found = audit(written.folder)
    assert found.faults == []
    assert found.notes == ["positions 12 to 29 were jumped over (quarantined after a rollback), in steps 2 to 2"]
    assert [(one.once, one.jumped, one.ahead, one.missing) for one in found.epochs] == [
        (8, 12, 0, 0),
        (20, 0, 0, 0),
        (4, 6, 0, 0),
        (10, 0, 0, 0),
    ]


def test_a_bad_row_is_explained_by_its_stand_in(written: Written) -> None:
    row = written.rows([5])[0]
    written.replaced(5, row, stand_in=3)
    written.stretch(0, 30, stand_ins={5: 3})
    found = audit(written.folder)
    assert (found.faults, found.checked) == ([], 1)
    assert found.notes == [f'position 5: row {row} "row-{row}" is bad (no picture): row 3 stood in']
    assert [(one.once, one.replaced) for one in found.epochs] == [(20, 1), (10, 0)]


def test_a_stand_in_that_nobody_wrote_down_is_not_explained(written: Written) -> None:
    written.stretch(0, 30, stand_ins={5: 3})
    (fault,) = audit(written.folder).faults
    assert fault.startswith("steps 1 to 1: the rows that the ranks used")


def test_positions_in_no_stretch_are_rows_that_were_not_read(written: Written) -> None:
    written.stretch(0, 12)
    written.stretch(21, 30)
    faults = audit(written.folder).faults
    assert faults[0] == "positions 12 to 20 are in no stretch of the ledger"
    assert [fault.partition(": ")[2] for fault in faults[1:]] == [
        "6 of 20 rows were passed and not read",
        "3 of 10 rows were passed and not read",
    ]


def test_positions_that_were_read_twice_are_found(written: Written) -> None:
    written.stretch(0, 12)
    written.stretch(6, 30)
    faults = audit(written.folder).faults
    assert faults[0] == "positions 6 to 11 were read by steps up to 1 and again after it"
    assert "4 of 20 rows were read more than once" in faults[1]


def test_a_stretch_without_a_checksum_is_counted_as_such(written: Written) -> None:
    written.stretch(0, 12)
    written.stretch(12, 30, rows="")
    found = audit(written.folder)
    assert (found.faults, found.checked, found.unchecked) == ([], 1, 1)


def test_a_checkpoint_that_tells_another_position_is_a_fault(written: Written) -> None:
    written.stretch(0, 12)
    state = written.folder / "checkpoints" / "step-00000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"step": 1, "position": 24, "data": "other"}))
    first, second = audit(written.folder).faults
    assert "trained on other shards" in first
    assert "position 24 at step 1, but the ledger has 12" in second


def test_the_command_lists_what_each_position_read(written: Written, tmp_path: Path, capsys) -> None:
    written.replaced(5, written.rows([5])[0], stand_in=3)
    written.stretch(0, 30, stand_ins={5: 3})
    listing, result = tmp_path / "rows.parquet", tmp_path / "audit.json"
    assert main(["audit", str(written.folder), "--list", str(listing), "--json", str(result)]) == 0
    assert "1 of 1 stretches prove it" in capsys.readouterr().out
    rows = pq.read_table(listing).to_pylist()
    assert [row["position"] for row in rows] == list(range(30))
    first_rows = {"a/manifest.json": 0, "b/manifest.json": 20}
    starts = {"a/manifest.json": [0, 8, 16], "b/manifest.json": [0, 6]}
    for row, number in zip(rows, written.rows(list(range(30))), strict=True):
        source = "/".join(row["source"].split("/")[-2:])
        assert first_rows[source] + row["row"] == number
        assert starts[source][int(row["shard"][6:11])] + row["row_in_shard"] == row["row"]
    assert [(row["position"], row["stand_in"]) for row in rows if row["stand_in"] is not None] == [(5, 3)]
    assert json.loads(result.read_text())["proved"] is True
    written.stretch(30, 36, rows="0" * 16)
    assert main(["audit", str(written.folder), "--list", str(tmp_path / "rows.csv")]) == 1
    assert (tmp_path / "rows.csv").read_text().count("\n") == 37


def test_what_is_no_run_with_a_ledger_is_told(tmp_path: Path, written: Written) -> None:
    with pytest.raises(UserError, match=r"there is no run\.json"):
        audit(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"positions\.jsonl: is not there"):
        audit(written.folder)
    (written.folder / "positions.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="line 1: is no line of a ledger"):
        audit(written.folder)
    with pytest.raises(UserError, match=r"--list rows\.txt: must end in \.parquet or \.csv"):
        main(["audit", str(written.folder), "--list", "rows.txt"])


def test_a_line_that_a_kill_cut_off_is_no_part_of_the_ledger(written: Written) -> None:
    written.stretch(0, 12)
    with (written.folder / "positions.jsonl").open("a") as file:
        file.write('{"step": 2, "from_st')
    found = audit(written.folder)
    assert (found.faults, found.position) == ([], 12)


def test_many_epochs_of_a_small_source_in_one_chunk_are_counted_each(written: Written) -> None:
    written.stretch(0, 3000)
    epochs = audit(written.folder).epochs
    assert len(epochs) == 200
    assert all((one.once, one.more, one.missing, one.ahead) == (one.rows, 0, 0, 0) for one in epochs)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_listing_that_was_not_finished_is_not_there(written: Written, tmp_path: Path, monkeypatch, suffix) -> None:
    written.stretch(0, 12)

    def fails(listing: object, positions: object, drawn: object, used: object) -> None:
        raise UserError("on the way")

    monkeypatch.setattr(audit_tables._Listing, "write", fails)
    with pytest.raises(UserError, match="on the way"):
        main(["audit", str(written.folder), "--list", str(tmp_path / "out" / f"rows.{suffix}")])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_listing_that_cannot_be_written_is_one_line(written: Written, tmp_path: Path) -> None:
    written.stretch(0, 12)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/rows\.csv: cannot be written: (File exists|Not a directory)"):
        main(["audit", str(written.folder), "--list", str(tmp_path / "file" / "rows.csv")])
    with pytest.raises(UserError, match=r"file/found\.json: cannot be written: Not a directory"):
        main(["audit", str(written.folder), "--json", str(tmp_path / "file" / "found.json")])
