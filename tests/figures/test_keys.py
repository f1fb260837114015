"""Every key that a run and `limoe eval` write has a test that works its value out."""

from __future__ import annotations

import ast
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from launch.evaluate import main as evaluate
from limoe_dist.config.schema import Log
from limoe_dist.parallel.fault import Fault
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.faults import fault_file
from limoe_dist.train.ledger import Event
from limoe_dist.train.loop import train
from tests.figures.keys import KEYS
from tests.support.shards import write_shards
from tests.train.small import CPU, run_on

ROOT = Path(__file__).parents[2]
TASKS = ("zeroshot", "retrieval", "contrastive", "fewshot")
# Positions that a roll back quarantines; tests/ranks/test_guard.py has runs that roll back.
ABSENT = {"positions.jsonl": {"quarantined"}}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with a bad row, a fault, and an evaluation by every task after its last step."""
    folder = tmp_path_factory.mktemp("keys")
    data = write_shards(folder / "train", rows=64, pictures={3: b""})
    write_shards(folder / "validation", rows=20)
    run = run_on(data, steps=4).model_copy(update={"log": Log(every_steps=1, tensorboard=False)})
    out = folder / "run"
    train(run, out, mesh=Mesh.single(), device=CPU, resume=False)
    fault_file(out, {})(Fault("hang", (1,), ("n1",), "no progress"))
    for task in TASKS:
        options = ["--shots", "2", "--seeds", "2"] if task == "fewshot" else []
        assert evaluate([task, "--run", str(out), *options]) == 0
    return out


def keys_of(value: Any, prefix: str = "") -> set[str]:
    """Paths of all values that are no objects; MoE blocks are N."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("/")}
    parts = [keys_of(each, f"{prefix}{'N' if name.isdecimal() else name}/") for name, each in value.items()]
    return set().union(*parts)


def keys_in(file: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    contents = text.splitlines() if file.suffix == ".jsonl" else [text]
    return set().union(*(keys_of(json.loads(content)) for content in contents))


@pytest.mark.parametrize("name", [name for name in KEYS if name != "guard.jsonl"])
def test_every_key_of_a_file_has_a_test(name: str, written: Path) -> None:
    assert keys_in(written / name) == KEYS[name].keys() - ABSENT.get(name, set())


def test_every_file_of_numbers_is_in_the_table(written: Path) -> None:
    found = {str(file.relative_to(written)) for file in written.rglob("*.json*") if "checkpoints" not in file.parts}
    # The settings of the run are no figures.
    assert found - {"run.json"} == KEYS.keys() - {"guard.jsonl"}


def test_every_field_of_an_event_has_a_test() -> None:
    assert {field.name for field in fields(Event)} == KEYS["guard.jsonl"].keys()


def test_every_test_that_a_key_names_exists() -> None:
    for place in sorted({test for tests in KEYS.values() for test in tests.values()}):
        file, _, name = place.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place


@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_an_evaluation_s_file_says_what_was_evaluated(task: str, written: Path) -> None:
    content = json.loads((written / f"eval-{task}-4.json").read_text(encoding="utf-8"))
    head = {name: content[name] for name in ("task", "run", "preset", "step", "data", "ranks")}
    shards = written.parent
    assert head == {
        "task": task,
        "run": str(written),
        "preset": "",
        "step": 4,
        "data": str(shards / "validation" / "manifest.json"),
        "ranks": 1,
    }
    of = content["pixel_nearest_neighbour"] if task == "zeroshot" else content[task]
    if task in ("zeroshot", "fewshot"):
        assert of["training_data"] == str(shards / "train" / "manifest.json")
