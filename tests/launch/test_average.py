"""`limoe average`: which checkpoints it takes, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.average import main
from limoe_dist.checkpoint.catalog import checkpoint_folder
from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.checkpoint.reader import load_weights, open_checkpoint
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import decisive, load_run, save_run
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import sha256_of
from limoe_dist.parallel.mesh import Mesh
from tests.eval.models import CPU, RUN, small_model
from tests.support.checkpoints import a_state, save
from tests.support.shards import write_shards

ALONE = Mesh.single()


def trained(folder: Path, *steps: int, run: Run = RUN) -> Path:
    """A run with checkpoints of the small model; at step n every weight is n times that of the model."""
    data = folder.parent / "data"
    if not data.exists():
        write_shards(data, rows=8)
    folder.mkdir()
    manifest = str(data / "manifest.json")
    run = run.model_copy(update={"data": run.data.model_copy(update={"manifest": manifest, "validation": manifest})})
    save_run(run, folder / "run.json")
    for step in steps:
        model = small_model(run)
        for parameter in model.parameters():
            parameter.data.mul_(step)
        state = a_state(step, tokenizer=sha256_of(data / "tokenizer.model"), settings=decisive(run))
        save(folder, state, model_shards(model, ALONE), ALONE, keep=9)
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 12)) + '{"step": 1')
    return folder


def factor(out: Path) -> float:
    """What the weights in `out` are, in those of the small model."""
    model, whole = small_model(), small_model()
    load_weights(open_checkpoint(out, ALONE, CPU), model, ALONE)
    return (model.text_projection.sum() / whole.text_projection.sum()).item()


def record(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "averaged.json").read_text())
    return content


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], [2, 3, 5, 6, 7]),
        (["--last", "2"], [6, 7]),
        (["--steps", "6", "1", "2"], [1, 2, 6]),
    ],
    ids=["default", "last", "steps"],
)
def test_the_chosen_checkpoints_are_averaged(tmp_path: Path, options: list[str], steps: list[int]) -> None:
    run, out = trained(tmp_path / "run", 1, 2, 3, 5, 6, 7), tmp_path / "mean"
    assert main([str(run), *options, "--out", str(out)]) == 0
    assert [source["step"] for source in record(out)["sources"]] == steps
    assert factor(out) == pytest.approx(sum(steps) / len(steps), rel=1e-6)


def test_a_run_with_few_checkpoints_gives_all(tmp_path: Path) -> None:
    out = tmp_path / "mean"
    assert main([str(trained(tmp_path / "run", 2, 4)), "--out", str(out)]) == 0
    assert factor(out) == pytest.approx(3, rel=1e-6)


def test_checkpoints_of_several_runs_are_averaged(tmp_path: Path) -> None:
    runs = [trained(tmp_path / name, step) for name, step in (("a", 3), ("b", 9))]
    folders = [str(checkpoint_folder(run, step)) for run, step in zip(runs, (3, 9), strict=True)]
    out = tmp_path / "mean"
    assert main([*folders, "--out", str(out)]) == 0
    assert factor(out) == pytest.approx(6, rel=1e-6)


def test_the_result_is_a_run_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = trained(tmp_path / "run", 3, 5), tmp_path / "new" / "mean"
    assert main([str(run), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "mean of 2 checkpoints" in shown
    assert f"next: limoe eval zeroshot --run {out}" in shown
    assert sorted(path.name for path in out.iterdir()) == [
        "averaged.json",
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "tokenizer.model",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["mean"]
    before, after = load_run(run / "run.json"), load_run(out / "run.json")
    assert after.data.tokenizer == str(out / "tokenizer.model")
    assert decisive(after) == decisive(before)
    # Steps 6 and later were never averaged, and the last line was cut off.
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 5
    assert record(out)["checkpoint"] == str(checkpoint_folder(out, 5))


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "retrieval", "--run"],
        ["eval", "zeroshot", "--neighbours", "none", "--run"],
        ["checkpoint", "ls"],
        ["checkpoint", "verify"],
        ["checkpoint", "show"],
    ],
    ids=" ".join,
)
def test_other_commands_take_the_result(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run, out = trained(tmp_path / "run", 1, 2), tmp_path / "mean"
    assert main([str(run), "--out", str(out)]) == 0
    assert cli.main([*command, str(out)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["{run}"], "--out is missing"),
        (["--out", "{tmp}/mean"], "give the directory of a run, or of two checkpoints"),
        (["{run}", "--out", "{run}"], "exists and is not empty: choose another"),
        (["{run}", "--out", "{tmp}/mean", "--last", "2", "--steps", "1", "2"], "--last 2 and --steps both choose"),
        (["{run}", "--out", "{tmp}/mean", "--last", "1"], "--last=1: a mean needs two"),
        (["{run}", "--out", "{tmp}/mean", "--last", "4"], r"has 3 checkpoints, fewer than 4 .*there: 1, 2, 3\)"),
        (["{run}", "--out", "{tmp}/mean", "--steps", "1", "4"], r"no checkpoint of step 4 \(steps there: 1, 2, 3\)"),
        (["{run}", "--out", "{tmp}/mean", "--steps", "1", "2", "1"], "--steps: 1 is given twice"),
        (["{run}", "--out", "{tmp}/mean", "--steps", "1"], "--steps 1: a mean needs two"),
        (["{tmp}/none", "--out", "{tmp}/mean"], "there is no such directory"),
        (["{tmp}", "--out", "{tmp}/mean"], "there is no run.json"),
        (["{run}", "{one}", "--out", "{tmp}/mean"], "run is no checkpoint, it has no manifest.json"),
        (["{one}", "--out", "{tmp}/mean"], "is one checkpoint: a mean needs two"),
        (["{one}", "{one}", "--out", "{tmp}/mean"], "given twice, and would count twice"),
        (["{one}", "{one}", "--last", "2", "--out", "{tmp}/mean"], "choose among the checkpoints of one run"),
    ],
)
def test_bad_input_is_told_in_one_sentence(tmp_path: Path, options: list[str], told: str) -> None:
    run = trained(tmp_path / "run", 1, 2, 3)
    places = {"run": run, "tmp": tmp_path, "one": checkpoint_folder(run, 1)}
    with pytest.raises(UserError, match=told):
        main([option.format(**places) for option in options])
    assert not (tmp_path / "mean").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 1, 2)
    (checkpoint_folder(run, 2) / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="leave the checkpoint of step 2 out"):
        main([str(run), "--out", str(tmp_path / "mean")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]


def test_a_run_json_that_was_changed_since_is_told(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", 1, 2)
    save_run(
        load_run(run / "run.json").model_copy(update={"train": RUN.train.model_copy(update={"seed": 5})}),
        run / "run.json",
    )
    with pytest.raises(UserError, match=r"train.seed=5 in .*run.json, but 0 in .*step-00000002"):
        main([str(run), "--out", str(tmp_path / "mean")])


def test_another_model_is_refused_and_other_data_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = RUN.model_copy(update={"moe": RUN.moe.model_copy(update={"top_k": 2})})
    folders = [
        checkpoint_folder(trained(tmp_path / "a", 1), 1),
        checkpoint_folder(trained(tmp_path / "b", 2, run=changed), 2),
    ]
    with pytest.raises(UserError, match=r"different models: moe.top_k=2 there, 1 here"):
        main([*map(str, folders), "--out", str(tmp_path / "mean")])
    seeded = RUN.model_copy(update={"train": RUN.train.model_copy(update={"seed": 3})})
    other = checkpoint_folder(trained(tmp_path / "c", 4, run=seeded), 4)
    assert main([str(folders[0]), str(other), "--out", str(tmp_path / "mean")]) == 0
    assert "train.seed=3 there, 0 here" in capsys.readouterr().err
