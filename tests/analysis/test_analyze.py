"""`limoe analyze` and the section that `limoe report` makes of it, with routers that are known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from launch import cli
from launch.analyze import main
from launch.report import routed_or_why_not
from limoe_dist.analysis.routed_pairs import as_in_training, drawn_rows, modalities_of, route_rows
from limoe_dist.analysis.routing_record import Analysis, newest_analysis
from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run, save_run
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.manifest import sha256_of
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.model.tower import build_model
from limoe_dist.parallel.mesh import Mesh
from tests.analysis.lines import Parsed, metrics_line, write
from tests.analysis.planted_routers import CPU, IMAGE_EXPERT, RUN, TEXT_EXPERT, planted_model
from tests.support.checkpoints import a_state, save
from tests.support.shards import truncated, write_shards

SCRIPT = "<script>alert(1)</script>"


@dataclass(frozen=True)
class Trained:
    folder: Path
    data: Path


def trained_run(
    tmp_path: Path,
    *,
    rows: int = 12,
    run: Run = RUN,
    captions: Mapping[int, Sequence[str]] | None = None,
    pictures: Mapping[int, bytes] | None = None,
) -> Trained:
    """A run with a checkpoint of step 7 and validation rows of its own."""
    training = write_shards(tmp_path / "training", rows=4)
    validation = write_shards(tmp_path / "validation", rows=rows, captions=captions, pictures=pictures)
    data = run.data.model_copy(update={"manifest": str(training), "validation": str(validation)})
    folder = tmp_path / "run"
    folder.mkdir()
    save_run(run.model_copy(update={"data": data}), folder / "run.json")
    write(folder / "metrics.jsonl", [metrics_line(7, blocks=(1,))])
    state = a_state(step=7, tokenizer=sha256_of(training.parent / "tokenizer.model"))
    save(folder, state, model_shards(planted_model(run), Mesh.single()), Mesh.single(), keep=1)
    return Trained(folder, validation)


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run that was analysed; nobody may change it."""
    trained = trained_run(tmp_path_factory.mktemp("analysed"))
    assert main([str(trained.folder)]) == 0
    return trained


def analysis_of(trained: Trained) -> Analysis:
    found = newest_analysis(trained.folder, warn=pytest.fail)
    assert found is not None
    return found[1]


def test_planted_routers_give_the_known_analysis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limoe_dist.analysis.routing.MOST_PIECES", 64)
    trained = trained_run(tmp_path)
    assert main([str(trained.folder)]) == 0
    found = analysis_of(trained)
    assert (found.rows, found.groups, found.group_pairs, found.capacity) == (12, 3, 4, 12)
    block = found.blocks["1"]
    assert block.image is not None
    assert block.text is not None
    # Of the 16 image tokens of a group 12 find a slot, of the 32 text tokens 12.
    assert (block.image.requested, block.image.kept, block.image.success_rate) == (48, 36, 0.75)
    assert (block.text.requested, block.text.kept, block.text.success_rate) == (96, 36, 0.375)
    # Equal gates: served as they stand, places 0..15 are images and 16..47 texts.
    assert block.image.ranks is not None
    assert block.text.ranks is not None
    assert block.image.ranks.median == pytest.approx(8 / 48)
    assert block.text.ranks.median == pytest.approx(32 / 48)
    assert (block.image.effective_experts, block.text.used_experts) == (1.0, 1)
    # Logits 16, 0, 0, 0: three gates of exp(-16) each are hardly more than one expert.
    assert block.text.effective_experts_by_gates == pytest.approx(1.0, abs=1e-4)
    kinds = [expert.kind for expert in block.experts]
    assert (kinds[IMAGE_EXPERT], kinds[TEXT_EXPERT], kinds.count("idle")) == ("image", "text", 2)
    assert block.experts[IMAGE_EXPERT].image_frac == 1.0
    # The first 12 text tokens of each group: the 8 of its first caption, half of the second one's.
    assert sum(piece.count for piece in block.experts[TEXT_EXPERT].pieces) == 36
    assert all(piece.lift == 1.0 for piece in block.experts[TEXT_EXPERT].pieces)
    shown = capsys.readouterr().out
    assert "12 rows in 3 groups of 4" in shown
    assert "37.5 %" in shown
    assert list(trained.folder.glob(".*.tmp")) == []


def test_patches_are_where_the_tokens_went(tmp_path: Path) -> None:
    trained = trained_run(tmp_path)
    assert main([str(trained.folder), "--pictures", "4"]) == 0
    pictures = analysis_of(trained).pictures
    assert pictures is not None
    # 12 slots: the pictures of the first three pairs of a group, none for the fourth.
    assert [each.experts["1"] for each in pictures.shown] == [(IMAGE_EXPERT,) * 4] * 3 + [(-1,) * 4]
    assert all((trained.folder / "analysis-7" / each.file).is_file() for each in pictures.shown)
    assert [sheet.expert for sheet in pictures.sheets["1"]] == [IMAGE_EXPERT]


def test_the_report_shows_it_and_stays_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = trained_run(tmp_path)
    before = routed_or_why_not(load_run(trained.folder / "run.json"), trained.folder)
    assert isinstance(before, str)
    assert before.startswith(f"Not analysed yet. limoe analyze {trained.folder} sends validation pairs")
    assert main([str(trained.folder)]) == 0
    assert cli.main(["report", str(trained.folder), "--examples", "0"]) == 0
    page = (trained.folder / "report.html").read_text("utf-8")
    parsed = Parsed(page)
    assert "step 7 routed 12 of the 12 rows" in parsed.text
    assert "1 image 75.0 % 1.00 1.00 1 2 0.17" in parsed.text
    assert "Block 1 : share of image tokens" in parsed.text
    # 6 pictures and a sheet.
    assert len(parsed.named("img")) == 7
    assert all(image.get("alt") for image in parsed.named("img"))
    assert len(page) < 400_000


def test_strangers_text_is_text(tmp_path: Path) -> None:
    # More slots than tokens: every caption is shown with its pieces.
    run = RUN.model_copy(update={"moe": RUN.moe.model_copy(update={"capacity_factor": 4.0})})
    trained = trained_run(tmp_path, run=run, captions=dict.fromkeys(range(12), (SCRIPT,)))
    assert main([str(trained.folder)]) == 0
    file = trained.folder / "analysis-7.json"
    content = json.loads(file.read_text("utf-8"))
    content["blocks"]["1"]["experts"][TEXT_EXPERT]["pieces"][0]["piece"] = "<img src=x onerror=alert(2)>"
    content["data"] = SCRIPT
    file.write_text(json.dumps(content))
    assert cli.main(["report", str(trained.folder), "--examples", "0"]) == 0
    parsed = Parsed((trained.folder / "report.html").read_text("utf-8"))
    assert parsed.named("script") == []
    assert not any("onerror" in image for image in parsed.named("img"))
    assert parsed.text.count(SCRIPT) >= 2
    assert "<img src=x onerror=alert(2)>" in parsed.text


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("pictures", "shown", 0, "file"), "../../secret.png"),
        (("pictures", "legend", "1", 0, "colour"), "url(x)"),
        (("blocks", "1", "image", "success_rate"), "75 %"),
        (("version",), 99),
        (("format",), "other"),
    ],
)
def test_an_analysis_that_is_not_ours_is_passed_over(
    analysed: Trained, tmp_path: Path, place: Sequence[str | int], value: object
) -> None:
    content = json.loads((analysed.folder / "analysis-7.json").read_text("utf-8"))
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (tmp_path / "analysis-7.json").write_text(json.dumps(content))
    told = routed_or_why_not(RUN, tmp_path)
    assert isinstance(told, str)
    assert "limoe analyze makes it again" in told


def test_pictures_alone_and_texts_alone_leave_the_other_null(tmp_path: Path) -> None:
    for name, absent in (("image", "text"), ("text", "image")):
        captions = dict.fromkeys(range(8), ()) if name == "image" else None
        pictures = dict.fromkeys(range(8), b"") if name == "text" else None
        (tmp_path / name).mkdir()
        trained = trained_run(tmp_path / name, rows=8, captions=captions, pictures=pictures)
        assert main([str(trained.folder)]) == 0
        content = json.loads((trained.folder / "analysis-7.json").read_text("utf-8"))
        assert content["modalities"] == [name]
        assert content["blocks"]["1"][absent] is None
        assert content["blocks"]["1"][name]["requested"] == 8 * (4 if name == "image" else 8)
        assert {expert[f"{absent}_tokens"] for expert in content["blocks"]["1"]["experts"]} == {None}
        assert (content["pictures"] is None) == (name == "text")
        shown = routed_or_why_not(RUN, trained.folder)
        assert not isinstance(shown, str)
        (block,) = shown.blocks
        assert block.ranks is not None
        assert block.image_shares is None
        assert (bool(block.words), bool(block.sheets)) == (name == "text", name == "image")


def test_rows_that_cannot_be_used_or_fill_no_group_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of 11 rows one is broken and one has no caption: 9, of which 8 fill two groups.
    trained = trained_run(tmp_path, rows=11, pictures={5: truncated(5)}, captions={3: ()})
    assert main([str(trained.folder), "--pictures", "0"]) == 0
    found = analysis_of(trained)
    assert (found.rows, found.bad_rows, found.left_over_rows, found.groups) == (8, 2, 1, 2)
    assert found.pictures is None
    assert "2 rows that cannot be used, 1 that do not fill a group" in " ".join(capsys.readouterr().out.split())


def test_fewer_rows_than_a_group_make_one_smaller_group(tmp_path: Path) -> None:
    trained = trained_run(tmp_path)
    assert main([str(trained.folder), "--rows", "3"]) == 0
    found = analysis_of(trained)
    # 3 pairs are 36 tokens: 9 slots an expert, rounded up to 12.
    assert (found.rows, found.groups, found.group_pairs, found.capacity) == (3, 1, 3, 12)


def test_a_larger_capacity_drops_less(tmp_path: Path) -> None:
    trained = trained_run(tmp_path)
    out = tmp_path / "other" / "wide.json"
    assert main([str(trained.folder), "--capacity-factor", "2", "--out", str(out)]) == 0
    content = json.loads(out.read_text("utf-8"))
    # 24 slots: all 16 image tokens, and 24 of the 32 text tokens.
    assert content["capacity"] == 24
    assert content["blocks"]["1"]["image"]["success_rate"] == 1.0
    assert content["blocks"]["1"]["text"]["success_rate"] == 0.75
    assert (tmp_path / "other" / "wide").is_dir()
    assert not list(trained.folder.glob("analysis-*"))


@pytest.mark.parametrize(
    ("moe", "pad"),
    [
        ({}, "token"),
        ({}, "masked"),
        ({"top_k": 2, "priority": "sum"}, "masked"),
        ({"order": "random", "routers": "shared"}, "token"),
        ({"order": "text_first", "image_experts": 2}, "token"),
    ],
)
def test_the_tally_agrees_with_what_the_model_itself_counts(tmp_path: Path, moe: dict[str, Any], pad: str) -> None:
    changes = {"moe": RUN.moe.model_copy(update=moe), "text": RUN.text.model_copy(update={"pad": pad})}
    run = as_in_training(RUN.model_copy(update=changes))
    shards = ShardSet(write_shards(tmp_path / "shards", rows=12))
    tokenizer = Tokenizer(tmp_path / "shards" / "tokenizer.model", length=8, vocab_limit=64)
    model = build_model(run, mesh=Mesh.single(), device=CPU)
    layer: Any = model.blocks[1]
    with torch.no_grad():
        # Large values: tokens spread over the experts, and the order is not that of the modalities.
        layer.moe.router.normal_(generator=torch.Generator().manual_seed(0))
    counted: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, out: counted.append(torch.stack([out[1].routed_E2, out[1].kept_E2])))
    found = route_rows(model, run, shards, tokenizer, drawn_rows(12, 0), modalities=("image", "text"), device=CPU)
    tally = found.tallies[1]
    assert torch.equal(torch.stack([tally.requested_E2, tally.kept_E2]).float(), torch.stack(counted).sum(0))
    assert 0 < tally.kept_E2.sum() < tally.requested_E2.sum()
    ranks = torch.cat(tally.ranks[0] + tally.ranks[1])
    # Every token that is counted has one place: over whole groups they are even.
    assert len(ranks) == tally.requested_E2.sum() / run.moe.top_k
    assert ranks.mean().item() == pytest.approx(0.5, abs=1e-6)


def test_rows_are_drawn_alike_each_time_and_modalities_are_seen(tmp_path: Path) -> None:
    assert drawn_rows(50, 10) == drawn_rows(50, 0)[:10]
    assert sorted(drawn_rows(50, 0)) == list(range(50))
    shards = ShardSet(write_shards(tmp_path / "none", rows=2, captions={0: (), 1: ()}, pictures={0: b"", 1: b""}))
    with pytest.raises(UserError, match="neither pictures nor captions"):
        modalities_of(shards, [0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "-1"], "--rows=-1: must be 0"),
        (["--pictures", "9"], "--pictures=9: must be 0 to 8"),
        (["--capacity-factor", "-1"], "--capacity-factor=-1: must be 0"),
        (["--data", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--out", "x.txt"], "--out x.txt: must end in .json"),
        (["--out", "run.json/x.json"], "--out run.json/x.json: cannot be written"),
        (["--checkpoint", "3"], "step 3"),
        (["--tokenizer", "nowhere.model"], "tokenizer nowhere.model: no such file"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    trained = trained_run(tmp_path, rows=4)
    monkeypatch.chdir(trained.folder)
    assert cli.main(["analyze", str(trained.folder), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_dense_run_and_no_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", str(tmp_path)]) == 2
    assert "this is not the directory of a run" in capsys.readouterr().err
    dense = RUN.model_copy(update={"moe": RUN.moe.model_copy(update={"blocks": ()})})
    save_run(dense, tmp_path / "run.json")
    assert cli.main(["analyze", str(tmp_path)]) == 2
    assert "the run is dense, so there is no router to analyze" in capsys.readouterr().err


def test_rows_without_any_usable_picture_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = trained_run(tmp_path, rows=2, pictures={0: truncated(0), 1: truncated(1)})
    assert cli.main(["analyze", str(trained.folder)]) == 2
    assert "none of the 2 rows can be used" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from launch.analyze import main; main(['--help']); "
        "assert not {'torch', 'matplotlib', 'jinja2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--capacity-factor" in done.stdout
