"""`limoe reproduce`: figures as data, runs that are shared, cached and resumed, and what is made of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.reproduce import main
from launch.reproduction import figure as figures
from launch.reproduction.figure import Variant, figure_named, names, run_of
from launch.reproduction.measures import curve, value
from launch.reproduction.page import Row, markdown
from launch.reproduction.plots import draw
from launch.reproduction.runs import Data, planned, train_all
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from tests.support.shards import write_shards

SMALL = {
    "image.size": 16,
    "image.patch": 4,
    "text.length": 5,
    "text.vocab_size": 50,
    "model.width": 32,
    "model.depth": 2,
    "model.mlp_dim": 64,
    "moe.blocks": [1],
    "moe.group_pairs": 2,
    "optim.warmup_steps": 1,
    "optim.cooldown_steps": 1,
    "train.steps": 3,
    "train.batch_pairs": 8,
    "eval.batch_pairs": 8,
    "eval.minibatch": 8,
    "log.every_steps": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, rows in (("train", 24), ("validation", 16)):
        write_shards(folder / split, rows=rows, shards=1, size=16)
    return folder


@pytest.fixture
def own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of figures in place of the paper's: "trial" sweeps two rates, "more" shares a run with it."""
    folder = tmp_path / "figures"
    folder.mkdir()
    base = json.loads((figures.FIGURES / "base.json").read_text())
    base["settings"] |= SMALL | {"moe.num_experts": 4, "moe.min_image_experts": 3.0, "moe.min_text_experts": 2.0}
    bars = {"kind": "bars", "measure": "accuracy", "title": "accuracy"}
    common = {"source": "none", "paper_says": "nothing", "measures": ["success_text", "accuracy", "loss"]}
    trial = {
        "title": "a trial",
        "seeds": [0],
        "variants": [{"name": "sparse", "paper": {"accuracy": 50.0}}],
        "sweep": {"setting": "optim.lr", "values": [0.001, 0.002], "by": "loss"},
        "plots": [bars, {"kind": "curve", "measure": "success_text", "title": "text success"}],
    }
    more = {
        "title": "more",
        "seeds": [0],
        "settings": {"optim.lr": 0.001},
        "variants": [{"name": "the same run", "x": 4.0}],
        "plots": [{"kind": "line", "measure": "loss", "title": "loss", "x": "experts"}],
    }
    for name, content in (("base", base), ("trial", common | trial), ("more", common | more)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(figures, "FIGURES", folder)
    return folder


def called(*words: str | Path) -> int:
    return main([str(word) for word in words])


def test_figures_of_the_paper_are_all_there_and_can_be_trained() -> None:
    assert set(names()) == {"fig3", "fig5", "fig6", "table2", "table3", "k", "experts"}
    for name in names():
        figure = figure_named(name)
        assert figure.seeds == ((0, 1, 2) if name in ("fig3", "fig6", "table2") else (0,))
        for variant in figure.variants:
            run = run_of(figure, variant, seed=1, changes={})
            assert run.train.seed == 1


def test_what_figures_have_in_common_is_the_same_run(tmp_path: Path) -> None:
    data = Data(tmp_path / "t.json", tmp_path / "v.json", "0")

    def place(figure: str, variant: str, **more: Any) -> Path:
        found = figure_named(figure)
        (row,) = (each for each in found.variants if each.name == variant)
        return planned("", run_of(found, row, seed=0, changes={}, **more), data, tmp_path).folder

    shared = place("fig6", "priority")
    assert place("table3", "LIMoE") == place("k", "K = 1") == place("experts", "E = 16") == shared
    assert place("table2", "LIMoE", swept=0.001) == place("fig5", "entropy losses, 36 image tokens") == shared
    assert place("fig3", "classic") == place("fig5", "classic, 36 image tokens") != shared
    # Other data, or another way to evaluate, is another run.
    other = Data(data.train, data.validation, "1")
    figure = figure_named("fig6")
    run = run_of(figure, figure.variants[0], seed=0, changes={})
    assert planned("", run, other, tmp_path).folder != shared
    changed = run_of(figure, figure.variants[0], seed=0, changes={"eval.minibatch": 8})
    assert planned("", changed, data, tmp_path).folder != shared


def test_dense_twins_are_swept_like_limoe_and_trained_alike() -> None:
    figure = figure_named("table2")
    assert figure.sweep is not None
    assert figure.sweep.setting == "optim.lr"
    assert len(figure.sweep.values) >= 3
    dense, two, sparse = (run_of(figure, variant, seed=0, changes={}) for variant in figure.variants)
    assert dense.moe.blocks == two.moe.blocks == () != sparse.moe.blocks
    assert (dense.model.towers, two.model.towers, sparse.model.towers) == ("one", "two", "one")
    assert dense.train == two.train == sparse.train
    assert dense.image == two.image == sparse.image
    assert dense.optim == two.optim == sparse.optim


def test_runs_are_trained_once_swept_shared_and_shown(
    own_figures: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert called("trial", "more", "--out", out, "--data", data, "--dry-run") == 0
    assert "2 runs, 0 done" in capsys.readouterr().out
    assert called("trial", "more", "--out", out, "--data", data, "--jobs", "2") == 0
    told = capsys.readouterr().out
    assert "[2/2] done" in told
    assert "trial: a trial" in told
    found = json.loads((out / "trial.json").read_text())["rows"][0]
    rates = found["sweep"]
    assert found["chosen"] == float(min(rates, key=lambda rate: rates[rate][0]))
    # The numbers are those that the run logged and found at its end.
    folder = out / "runs" / found["runs"][0]
    evaluated = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert found["measured"]["accuracy"]["mean"] == evaluated["contrastive"]["accuracy"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["measured"]["loss"]["mean"] == pytest.approx(last["contrastive"])
    assert found["measured"]["success_text"]["mean"] == pytest.approx(last["blocks"]["1"]["success_text"])
    assert found["paper"] == {"accuracy": 50.0}
    page = (out / "trial.md").read_text()
    assert "(paper 50)" in page
    assert "ONE seed" in page
    assert f"taken: {found['chosen']:g}" in page
    assert "<svg" in (out / "trial.svg").read_text()
    shared = json.loads((out / "more.json").read_text())["rows"][0]["runs"][0]
    assert len(list((out / "runs").glob("*/run.json"))) == 2
    assert (out / "runs" / shared).is_dir()
    # A second call trains nothing and finds the same.
    before = (out / "trial.json").read_bytes()
    assert called("trial", "--out", out, "--data", data) == 0
    assert "begun" not in capsys.readouterr().out
    assert (out / "trial.json").read_bytes() == before


def test_a_stopped_reproduction_goes_on_from_its_checkpoints(own_figures: Path, data: Path, tmp_path: Path) -> None:
    command = ["more", "--out", str(tmp_path / "out"), "--data", str(data), "--set", "train.steps=4000"]
    command += ["--set", "log.every_steps=1", "--set", "checkpoint.every_steps=0"]
    code = (
        f"from launch.reproduction import figure; from pathlib import Path; figure.FIGURES = Path({str(own_figures)!r})"
    )
    code += f"; import sys; from launch.cli import main; sys.exit(main(['reproduce', *{command!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    metrics = None
    while metrics is None and process.poll() is None:
        metrics = next((tmp_path / "out" / "runs").glob("*/metrics.jsonl"), None)
        if metrics is not None and len(metrics.read_text().splitlines()) < 3:
            metrics = None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert metrics is not None
    (checkpoint,) = metrics.parent.glob("checkpoints/step-*/manifest.json")
    step = int(checkpoint.parent.name.removeprefix("step-"))
    (cost,) = (metrics.parent / "cost.jsonl").read_text().splitlines()
    assert json.loads(cost)["cpu_s"] > 0
    # It goes on where it was, rather than from the beginning.
    figure = figure_named("more")
    run = run_of(figure, figure.variants[0], seed=0, changes={"train.steps": 4000})
    assert 3 <= step < 4000
    assert run.train.steps == 4000
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(f"goes on at step {step}" in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130


def test_a_run_that_fails_is_told_with_its_log(data: Path, tmp_path: Path) -> None:
    missing = Data(data / "gone.json", data / "validation" / "manifest.json", "0")
    run = planned("a run", Run(), missing, tmp_path)
    with pytest.raises(UserError, match=r"a run: `limoe train` ended with status 2: .*gone.json.*\.log\)"):
        train_all([run], jobs=1, tell=lambda event: None, watch=lambda: None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fig33"], 'unknown figure "fig33"; did you mean "fig3"'),
        (["fig3", "--set", "moe.lod=1"], "unknown key moe.lod"),
        (["fig3", "--set", "moe=1"], 'unknown setting "moe"'),
        (["fig3", "--set", "moe.top_k"], "NAME=VALUE"),
        (["fig3", "--set", "moe.top_k=99"], 'variant "classic": moe.top_k=99 must not exceed'),
        (["fig3", "--jobs", "0"], "--jobs=0"),
        (["fig3", "--seeds", "1", "1"], "each seed once"),
    ],
)
def test_what_cannot_be_reproduced_is_one_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        called(*words, "--out", tmp_path)
    assert sentence in str(error.value)
    assert not os.listdir(tmp_path)


def write_run(folder: Path, success: list[float], *, experts: int = 4) -> None:
    """Five log lines of a model with one MoE block; texts go to two experts in equal parts."""
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step + 1,
            "contrastive": 5.0 - step,
            "blocks": {"1": {"success_text": share, "kept": [[3, 1], [3, 1], [3, 0], [3, 0]][:experts]}},
        }
        for step, share in enumerate(success)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluations.jsonl").write_text(json.dumps({"step": len(success), "contrastive": {"accuracy": 0.25}}))


def test_the_last_fifth_of_the_steps_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    # Steps 9 and 10 of 10.
    assert value(tmp_path / "a", "success_text", steps=10) == pytest.approx(0.95)
    assert value(tmp_path / "a", "loss", steps=10) == pytest.approx(5.0 - 8.5)
    assert value(tmp_path / "a", "accuracy", steps=10) == 0.25
    assert value(tmp_path / "a", "text_experts", steps=10) == pytest.approx(2.0)
    assert value(tmp_path / "a", "zeroshot_top1", steps=10) is None
    assert curve(tmp_path / "a", "accuracy") is None


def test_a_table_shows_the_range_over_seeds(tmp_path: Path) -> None:
    figure = figure_named("fig6")
    data = Data(tmp_path / "t.json", tmp_path / "v.json", "0")
    runs = []
    for seed, share in enumerate((0.5, 0.7, 0.9)):
        run = run_of(figure, figure.variants[0], seed=seed, changes={"train.steps": 1000})
        found = planned("", run, data, tmp_path)
        write_run(found.folder, [share] * 1000)
        runs.append(found)
    row = Row(Variant(name="a | b"), tuple(runs))
    assert "70.0 [50.0, 90.0]" in markdown("fig6", figure, [row])
    drawn = draw(figure, [row])
    assert drawn.startswith("<?xml")
    assert "text success rate" in drawn
