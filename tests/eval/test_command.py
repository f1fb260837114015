from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import cli
from launch.evaluate import _laid_out, main
from limoe_dist.checkpoint.catalog import checkpoint_folder
from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import save_run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.manifest import sha256_of
from limoe_dist.data.tokenizer import open_tokenizer
from limoe_dist.eval.contrastive import contrastive
from limoe_dist.eval.fewshot import Shots, fewshot
from limoe_dist.eval.retrieval import retrieval
from limoe_dist.eval.zeroshot import zeroshot
from limoe_dist.parallel.mesh import Mesh
from tests.eval.models import CPU, laid_out, small_model
from tests.support.checkpoints import a_state, save
from tests.support.shards import write_shards


@dataclass(frozen=True)
class Trained:
    folder: Path
    training: Path
    validation: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run whose checkpoint of step 7 holds the small model; it was laid out for ep=2."""
    place = tmp_path_factory.mktemp("trained")
    training = write_shards(place / "training", rows=24)
    validation = write_shards(place / "validation", rows=13)
    run = laid_out(tp=1, ep=2)
    data = run.data.model_copy(update={"manifest": str(training), "validation": str(validation)})
    folder = place / "run"
    folder.mkdir()
    save_run(run.model_copy(update={"data": data}), folder / "run.json")
    tokenizer = sha256_of(training.parent / "tokenizer.model")
    state = a_state(step=7, tokenizer=tokenizer)
    save(folder, state, model_shards(small_model(), Mesh.single()), Mesh.single(), keep=1)
    return Trained(folder, training, validation)


def on(trained: Trained, task: str, *options: str) -> list[str]:
    return [task, "--run", str(trained.folder), *options]


def result(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_zeroshot_writes_what_the_library_finds_and_the_pixel_neighbour(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(on(trained, "zeroshot")) == 0
    found = result(trained.folder / "eval-zeroshot-7.json")
    run, shards = laid_out(tp=1, ep=1), ShardSet(trained.validation)
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    expected = zeroshot(small_model(), run, shards, tokenizer, mesh=Mesh.single(), device=CPU)
    assert found["zeroshot"] == expected.to_json()
    assert (found["task"], found["step"], found["ranks"]) == ("zeroshot", 7, 1)
    # Training and validation pictures of equal number are the same picture: each is its own neighbour.
    neighbour = found["pixel_nearest_neighbour"]
    assert isinstance(neighbour, dict)
    assert (neighbour["top1"], neighbour["training_rows"]) == (1.0, 24)
    shown = capsys.readouterr().out
    assert "zero-shot at step 7: 13 pictures, 8 classes" in shown
    assert "100.00 %" in shown
    assert "12.50 %" in shown


def test_retrieval_writes_what_the_library_finds(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "result.json"
    assert main(on(trained, "retrieval", "--data", str(trained.training), "--json", str(path))) == 0
    run, shards = laid_out(tp=1, ep=1), ShardSet(trained.training)
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    expected = retrieval(small_model(), run, shards, tokenizer, mesh=Mesh.single(), device=CPU)
    assert result(path)["retrieval"] == expected.to_json()
    assert "image to text" in capsys.readouterr().out


def test_all_captions_can_be_asked_for(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert main(on(trained, "retrieval", "--captions", "all", "--json", str(path))) == 0
    found = result(path)["retrieval"]
    assert isinstance(found, dict)
    # 13 rows of 8 concepts, with two captions for each concept.
    assert (found["captions"], found["texts"]) == ("all", 16)
    assert "16 texts (all captions)" in capsys.readouterr().out


def test_contrastive_writes_what_the_library_finds(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(on(trained, "contrastive", "--minibatch", "5")) == 0
    run, shards = laid_out(tp=1, ep=1), ShardSet(trained.validation)
    run = run.model_copy(update={"eval": run.eval.model_copy(update={"minibatch": 5})})
    tokenizer = open_tokenizer(run, shards.manifest, shards.folder)
    expected = contrastive(small_model(), run, shards, tokenizer, mesh=Mesh.single(), device=CPU)
    found = result(trained.folder / "eval-contrastive-7.json")
    assert found["contrastive"] == expected.to_json()
    shown = capsys.readouterr().out
    assert "contrastive accuracy at step 7: 2 minibatches of 5 pairs" in shown
    assert "left out: 3 of the last minibatch" in shown
    assert main(on(trained, "contrastive")) == 0
    assert "fewer than the 1024 pairs of a minibatch: all are one" in capsys.readouterr().out


def test_fewshot_writes_what_the_library_finds_and_needs_no_vocabulary(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    options = ["--shots", "3", "--seeds", "2", "--l2", "1024", "1", "--json", str(path)]
    # The vocabulary's path is not even looked at.
    assert main(on(trained, "fewshot", *options, "--tokenizer", "nowhere.model")) == 0
    run, shots = laid_out(tp=1, ep=1), Shots(shots=3, seeds=2, l2=(1024.0, 1.0))
    training, shards = ShardSet(trained.training), ShardSet(trained.validation)
    expected = fewshot(small_model(), run, training, shards, shots, mesh=Mesh.single(), device=CPU)
    assert result(path)["fewshot"] == {"training_data": str(trained.training)} | expected.to_json()
    shown = capsys.readouterr().out
    assert "3-shot at step 7: 13 pictures, 8 classes" in shown
    assert "2 draws of about 24 training pictures, 16" in shown


def test_a_class_file_makes_prompts_canonical_unless_told_otherwise(trained: Trained, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("red square\ngreen circle\nblue stripe\nwhite moon\nblack cat\nyellow sun\nold tree\nnew boat")
    styles = []
    for options in ([], ["--classes", str(names)], ["--classes", str(names), "--prompts", "written"]):
        path = tmp_path / "result.json"
        assert main(on(trained, "zeroshot", "--neighbours", "none", "--json", str(path), *options)) == 0
        found = result(path)["zeroshot"]
        assert isinstance(found, dict)
        styles.append(found["prompts"])
    assert styles == ["written", "canonical", "written"]


def test_clip_s_templates_have_a_name(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ["--templates", "clip", "{}", "--neighbours", "none", "--json", str(path)]
    assert main(on(trained, "zeroshot", *options)) == 0
    found = result(path)["zeroshot"]
    assert isinstance(found, dict)
    assert (found["templates"], found["templates_used"]) == (["clip", "{}"], 81)


def test_ranks_change_nothing_but_their_number(trained: Trained, tmp_path: Path) -> None:
    # A process of its own: the launcher sets environment variables and signal handlers.
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert main(on(trained, "retrieval", "--json", str(one))) == 0
    command = ["eval", *on(trained, "retrieval", "--ranks", "2", "--json", str(two))]
    done = subprocess.run([sys.executable, "-m", "limoe_dist", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    assert result(two) == result(one) | {"ranks": 2}


def test_tp_and_ep_fall_back_to_what_divides_the_ranks() -> None:
    parallel = [_laid_out(laid_out(tp=4, ep=6), world).parallel for world in (1, 2, 3, 4, 8)]
    assert [(p.tp, p.ep) for p in parallel] == [(1, 1), (2, 2), (1, 3), (4, 2), (4, 2)]


def test_a_class_file_and_templates_are_taken(trained: Trained, tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    words = ["red square, crimson box", "green circle", "blue stripe", "white moon", "black cat"]
    names.write_text("\n".join([*words, "yellow sun", "old tree", "new boat", "a class without pictures"]))
    path = tmp_path / "result.json"
    options = ["--classes", str(names), "--templates", "{}", "one {}", "--neighbours", "none", "--json", str(path)]
    assert main(on(trained, "zeroshot", *options)) == 0
    found = result(path)["zeroshot"]
    assert isinstance(found, dict)
    assert (found["classes"], found["templates"]) == (9, ["{}", "one {}"])
    assert "pixel_nearest_neighbour" not in result(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "nowhere"], "--run nowhere: there is no run.json"),
        (["--data", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--checkpoint", "8"], "no checkpoint of step 8 (steps there: 7)"),
        (["--ranks", "0"], "--ranks=0: must be 1 or more"),
        (["--batch-pairs", "0"], "--batch-pairs=0: must be 1 or more"),
        (["--classes", "nowhere.txt"], "class file nowhere.txt: cannot be read"),
        (["--templates", "a photo"], 'eval.templates: "a photo" must hold {}'),
        (["--neighbours", "nowhere.json"], "give --neighbours MANIFEST, or --neighbours none"),
        (["--tokenizer", "nowhere.model"], "tokenizer nowhere.model: no such file"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(
    trained: Trained, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["eval", *on(trained, "zeroshot", *options)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("contrastive", ["--minibatch", "1"], "--minibatch=1: must be 2 or more"),
        ("fewshot", ["--shots", "0"], "--shots=0: must be 1 or more"),
        ("fewshot", ["--seeds", "-1"], "--seeds=-1: must be 1 or more"),
        ("fewshot", ["--l2", "1", "0"], "--l2=0: a penalty must be above 0"),
        ("fewshot", ["--l2", "nan"], "--l2=nan: a penalty must be above 0"),
        ("fewshot", ["--train", "nowhere.json"], "nowhere.json: cannot be read"),
        ("fewshot", [], "--shots=10: 0 of the 8 classes"),
    ],
)
def test_what_is_wrong_with_other_tasks_is_one_line_too(
    trained: Trained, capsys: pytest.CaptureFixture[str], task: str, options: list[str], message: str
) -> None:
    assert cli.main(["eval", *on(trained, task, *options)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_run_without_a_whole_checkpoint_is_refused(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((trained.folder / "run.json").read_bytes())
    checkpoint_folder(tmp_path, 7).mkdir(parents=True)
    with pytest.raises(UserError, match="no whole checkpoint"):
        main(["retrieval", "--run", str(tmp_path)])


def test_another_vocabulary_than_the_run_s_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = write_shards(tmp_path, rows=2, vocab_size=30).parent / "tokenizer.model"
    with pytest.raises(UserError, match="the same text would be other tokens"):
        main(on(trained, "retrieval", "--tokenizer", str(other)))


def test_options_that_tyro_refuses_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["zeroshot", "--nonsense"]) == 2
    assert main(["--help"]) == 0
    assert "zeroshot" in capsys.readouterr().out


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from launch.evaluate import main; main(['zeroshot', '--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--neighbours" in done.stdout
