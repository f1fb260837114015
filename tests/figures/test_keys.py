"""Every key that a run or an evaluation writes has a test that works its value out."""

from __future__ import annotations

import ast
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.ledger import Event
from limoe_dist.train.loop import train
from tests.config.settings import changed
from tests.figures.keys import KEYS
from tests.support.ranks import RanksPool
from tests.support.shards import write_shards
from tests.train.small import on_ranks, run_on

ROOT = Path(__file__).parents[2]
FILES = ("metrics.jsonl", "evaluations.jsonl", "positions.jsonl", "heartbeat.json", "ended.json")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, ranks2: RanksPool) -> list[Path]:
    """The directories of a run on 2 ranks, with a bad row, and of a dense run of one process."""
    folder = tmp_path_factory.mktemp("keys")
    data = write_shards(folder / "train", rows=64, pictures={3: b""})
    write_shards(folder / "validation", rows=20)
    ranks2.run(on_ranks, run_on(data, steps=4).model_dump_json(), str(folder / "ranks"), False, None)
    dense = changed(run_on(data, steps=4), {"moe.blocks": (), "parallel.ep": 1})
    train(dense, folder / "dense", mesh=Mesh.single(), device=torch.device("cpu"), resume=False)
    return [folder / "ranks", folder / "dense"]


def keys_of(value: Any, prefix: str = "") -> set[str]:
    """Paths of all values that are no objects; numbers in them are N."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("/")}
    parts = [keys_of(each, f"{prefix}{'N' if name.isdecimal() else name}/") for name, each in value.items()]
    return set().union(*parts)


def keys_in(file: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    contents = text.splitlines() if file.suffix == ".jsonl" else [text]
    return set().union(*(keys_of(json.loads(content)) for content in contents))


@pytest.mark.parametrize("name", [*FILES, "replaced/rank-00000.jsonl"])
def test_every_key_that_a_run_writes_has_a_test(name: str, written: list[Path]) -> None:
    files = [
        *(folder / name for folder in written),
        *written[0].glob("replaced/*.jsonl" if "replaced" in name else "-"),
    ]
    found = set().union(*(keys_in(file) for file in files if file.exists()))
    # An absent MoE layer leaves {} in its place, and quarantined positions come with a rollback alone.
    assert found - {"blocks"} == set(KEYS[name]) - ({"quarantined"} if name == "positions.jsonl" else set())


def test_every_field_of_an_event_has_a_test() -> None:
    assert {field.name for field in fields(Event)} == set(KEYS["guard.jsonl"])


def test_every_test_that_a_key_names_exists() -> None:
    for place in sorted({test for tests in KEYS.values() for test in tests.values()}):
        file, _, name = place.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, place
