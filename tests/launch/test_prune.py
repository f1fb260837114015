"""`limoe prune`: what it writes and reports, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import cli
from launch.prune import main
from limoe_dist.checkpoint.catalog import checkpoint_folder, is_verified
from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import decisive, load_run, save_run
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.manifest import sha256_of
from limoe_dist.data.tokenizer import open_tokenizer
from limoe_dist.eval.retrieval import retrieval
from limoe_dist.eval.zeroshot import zeroshot
from limoe_dist.parallel.mesh import Mesh
from tests.eval.models import CPU, RUN, small_model
from tests.support.checkpoints import a_state, save
from tests.support.shards import write_shards

ALONE = Mesh.single()


def changed(section: str, **settings: Any) -> Run:
    return RUN.model_copy(update={section: getattr(RUN, section).model_copy(update=settings)})


def trained(place: Path, run: Run = RUN) -> Path:
    """A run with the small model, in which no token wants expert 2, and data of its own."""
    training = place / "training" / "manifest.json"
    if not training.exists():
        write_shards(training.parent, rows=24)
        write_shards(place / "validation", rows=13)
    data = {"manifest": str(training), "validation": str(place / "validation" / "manifest.json")}
    run = run.model_copy(update={"data": run.data.model_copy(update=data)})
    folder = place / "run"
    folder.mkdir()
    save_run(run, folder / "run.json")
    model = small_model(run)
    if run.moe.blocks and run.model.towers == "one":
        with torch.no_grad():
            model.blocks[1].norm2.bias.fill_(1.0)
            model.blocks[1].moe.router[:, 2] = -1.0
    state = a_state(7, tokenizer=sha256_of(training.parent / "tokenizer.model"), settings=decisive(run))
    save(folder, state, model_shards(model, ALONE), ALONE)
    return folder


def record(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "pruned.json").read_text())
    return content


@pytest.mark.parametrize("modality", ["image", "text"])
def test_nothing_is_lost_where_every_token_keeps_its_expert(
    tmp_path: Path, modality: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = trained(tmp_path), tmp_path / "pruned"
    validation = str(tmp_path / "validation")
    assert main([str(run), "--modality", modality, "--out", str(out), "--coverage", "1", "--data", validation]) == 0
    found = record(out)
    (kept,) = found["kept"]
    assert 2 not in kept["experts"]
    assert kept["coverage"] == 1.0
    for task in ("zeroshot", "retrieval"):
        assert found["accuracy"][task]["after"] == found["accuracy"][task]["before"]
    assert found["embeddings"]["largest"] < 1e-5
    assert found["embeddings"]["equal_frac"] == 1.0
    # 4 experts of 2 * 16 * 32 + 32 + 16 parameters each
    parameters = found["parameters"]
    assert parameters["before"]["experts"] == 4 * 1072
    assert parameters["after"]["experts"] == len(kept["experts"]) * 1072
    gone = parameters["before"]["experts"] - parameters["after"]["experts"]
    assert parameters["before"]["total"] - parameters["after"]["total"] == gone > 0
    assert found["speed"]["after"]["inputs_per_s"] > 0
    shown = capsys.readouterr()
    assert f"{modality}s, before and after" in shown.out
    assert "on which the experts were chosen: it flatters" in shown.err


def test_the_accuracy_before_is_that_of_the_whole_run(tmp_path: Path) -> None:
    folder, out = trained(tmp_path), tmp_path / "pruned"
    assert main([str(folder), "--modality", "image", "--out", str(out), "--coverage", "0.3"]) == 0
    found, run = record(out)["accuracy"], load_run(folder / "run.json")
    shards = ShardSet(tmp_path / "validation")
    tokenizer = open_tokenizer(RUN, shards.manifest, shards.folder)
    model = small_model()
    with torch.no_grad():
        model.blocks[1].norm2.bias.fill_(1.0)
        model.blocks[1].moe.router[:, 2] = -1.0
    expected = {
        "zeroshot": zeroshot(model, run, shards, tokenizer, mesh=ALONE, device=CPU).to_json(),
        "retrieval": retrieval(model, run, shards, tokenizer, mesh=ALONE, device=CPU).to_json(),
    }
    for task, figures in expected.items():
        assert found[task]["before"] == {name: value for name, value in figures.items() if name != "examples"}


def test_the_result_is_a_run_of_its_own(tmp_path: Path) -> None:
    folder, out = trained(tmp_path), tmp_path / "pruned"
    assert main([str(folder), "--modality", "text", "--out", str(out), "--rows", "5"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "pruned.json", "run.json", "tokenizer.model"]
    assert is_verified(checkpoint_folder(out, 7))
    run, found = load_run(out / "run.json"), record(out)
    assert [list(map(int, text.split())) for text in run.moe.kept_experts] == [
        each["experts"] for each in found["kept"]
    ]
    assert (found["usage"]["rows"], found["usage"]["inputs"]) == (5, 10)
    assert found["rule"] == {"coverage": 0.999}
    assert found["source"]["path"] == str(checkpoint_folder(folder, 7))
    assert cli.main(["checkpoint", "verify", str(out)]) == 0
    with pytest.raises(UserError, match="pruned already"):
        main([str(out), "--modality", "text", "--out", str(tmp_path / "again")])


def test_without_validation_data_there_is_no_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = trained(tmp_path), tmp_path / "pruned"
    run = load_run(folder / "run.json")
    save_run(run.model_copy(update={"data": run.data.model_copy(update={"validation": ""})}), folder / "run.json")
    assert main([str(folder), "--modality", "image", "--out", str(out), "--min-share", "0.2"]) == 0
    assert set(record(out)["accuracy"]) == {"data", "capacity"}
    assert record(out)["embeddings"]["inputs"] == 24
    assert "accuracy was not measured" in capsys.readouterr().err


def test_data_without_concepts_gives_retrieval_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = trained(tmp_path), tmp_path / "pruned"
    plain = write_shards(tmp_path / "plain", rows=9, concepts=False)
    assert main([str(folder), "--modality", "image", "--out", str(out), "--validation", str(plain)]) == 0
    assert set(record(out)["accuracy"]) == {"data", "capacity", "retrieval"}
    assert "zeroshot was left out" in capsys.readouterr().err


def test_a_capacity_limit_is_lifted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = trained(tmp_path, changed("moe", eval_capacity="paper")), tmp_path / "pruned"
    assert main([str(folder), "--modality", "text", "--out", str(out)]) == 0
    assert load_run(out / "run.json").moe.eval_capacity == "full"
    assert "moe.eval_capacity=paper became full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (changed("moe", blocks=()), "moe.blocks is empty: a dense model has no experts"),
        (
            changed("model", towers="two").model_copy(update={"moe": RUN.moe.model_copy(update={"blocks": ()})}),
            "model.towers=two: a two-tower model has no experts",
        ),
    ],
    ids=["dense", "two-tower"],
)
def test_a_model_without_experts_is_refused(tmp_path: Path, run: Run, told: str) -> None:
    with pytest.raises(UserError, match=told):
        main([str(trained(tmp_path, run)), "--modality", "text", "--out", str(tmp_path / "pruned")])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--out", "{tmp}/pruned"], "--modality is missing: must be image or text"),
        (["--modality", "imgae", "--out", "{tmp}/pruned"], '--modality=imgae: must be image .*did you mean "image"'),
        (["--modality", "text"], "--out is missing"),
        (["--modality", "text", "--out", "{run}"], "exists and is not empty: choose another"),
        (["--modality", "text", "--out", "{tmp}/pruned", "--coverage", "0"], r"--coverage=0.0: must be above 0"),
        (["--modality", "text", "--out", "{tmp}/pruned", "--coverage", "1.5"], r"--coverage=1.5: must be above 0"),
        (["--modality", "text", "--out", "{tmp}/pruned", "--coverage", "nan"], r"--coverage=nan: must be above 0"),
        (["--modality", "text", "--out", "{tmp}/pruned", "--min-share", "-1"], r"--min-share=-1.0: must be 0 to 1"),
        (
            ["--modality", "text", "--out", "{tmp}/pruned", "--min-share", "0.1", "--coverage", "0.9"],
            "both choose: give one",
        ),
        (["--modality", "text", "--out", "{tmp}/pruned", "--rows", "-1"], "--rows=-1: must be 0 or more"),
        (["--modality", "text", "--out", "{tmp}/pruned", "--data", "{tmp}/none.json"], "none.json"),
        (["--modality", "text", "--out", "{tmp}/pruned", "--checkpoint", "9"], "no checkpoint of step 9"),
    ],
)
def test_bad_input_is_told_in_one_sentence(tmp_path: Path, options: list[str], told: str) -> None:
    run = trained(tmp_path)
    with pytest.raises(UserError, match=told):
        main([str(run), *(option.format(tmp=tmp_path, run=run) for option in options)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "training", "validation"]


def test_a_directory_that_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run.json"):
        main([str(tmp_path), "--modality", "text", "--out", str(tmp_path / "pruned")])


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "retrieval", "--run"],
        ["eval", "zeroshot", "--run"],
        ["analyze"],
        ["train", "--resume"],
    ],
)
def test_a_pruned_run_is_refused_where_it_would_mislead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main([str(trained(tmp_path)), "--modality", "text", "--out", str(tmp_path / "pruned")]) == 0
    capsys.readouterr()
    assert cli.main([*words, str(tmp_path / "pruned")]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "prune" in told
