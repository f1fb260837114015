from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import (
    MAY_CHANGE,
    changed_settings,
    decisive,
    known_keys,
    load_run,
    save_run,
    write_atomically,
)
from limoe_dist.config.presets import names, preset
from limoe_dist.config.schema import Run
from tests.config.settings import changed


def refusal(tmp_path, content):
    """What load_run says about a run.json of this content."""
    path = tmp_path / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_run(path)
    return str(caught.value).replace(f"{path}: ", "").splitlines()


@pytest.mark.parametrize("name", names())
def test_a_run_comes_back_from_run_json_as_it_was(tmp_path, name):
    path = tmp_path / "run.json"
    save_run(preset(name), path)
    assert load_run(path) == preset(name)


def test_every_changed_setting_comes_back(tmp_path):
    run = changed(preset("tiny"), {"optim.lr": 0.1 + 0.2, "data.manifest": "Größe/m.json", "eval.templates": ("a {}",)})
    save_run(run, tmp_path / "run.json")
    assert load_run(tmp_path / "run.json") == run
    assert run != preset("tiny")


def test_run_json_may_leave_out_what_is_default(tmp_path):
    (tmp_path / "run.json").write_text('{"model": {"width": 64}}')
    assert load_run(tmp_path / "run.json") == changed(Run(), {"model.width": 64})


def test_an_unknown_key_offers_the_nearest_dotted_name(tmp_path):
    assert refusal(tmp_path, {"moe": {"num_expert": 4}}) == [
        'unknown key moe.num_expert; did you mean "moe.num_experts"?'
    ]
    assert refusal(tmp_path, {"modle": {}}) == ['unknown key modle; did you mean "model"?']


def test_a_wrong_value_is_shown_with_its_name(tmp_path):
    (line,) = refusal(tmp_path, {"train": {"steps": 0}})
    assert line.startswith("train.steps=0: ")
    assert "greater than or equal to 1" in line


def test_several_problems_are_all_reported(tmp_path):
    lines = refusal(tmp_path, {"train": {"steps": 0}, "text": {"pad": "none"}, "optim": {"learning_rate": 1}})
    named = ['text.pad="none": ', "unknown key optim.learning_rate", "train.steps=0: "]
    assert [line[: len(start)] for line, start in zip(lines, named, strict=True)] == named


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        load_run(tmp_path / "none.json")
    (line,) = refusal(tmp_path, "{steps: 3")
    assert "Invalid JSON" in line


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_json_cannot_hold_is_refused(value):
    # JSON would hold null in its place, and the run could not be read again.
    with pytest.raises(ValidationError, match="finite number"):
        changed(Run(), {"optim.clip_norm": value})


def test_known_keys_are_sections_and_dotted_settings():
    keys = known_keys(Run)
    assert {"preset", "moe", "moe.blocks", "log.tensorboard"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        preset("tiny").train.steps = 5


def test_an_atomic_write_replaces_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "mine"},
        {"parallel.ep": 2},
        {"log.every_steps": 3},
        {"checkpoint.keep": 7},
        {"eval.every_steps": 50},
        {"data.threads": 4},
        {"data.prefetch": 9},
        {"train.stop_grace_s": 5.0},
        {"data.manifest": "moved/manifest.json"},
        {"data.validation": "moved/manifest.json"},
        {"data.tokenizer": "moved/tokenizer.model"},
        {"data.cache_gb": 7.0},
        {"train.batch_pairs": 256},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_resumed_run_may_change_paths_layout_batch_logging_and_saving(change):
    run = preset("tiny")
    assert changed(run, change) != run
    assert changed_settings(decisive(run), changed(run, change), Path("run.json")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"optim.lr": 1e-4},
        {"train.seed": 1},
        {"data.window_rows": 1000},
        {"data.block_shards": 2},
        {"moe.blocks": (1,)},
        {"moe.group_pairs": 16},
        {"image.flip": 0.5},
        {"text.pad": "token"},
        {"model.width": 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_resumed_run_keeps_what_decides_the_results(change):
    (line,) = changed_settings(decisive(preset("tiny")), changed(preset("tiny"), change), Path("run.json"))
    assert line.startswith(next(iter(change)))


def test_decisive_settings_are_named_with_their_section():
    settings = decisive(preset("tiny"))
    assert (settings["moe.num_experts"], settings["train.batch_pairs"]) == (8, 128)
    assert not {"data.manifest", "parallel.ep", "train.stop_grace_s"} & set(settings)


def test_a_setting_that_an_older_version_did_not_know_must_have_its_default():
    before = decisive(Run())
    del before["moe.top_k"]
    assert changed_settings(before, Run(), Path("state.json")) == []
    (line,) = changed_settings(before, changed(Run(), {"moe.top_k": 2}), Path("state.json"))
    assert line == "moe.top_k=2, but state.json has 1: a resumed run keeps what decides its results"


def test_only_these_settings_may_change_when_a_run_resumes():
    free = {"train.batch_pairs", "train.stop_grace_s", "train.microbatch_pairs", "train.recompute"}
    free |= {"train.contrastive_chunk", "optim.engine", "optim.zero_stage", "optim.offload"}
    sections = ("model", "image", "text", "moe", "optim", "train")
    kept = {name for name in known_keys(Run) if name.startswith(tuple(f"{each}." for each in sections))} - free
    kept |= {"data.window_rows", "data.block_shards"}
    assert set(decisive(Run())) - set(MAY_CHANGE) == kept
