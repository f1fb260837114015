"""state.json is read as it was written, or the checkpoint counts as damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limoe_dist.checkpoint import manifest
from limoe_dist.checkpoint.manifest import Damaged
from limoe_dist.checkpoint.state import State, read_state, versions
from tests.support.checkpoints import a_state

STATE = a_state(
    9,
    quarantined=((3, 5), (5, 6), (40, 48)),
    settings={"train.seed": 7, "moe.blocks": [1, 3], "optim.lr": 3e-3},
    written=1.5,
    versions=versions(),
)
FIELDS = json.loads(STATE.model_dump_json())


def read(folder: Path, text: str) -> State:
    (folder / "state.json").write_text(text)
    return read_state(folder)


def test_a_state_comes_back(tmp_path: Path) -> None:
    assert read(tmp_path, STATE.model_dump_json(indent=1)) == STATE
    assert set(STATE.versions) == {"limoe-dist", "torch", "safetensors"}


@pytest.mark.parametrize(
    "ranges", [[[5, 5]], [[6, 5]], [[5, 6], [3, 4]], [[3, 6], [5, 8]], [[-1, 2]], [[1, 2, 3]], [[1.5, 2]], ["ab"]]
)
def test_ranges_that_do_not_rise_are_refused(tmp_path: Path, ranges: object) -> None:
    with pytest.raises(Damaged, match=r"state.json: quarantined"):
        read(tmp_path, json.dumps(FIELDS | {"quarantined": ranges}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps(FIELDS)[:-1],
        json.dumps(FIELDS | {"position": -1}),
        json.dumps(FIELDS | {"step": "many" * 10_000}),
        json.dumps(FIELDS | {"layout": FIELDS["layout"] | {"tp": 0}}),
        json.dumps(FIELDS | {"code": "print()"}),
        json.dumps(FIELDS).replace('"position"', '"positon"'),
    ],
    ids=lambda text: text[-20:],
)
def test_what_is_no_state_is_refused_with_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(Damaged) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "state.json"))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_gigantic_state_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "state.json").open("wb") as file:
        file.truncate(manifest.MOST_BYTES + 1)
    with pytest.raises(Damaged, match="no checkpoint has so many there"):
        read_state(tmp_path)
