"""The quick start: its order, what it skips, how it stops, and the figures that it is held to."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tyro

from launch import evaluate, figures, quickstart, train
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import save_run
from limoe_dist.config.presets import preset
from tests import quickstart_figures


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """In an empty folder; the `limoe` commands that were asked for, none of which is run."""
    monkeypatch.chdir(tmp_path)
    commands: list[list[str]] = []

    def record(command: list[str]) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(quickstart, "_limoe", record)
    return commands


def _checkpoint(step: int) -> None:
    folder = quickstart.RUN / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    for rank in range(2):
        (folder / f"rank-{rank:05d}.safetensors").touch()


def _finish_run(success_text: float = 0.95) -> None:
    """What the commands of a quick start leave behind."""
    _checkpoint(quickstart.STEPS)
    run = preset("tiny")
    save_run(
        run.model_copy(update={"parallel": run.parallel.model_copy(update={"ep": 2})}), quickstart.RUN / "run.json"
    )
    blocks = {"1": {"success_image": 0.99, "success_text": success_text}}
    lines = [{"step": 10, "blocks": {}}, {"step": quickstart.STEPS, "blocks": blocks, "seconds_per_step": 0.1}]
    # The cut line is what a crash leaves.
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9'
    (quickstart.RUN / "metrics.jsonl").write_text(text)
    shown = {"rows": 5, "classes": 5, "top1": 0.2, "top5": 0.4, "chance_top1": 0.01, "chance_top5": 0.05}
    recalls = ("image_to_text", "text_to_image", "chance_image_to_text")
    found: dict[str, Any] = {"rows": 5, "texts": 5} | {name: {"recall_at_1": 0.1} for name in recalls}
    quickstart.ZEROSHOT.write_text(json.dumps({"zeroshot": shown, "pixel_nearest_neighbour": {"top1": 0.1}}))
    quickstart.RETRIEVAL.write_text(json.dumps({"retrieval": found}))


def _heads(commands: list[list[str]]) -> list[str]:
    return [" ".join(command[:2]) for command in commands]


def test_a_first_quick_start_asks_for_every_command_in_order(ran: list[list[str]]) -> None:
    # Nothing was really trained, so that the figures are missing: one line and status 2.
    assert quickstart.main([]) == 2
    assert _heads(ran) == [
        "prep fetch-demo",
        "prep pack",
        "prep pack",
        "prep tokenizer",
        "train tiny",
        "train --resume",
        "eval zeroshot",
        "eval retrieval",
        "report quickstart/run",
    ]


def test_the_commands_have_options_that_limoe_knows(ran: list[list[str]]) -> None:
    quickstart.main([])
    _finish_run()
    for name, *options in ran:
        if name == "prep":
            command_module = importlib.import_module(f"data_prep.commands.{options[0].replace('-', '_')}")
            tyro.cli(command_module.Settings, args=options[1:])
        elif name == "train":
            command, run = train.parse(options)
            assert (command.ranks, run.parallel.ep) == (2, 2)
        elif name == "eval":
            tyro.extras.subcommand_cli_from_dict(evaluate.TASKS, args=options)


def test_a_second_quick_start_trains_and_evaluates_nothing(ran: list[list[str]]) -> None:
    quickstart.ROOT.mkdir()
    _finish_run()
    assert quickstart.main(["--figures", "kept/figures.json"]) == 0
    assert _heads(ran) == ["prep fetch-demo", "prep pack", "prep pack", "prep tokenizer", "report quickstart/run"]
    assert Path("kept/figures.json").is_file()


def test_training_goes_on_where_it_was_interrupted(ran: list[list[str]]) -> None:
    _checkpoint(200)
    _checkpoint(400)
    assert quickstart._train() == [
        ["train", "--resume", "quickstart/run", "--ranks", "2", "--stop-after", str(quickstart.STOP_AFTER)]
    ]


def test_a_run_without_a_whole_checkpoint_begins_anew(ran: list[list[str]]) -> None:
    folder = quickstart.RUN / "checkpoints" / "step-00000200"
    folder.mkdir(parents=True)
    assert _heads(quickstart._train()) == ["train tiny"]
    assert not quickstart.RUN.exists()


def test_old_results_are_not_those_of_a_newer_checkpoint(ran: list[list[str]]) -> None:
    zeroshot = next(stage for stage in quickstart.STAGES if stage.name == "zero-shot")
    _checkpoint(quickstart.STEPS)
    quickstart.ZEROSHOT.write_text("{}")
    (newest,) = quickstart.RUN.glob("checkpoints/*/manifest.json")
    written = quickstart.ZEROSHOT.stat().st_mtime
    os.utime(newest, (written + 10, written + 10))
    assert _heads(zeroshot.commands()) == ["eval zeroshot"]
    os.utime(newest, (written - 10, written - 10))
    assert zeroshot.commands() == []


def test_the_first_failure_ends_the_quick_start_with_its_status(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # fetch and the first pack do well, the second pack does not.
    statuses = iter([0, 0, 7])
    monkeypatch.setattr(quickstart, "_limoe", lambda command: next(statuses))
    assert quickstart.main([]) == 7
    shown = capsys.readouterr()
    assert "the stage pack ended with status 7" in shown.err
    assert "== tokenizer" not in shown.out
    assert set(quickstart._times()) == {"fetch"}


def test_a_command_is_limoe_itself_and_its_status_is_handed_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert quickstart._limoe(["doctor", "--no-such-option"]) == 2
    assert "limoe: error: unknown option" in capfd.readouterr().err


def test_the_figures_hold_what_was_measured_and_where(ran: list[list[str]]) -> None:
    quickstart.ROOT.mkdir()
    _finish_run()
    assert quickstart.main(["--setup-seconds", "3.5"]) == 0
    found = json.loads((quickstart.ROOT / "figures.json").read_text())
    assert found["stages"][0] == {"name": "set-up", "seconds": 3.5, "done_before": False}
    assert (found["ranks"], found["ep"], found["step"]) == (2, 2, quickstart.STEPS)
    assert found["success"] == {"1": {"image": 0.99, "text": 0.95}}
    assert found["machine"]["cores"] >= 1
    assert quickstart_figures.main(quickstart.ROOT / "figures.json") == 0


@pytest.mark.parametrize("change", [{"top1": 0.07}, {"top5": 0.19}])
def test_a_figure_below_what_is_wanted_fails_the_check(
    ran: list[list[str]], change: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.ROOT.mkdir()
    _finish_run()
    quickstart.main([])
    path = quickstart.ROOT / "figures.json"
    found = json.loads(path.read_text())
    found["zeroshot"] |= change
    path.write_text(json.dumps(found))
    assert quickstart_figures.main(path) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(" passed, 1 failed")


def test_a_modality_that_was_served_too_rarely_fails_the_check(ran: list[list[str]]) -> None:
    quickstart.ROOT.mkdir()
    _finish_run(success_text=0.89)
    quickstart.main([])
    assert quickstart_figures.main(quickstart.ROOT / "figures.json") == 1


def test_a_missing_figure_is_named(ran: list[list[str]]) -> None:
    quickstart.ROOT.mkdir()
    _finish_run()
    quickstart.ZEROSHOT.write_text(json.dumps({"zeroshot": {"rows": 5}}))
    with pytest.raises(UserError, match="no figure named 'classes'"):
        figures.measured([], run=quickstart.RUN, zeroshot=quickstart.ZEROSHOT, retrieval=quickstart.RETRIEVAL)
