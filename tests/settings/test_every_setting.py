"""Each setting changes the results that it should, and no other."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from limoe_dist.config import rules
from limoe_dist.config.parse import known_keys
from limoe_dist.config.schema import Data, Image, Model, Moe, Optim, Parallel, Run, Text, Train
from tests.config.settings import changed
from tests.settings.observe import Observed, differing, observe
from tests.settings.table import NO_EFFECT, ROWS, TESTS, Row
from tests.support.shards import write_shards

ROOT = Path(__file__).parents[2]
BASE = Run(
    model=Model(width=8, depth=2, heads=2, mlp_dim=10, embed_dim=6),
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
        blocks=(0, 1),
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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.setting}={row.value}".replace(" ", "-"))
def test_a_setting_changes_what_it_should_and_nothing_else(row: Row, observed: Any) -> None:
    before = observed(row.base)
    after = observed(row.base | row.beside | {row.setting: row.value})
    assert differing(before, after) == row.affects


def test_every_setting_is_in_the_table() -> None:
    fields = {name for name in known_keys(Run) if name not in Run.model_fields or name == "preset"}
    shown = {row.setting for row in ROWS if row.affects} | set(TESTS) | set(NO_EFFECT)
    assert shown == fields


@pytest.mark.parametrize("setting", TESTS)
def test_the_test_that_a_setting_names_is_there_and_sets_it(setting: str) -> None:
    file, _, name = TESTS[setting].partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert name in functions
    assert setting.partition(".")[2] in text
