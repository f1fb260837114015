"""`limoe report` on a run with a real checkpoint of a small model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import launch.report
from launch import cli
from launch.report import main
from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.config.parse import save_run
from limoe_dist.data.manifest import sha256_of
from limoe_dist.parallel.mesh import Mesh
from tests.analysis.lines import Parsed, metrics_line, write
from tests.eval.models import laid_out, small_model
from tests.support.checkpoints import a_state, save
from tests.support.shards import truncated, write_shards

SCRIPT = "<script>alert(1)</script> red"


@dataclass(frozen=True)
class Trained:
    folder: Path
    training: Path
    validation: Path


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """A run of ep=2 with two log lines and a checkpoint of step 7; a caption is hostile, and a picture is broken."""
    training = write_shards(tmp_path / "training", rows=16)
    # Rows 0 and 8 would carry the same text, "a red square"; row 0 has one of its own.
    validation = write_shards(
        tmp_path / "validation", rows=13, captions={0: (SCRIPT, "other")}, pictures={5: truncated(5)}
    )
    run = laid_out(tp=1, ep=2)
    data = run.data.model_copy(update={"manifest": str(training), "validation": str(validation)})
    folder = tmp_path / "run"
    folder.mkdir()
    save_run(run.model_copy(update={"data": data}), folder / "run.json")
    write(folder / "metrics.jsonl", [metrics_line(5, blocks=(1,)), metrics_line(7, blocks=(1,))])
    tokenizer = sha256_of(training.parent / "tokenizer.model")
    state = a_state(step=7, tokenizer=tokenizer)
    save(folder, state, model_shards(small_model(), Mesh.single()), Mesh.single(), keep=1)
    return Trained(folder, training, validation)


def test_the_page_shows_retrievals_with_their_pictures(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trained.folder)]) == 0
    page = (trained.folder / "report.html").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert f"12 pictures of {trained.validation}, the run's validation data" in shown
    assert f"written: {trained.folder / 'report.html'} (0." in shown
    parsed = Parsed(page)
    # One of the 13 is broken.
    assert "The checkpoint of step 7 searched 12 of the 13 pictures" in parsed.text
    assert "Only its first" not in parsed.text
    # 12 examples: each has its own picture once, and what its text found, five at most.
    pictures = [image.get("src") or "" for image in parsed.named("img")]
    assert len(pictures) >= 12 * 6
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in pictures)
    assert parsed.named("script") == []
    assert SCRIPT in parsed.text
    assert "✓ right" in parsed.text
    assert list(trained.folder.glob(".report*")) == []


def test_right_answers_are_every_picture_that_carries_the_text(trained: Trained) -> None:
    from limoe_dist.analysis.examples import Query, example_of
    from limoe_dist.data.arrow import ShardSet

    query = Query(row=1, text="a green circle", texts=("A  GREEN circle", "a black cat"), rows=(9, 2, 1))
    example = example_of(query, ShardSet(trained.validation))
    # Rows 1 and 9 carry it, row 2 is a blue stripe.
    assert [picture.right for picture in example.pictures] == [True, False, True]
    assert [text.right for text in example.texts] == [True, False]
    assert example.own.address is not None


def test_another_manifest_and_file_are_taken(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert main([str(trained.folder), "--data", str(trained.training), "--out", str(out), "--examples", "3"]) == 0
    text = Parsed(out.read_text(encoding="utf-8")).text
    assert "all 16 pictures" in text
    assert "the run's own training data" in text
    assert not (trained.folder / "report.html").exists()


def test_of_a_large_manifest_the_first_rows_are_searched(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.report, "MOST_ROWS", 4)
    assert main([str(trained.folder)]) == 0
    text = Parsed((trained.folder / "report.html").read_text(encoding="utf-8")).text
    assert "4 of the 13 pictures" in text
    assert "Only its first 4 rows were read." in text


@pytest.mark.parametrize("missing", ["checkpoint", "shards", "examples"])
def test_without_examples_the_page_is_written_and_says_what_to_run(
    trained: Trained, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--examples", "0"] if missing == "examples" else []
    if missing == "checkpoint":
        (trained.folder / "checkpoints" / "step-00000007" / "manifest.json").unlink()
    if missing == "shards":
        trained.validation.unlink()
    assert main([str(trained.folder), *options]) == 0
    assert "without example retrievals: " in capsys.readouterr().out
    text = Parsed((trained.folder / "report.html").read_text(encoding="utf-8")).text
    expected = {
        "checkpoint": "The run has no whole checkpoint yet",
        "shards": f"limoe report {trained.folder} --data MANIFEST searches other shards",
        "examples": f"limoe report {trained.folder} --examples 12 shows them",
    }
    assert expected[missing] in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--examples", "25"], "--examples=25: must be 0 to 24"),
        (["--examples", "-1"], "--examples=-1: must be 0 to 24"),
        (["--tokenizer", "nowhere.model"], "tokenizer nowhere.model: no such file"),
        (["--out", "run.json/page.html"], "--out run.json/page.html: cannot be written"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(
    trained: Trained,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(trained.folder)
    assert cli.main(["report", str(trained.folder), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_directory_without_a_run_or_without_metrics_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "this is not the directory of a run" in capsys.readouterr().err
    (trained.folder / "metrics.jsonl").unlink()
    assert cli.main(["report", str(trained.folder)]) == 2
    assert "has not logged anything yet" in capsys.readouterr().err
    assert not (trained.folder / "report.html").exists()


def test_options_that_tyro_refuses_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["run", "--nonsense"]) == 2


def test_help_needs_no_torch_and_no_matplotlib() -> None:
    code = (
        "import sys; from launch.report import main; main(['--help']); "
        "assert not {'torch', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--examples" in done.stdout
