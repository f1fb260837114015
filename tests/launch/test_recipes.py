"""The recipes: files that repeat the table, settings that are the paper's, and names that commands know."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import recipes
from launch.named import run_named
from launch.recipes.__main__ import main
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run
from limoe_dist.config.presets import TWINS, names, preset
from limoe_dist.config.rules import check


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_file_is_what_the_table_says(name: str) -> None:
    assert load_run(recipes.path(name)) == recipes.RECIPES[name].run(), (
        "write it anew: python -m launch.recipes --write"
    )


def test_every_file_is_in_the_table() -> None:
    assert {path.stem for path in recipes.FOLDER.glob("*.json")} == set(recipes.RECIPES)


def test_writing_makes_the_files_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    assert main(["--write"]) == 0
    for name in recipes.RECIPES:
        there = Path(recipes.__file__).with_name(f"{name}.json")
        assert (tmp_path / there.name).read_bytes() == there.read_bytes()


# Pairs seen: 12.8 B as CLIP (section 3.1), 23.3 B of H/14 (section 3.2), 100,000 steps of the ablations.
PAPER = {
    "b16-ablation": ("b16", 8192, 100_000, 8192 * 100_000),
    "laion-400m": ("b16", 8192, 100_000, 8192 * 100_000),
    "h14-cotrain": ("h14", 21_504, 1_083_500, 23.3e9),
    **{f"pareto-{size}": (size, 16_384, 781_250, 12.8e9) for size in ("s32", "s16", "b32", "b16", "l16")},
}


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_has_the_papers_batch_and_steps(name: str) -> None:
    run = run_named(name)
    size, batch, steps, pairs = PAPER[name]
    assert (run.preset, run.train.batch_pairs, run.train.steps) == (size, batch, steps)
    assert batch * steps == pytest.approx(pairs, rel=1e-4)
    assert (run.model, run.image, run.text) == (preset(size).model, preset(size).image, preset(size).text)
    assert (run.optim.name, run.moe.num_experts) == ("adafactor", 32)
    for world in (8, 64):
        check(run.model_copy(update={"parallel": run.parallel.model_copy(update={"ep": 8})}), world=world)


def test_every_recipe_is_tested() -> None:
    assert set(PAPER) == set(recipes.RECIPES)


def test_the_ablation_has_the_papers_thresholds_and_a_cooldown_of_a_tenth() -> None:
    run = run_named("b16-ablation")
    assert (run.moe.min_text_experts, run.moe.min_image_experts, run.optim.cooldown_steps) == (9, 20, 10_000)


def test_a_quarter_of_h14s_samples_are_classes() -> None:
    from limoe_dist.data.mixture import entries_of

    web, classes = entries_of(run_named("h14-cotrain").data)
    assert (web.weight, classes.weight) == (3, 1)
    assert "classes" in classes.path


def test_a_preset_a_recipe_and_a_file_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(recipes.RECIPES) & set(names())
    monkeypatch.chdir(tmp_path)
    # A name wins; a file needs no .json.
    Path("tiny").write_text("{}")
    Path("mine").write_text('{"moe": {"top_k": 2}}')
    assert run_named("tiny") == preset("tiny")
    assert run_named("mine").moe.top_k == 2
    assert run_named(str(recipes.path("pareto-l16"))) == run_named("pareto-l16")


@pytest.mark.parametrize("suffix", TWINS)
def test_a_recipe_has_the_twins_of_a_preset_with_its_own_batch_and_steps(suffix: str) -> None:
    run, twin = run_named("b16-ablation"), run_named(f"b16-ablation{suffix}")
    assert (twin.train, twin.optim) == (run.train, run.optim)
    assert (twin.model, twin.moe) == (preset(f"b16{suffix}").model, preset(f"b16{suffix}").moe)
    assert twin.preset == f"b16{suffix}"


def test_what_is_none_of_them_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'unknown preset "b16-ablaton"; did you mean "b16-ablation"\? \(presets: tiny'):
        run_named("b16-ablaton")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=rf"is a directory, .*: give {tmp_path}/run.json"):
        run_named(str(tmp_path))


def test_writing_has_to_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--write" in capsys.readouterr().err


def _plans() -> list[list[str]]:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    lines = [line.partition("#")[0].split() for line in text.splitlines() if line.startswith("limoe plan ")]
    assert lines
    return [words[2:] for words in lines]


@pytest.mark.parametrize("words", _plans(), ids=" ".join)
def test_every_plan_of_the_documentation_is_accepted(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from launch.plan import main as plan

    assert plan([*words, "--json"]) == 0
    assert '"layout": {' in capsys.readouterr().out


def test_the_documentation_has_every_recipe_with_its_batch_steps_and_flops() -> None:
    from launch.counting import cost_of_model

    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, recipe in recipes.RECIPES.items():
        run = recipe.run()
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        assert f"| {run.train.batch_pairs:,} x {run.train.steps:,} |" in row
        flops = 3 * cost_of_model(run).flops.pair * run.train.batch_pairs * run.train.steps
        assert row.endswith(f"| {flops / 1e18:,.0f} EFLOP |")
