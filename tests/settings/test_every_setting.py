"""Each setting changes the results that it should, and no other."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from limoe_dist.config import rules
from limoe_dist.config.parse import known_keys
from limoe_dist.config.schema import Data, Image, Model, Moe, Optim, Parallel, Run, Text, Train
from tests.config.settings import changed
from tests.settings.observe import Observed, differing, observe
from tests.settings.table import ELSEWHERE, NEED_RANKS, NO_EFFECT, ROWS, TESTS, Row
from tests.support.shards import write_shards

ROOT = Path(__file__).parents[2]
BASE = Run(
    model=Model(width=8, depth=3, heads=2, mlp_dim=10, embed_dim=6),
    image=Image(
        size=12,
        patch=6,
        min_crop_area=0.5,
        flip=0.5,
        rotate_degrees=10.0,
        scale=0.2,
        translate=0.1,
        brightness=0.2,
        contrast=0.2,
        saturation=0.4,
        hue_degrees=30.0,
    ),
    text=Text(length=4, vocab_size=40, pad="masked"),
    moe=Moe(
        blocks=(0, 2),
        num_experts=4,
        top_k=2,
        group_pairs=2,
        capacity_factor=0.9,
        capacity_multiple=1,
        load=1.0,
        local_image=1.0,
        mutual_information=1.0,
        min_image_experts=4.0,
        min_text_experts=4.0,
    ),
    optim=Optim(warmup_steps=3, timescale=4, cooldown_steps=5, clip_norm=5.0),
    parallel=Parallel(kernels="torch"),
    train=Train(dtype="fp64", batch_pairs=8, steps=20, seed=7),
)


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("settings")
    first = write_shards(folder / "first", rows=96, shards=6)
    second = write_shards(folder / "second", rows=40, shards=2, vocab_size=27)
    return {"first": str(first), "second": str(second), "second tokenizer": str(second.parent / "tokenizer.model")}


@pytest.fixture(scope="module")
def observed(manifests: dict[str, str]) -> Any:
    """observed(settings): the results of the base run with these settings changed; each is computed once."""

    @cache
    def found(settings: tuple[tuple[str, Any], ...]) -> Observed:
        run = BASE.model_copy(update={"data": Data(manifest=manifests["first"], window_rows=0)})
        run = changed(run, {name: placed(value) for name, value in settings})
        rules.check(run, world=1)
        return observe(run)

    def placed(value: Any) -> Any:
        """The value with names of manifests replaced by their paths."""
        if isinstance(value, tuple) and any("=" in str(each) for each in value):
            return tuple(f"{manifests[each.partition('=')[0]]}={each.partition('=')[2]}" for each in value)
        return manifests.get(value, value) if isinstance(value, str) else value

    return lambda settings: found(tuple(settings.items()))


def name_of(row: Row) -> str:
    beside = [f"with-{name}={value}" for name, value in row.base.items()]
    return "-".join([f"{row.setting}={row.value}", *beside]).replace(" ", "-")


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_setting_changes_what_it_should_and_nothing_else(row: Row, observed: Any) -> None:
    before = observed(row.base)
    after = observed(row.base | row.beside | {row.setting: row.value})
    assert differing(before, after) == row.affects


def test_settings_of_data_evaluation_checkpoints_guard_and_log_change_no_number_of_a_step(observed: Any) -> None:
    assert differing(observed({}), observed(ELSEWHERE)) == set()
    usual, other = (flat(run) for run in (BASE, changed(BASE, ELSEWHERE)))
    assert {name for name in ELSEWHERE if usual[name] == other[name]} == set()
    assert set(ELSEWHERE) | NEED_RANKS == set(TESTS) | set(NO_EFFECT)


def flat(run: Run) -> dict[str, Any]:
    content = run.model_dump()
    return {
        f"{section}.{name}": value
        for section in content
        if section != "preset"
        for name, value in content[section].items()
    } | {"preset": run.preset}


def test_every_setting_is_in_the_table() -> None:
    fields = {name for name in known_keys(Run) if name not in Run.model_fields or name == "preset"}
    shown = {row.setting for row in ROWS} | set(TESTS) | set(NO_EFFECT)
    assert shown == fields


@cache
def functions_of(file: str) -> dict[str, str]:
    """The text of each function of a file, with its decorators, which may hold the values of a test."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return {
        node.name: "\n".join(ast.get_source_segment(text, part) or "" for part in [*node.decorator_list, node])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("setting", TESTS)
def test_the_test_that_a_setting_names_is_there_and_sets_it(setting: str) -> None:
    file, _, name = TESTS[setting].partition("::")
    functions = functions_of(file)
    text = functions[name]
    # Or a function that it uses sets it.
    text += "".join(other for called, other in functions.items() if re.search(rf"\b{called}\b", functions[name]))
    option = setting.partition(".")[2].replace("_", "[_-]")
    assert re.search(rf"(?<![a-z]){option}(?![a-z])", text)
