from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from limoe_dist.analysis.examples import Example, Examples, FoundText, Picture
from limoe_dist.config.parse import save_run
from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Data, Eval
from tests.analysis.lines import Parsed, evaluation_line, metrics_line, page_of, write
from tests.support.shards import write_shards

PATH = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&"
# A lone surrogate may come out of JSON; it cannot be written as UTF-8.
HOSTILE = PATH + "\ud800"
LINES = [metrics_line(step) for step in (10, 20, 30)]
EVENTS = [
    {"kind": "spike", "action": "note", "step": 12, "time": 1.7e9, "text": "step 12: the loss leaps"},
    {"kind": "non_finite", "action": "skip", "step": 14, "text": "", "first": 1000, "end": 1016},
    {"kind": "spike", "action": "rollback", "step": 33, "text": "", "first": 1016, "end": 2048, "to_step": 20},
]


def hostile_examples() -> Examples:
    picture = Picture(HOSTILE, HOSTILE, "data:image/png;base64,AAAA", right=False)
    shown = Example(HOSTILE, picture, (picture,), (FoundText(HOSTILE, right=False),))
    return Examples(20, PATH, HOSTILE, 3, 9, 9, 3, (), (shown,))


def sections(page: str) -> list[str | None]:
    return [attributes.get("id") for attributes in Parsed(page).named("section")]


def dense_page(folder: Path, *, steps: tuple[int, ...] = (10, 20, 30)) -> str:
    """A page with few curves, which take the time."""
    return page_of(folder, [metrics_line(step, blocks=()) for step in steps], run=preset("tiny-dense"))


def test_a_moe_run_has_every_section_in_order(tmp_path: Path) -> None:
    page = page_of(tmp_path, LINES, evaluations=[evaluation_line(20), evaluation_line(30)])
    moe = ["success", "routing", "auxiliary", "matrix", "analysis"]
    assert sections(page) == ["curves", *moe, "evaluation", "examples", "settings", "data"]
    # 7 curves, 2 success rates, 2 entropies, 2 of experts, 2 of text by expert, 8 auxiliary losses, 3 evaluations.
    assert len(Parsed(page).named("svg")) == 7 + 2 + 2 + 2 + 2 + 8 + 3


def test_a_dense_run_says_that_it_is_dense_instead_of_empty_boxes(tmp_path: Path) -> None:
    page = page_of(tmp_path, [metrics_line(10, blocks=())], run=preset("tiny-dense"))
    assert sections(page) == ["curves", "dense", "evaluation", "examples", "settings", "data"]
    assert "This run is dense" in Parsed(page).text
    # Six curves: there is no auxiliary loss.
    assert len(Parsed(page).named("svg")) == 6


def test_the_head_tells_what_was_trained_and_the_results_beside_chance(tmp_path: Path) -> None:
    tiny = preset("tiny")
    run = tiny.model_copy(update={"train": tiny.train.model_copy(update={"steps": 900, "batch_pairs": 128})})
    text = Parsed(page_of(tmp_path, LINES, run=run, evaluations=[evaluation_line(30)])).text
    assert "Steps 30 of 900 running, or stopped early; 3,840 pairs" in text
    # 10 steps of half a second before each of three lines.
    assert "Training time 15 s" in text
    assert "Throughput 320 pairs/s" in text
    assert "Latest loss 5.25 contrastive 5 + auxiliary 0.25" in text
    assert "Zero-shot top-1 42.0 % 0.20 %" in text
    assert "Image to text R@5 25.0 % 0.50 %" in text


def test_results_of_limoe_eval_are_shown_and_the_newest_wins(tmp_path: Path) -> None:
    for step, share in ((9, 0.111), (10, 0.222)):
        content = {"step": step, "data": "val/manifest.json", "zeroshot": {"top1": share, "chance_top1": 0.125}}
        content["pixel_nearest_neighbour"] = {"top1": 0.333}
        (tmp_path / f"eval-zeroshot-{step}.json").write_text(json.dumps(content))
    (tmp_path / "eval-retrieval-10.json").write_text("not JSON")
    text = Parsed(page_of(tmp_path, LINES)).text
    assert "limoe eval zeroshot, step 10" in text
    assert "Zero-shot top-1 22.2 % 12.5 %" in text
    assert "Nearest training picture in pixels, top-1 33.3 % 12.5 %" in text
    assert "11.1 %" not in text


def test_the_matrix_shows_the_numbers(tmp_path: Path) -> None:
    text = Parsed(page_of(tmp_path, LINES)).text
    assert "Block 1 1 image, 1 text, 1 mixed, 1 idle" in text
    # Expert 0 processed 30 of the 90 image tokens and 10 of the 19 text tokens.
    assert "0 75.0 % 25.0 % 33.3 % 52.6 % 40 mixed" in text


def test_missing_pieces_say_what_to_run(tmp_path: Path) -> None:
    text = Parsed(page_of(tmp_path, LINES, examples="run limoe report again", routed="run limoe analyze")).text
    assert "run limoe analyze" in text
    assert "limoe eval zeroshot --run runs/first --data MANIFEST" in text
    assert "Train with --data.validation MANIFEST --eval.every-steps N" in text
    assert "run limoe report again" in text
    with_validation = preset("tiny").model_copy(
        update={"data": Data(validation="nowhere/manifest.json"), "eval": Eval(every_steps=0)}
    )
    text = Parsed(page_of(tmp_path, LINES, run=with_validation)).text
    assert "eval.every_steps=0 the first comes at the end of the run" in text
    assert "nowhere/manifest.json: cannot be read" in text


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", rows=4, shards=1)
    run = preset("tiny").model_copy(update={"data": Data(manifest=str(manifest))})
    page = page_of(tmp_path, LINES, run=run, evaluations=[evaluation_line(30)], examples=hostile_examples())
    parsed = Parsed(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
    assert "url(" not in page.replace("url(#", "")
    assert "@import" not in page


def test_strangers_text_is_text(tmp_path: Path) -> None:
    hostile_run = preset("tiny").model_copy(update={"preset": PATH, "data": Data(validation=PATH)})
    (tmp_path / "eval-zeroshot-1.json").write_text(json.dumps({"data": HOSTILE, "zeroshot": {"top1": 0.5}}))
    page = page_of(tmp_path, LINES, run=hostile_run, examples=hostile_examples())
    parsed = Parsed(page)
    assert parsed.named("script") == []
    assert all((image.get("src") or "").startswith("data:") and "onerror" not in image for image in parsed.named("img"))
    assert parsed.text.count("<script>alert(1)</script>") >= 6
    page.encode("utf-8")


def test_no_two_things_have_one_id_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    page = page_of(tmp_path, LINES, evaluations=[evaluation_line(30)])
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)


def test_pictures_curves_and_tables_have_words(tmp_path: Path) -> None:
    page = page_of(tmp_path, LINES, evaluations=[evaluation_line(30)], examples=hostile_examples())
    parsed = Parsed(page)
    assert all(image.get("alt") for image in parsed.named("img"))
    assert all(drawing.get("aria-label") and drawing.get("role") == "img" for drawing in parsed.named("svg"))
    assert len(parsed.named("caption")) == len(parsed.named("table")) > 0
    assert parsed.named("html") == [{"lang": "en"}]
    assert len(parsed.named("h1")) == 1


def test_data_sources_are_named_with_their_licences(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", rows=4, shards=1)
    run = preset("tiny").model_copy(update={"data": Data(manifest=str(manifest))})
    text = Parsed(page_of(tmp_path, LINES, run=run)).text
    assert f"Training: 4 pairs {manifest}" in text
    assert "generated 4 CC0-1.0" in text


def test_settings_other_than_the_preset_s_stand_out(tmp_path: Path) -> None:
    run = preset("tiny")
    run = run.model_copy(update={"train": run.train.model_copy(update={"seed": 17})})
    assert "train.seed 17 0" in Parsed(page_of(tmp_path, LINES, run=run)).text
    assert "All as in preset tiny" in Parsed(page_of(tmp_path, LINES)).text


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    lines = [*LINES, metrics_line(40, contrastive=float("inf"), loss=float("nan"))]
    text = Parsed(page_of(tmp_path, lines)).text
    assert "Infinite in 1 log lines, which are left out." in text
    assert "Latest loss nan" in text


@pytest.mark.parametrize("count", [1, 3, 5000])
def test_the_page_stays_small_for_any_number_of_lines(tmp_path: Path, count: int) -> None:
    page = page_of(tmp_path, [metrics_line(step, contrastive=step % 7) for step in range(1, count + 1)])
    assert 50_000 < len(page) < 1_000_000


def test_what_the_guard_did_is_a_table_and_lines_in_the_loss_curve(tmp_path: Path) -> None:
    write(tmp_path / "guard.jsonl", EVENTS)
    page = dense_page(tmp_path)
    text = Parsed(page).text.replace("\N{EN DASH}", "-")
    assert sections(page)[:2] == ["curves", "guard"]
    # In the order of the columns: noted, left out, went back, stopped.
    assert "Not finite - 1 - - Spike 1 - 1 -" in text
    assert "Collapse" not in text
    assert "12 2023-11-14 22:13:20 spike the loss leaps noted - -" in text
    assert "33 unknown spike went back 1,016 to 2,047 20" in text
    assert "1,048 pairs of the data order are passed over" in text
    loss = Parsed(page).named("svg")[0]["aria-label"] or ""
    assert loss.endswith("noted: at step 12; left out: at step 14; went back: at step 33.")
    assert "Upright lines: what the guard did" in text


def test_a_run_that_its_guard_stopped_after_many_events_says_so(tmp_path: Path) -> None:
    write(tmp_path / "guard.jsonl", [EVENTS[0] | {"step": step} for step in range(1, 1001)])
    (tmp_path / "ended.json").write_text(json.dumps({"step": 1000, "signal": 0, "status": 3}))
    page = dense_page(tmp_path, steps=(500, 990))
    text = Parsed(page).text
    assert "stopped by its guard; " in text
    assert "The guard stopped the run" in text
    assert "the newest 50 of 1,000; guard.jsonl has all" in text
    assert "what the guard did (of each action the newest 8), see below" in text
    # Steps after the last line of metrics are marked as far as the next line would cover them.
    assert "noted: at 8 steps from 993 to 1,000." in (Parsed(page).named("svg")[0]["aria-label"] or "")
    assert len(page) < 1_000_000


def test_a_run_without_events_says_so(tmp_path: Path) -> None:
    save_run(preset("tiny"), tmp_path / "run.json")
    page = dense_page(tmp_path)
    text = Parsed(page).text
    assert "No events: the guard found nothing to do or to note ( guard.non_finite=skip , guard.spike=note" in text
    assert "Events by kind" not in text
    assert "Faults" not in text
    assert "Upright lines" not in text


def test_faults_are_told_by_host_and_what_they_say_is_text(tmp_path: Path) -> None:
    write(tmp_path / "guard.jsonl", [EVENTS[0] | {"text": HOSTILE}, EVENTS[0] | {"kind": HOSTILE}])
    hosts = (["n2"], ["n2"], [HOSTILE], [])
    faults = [{"kind": "hang", "hosts": names, "text": "no answer", "time": 1.7e9} for names in hosts]
    write(tmp_path / "faults.jsonl", [*faults, {"kind": "broken", "hosts": ["n1"], "text": HOSTILE}])
    page = dense_page(tmp_path)
    parsed = Parsed(page)
    assert "5 faults over all starts of the run" in parsed.text
    assert "n2 stood still 2 2023-11-14 22:13:20 no answer" in parsed.text
    assert "not known stood still 1" in parsed.text
    assert parsed.named("script") == parsed.named("img") == []
    assert parsed.text.count("<script>alert(1)</script>") == 3
    assert "1 line of guard.jsonl could not be read" in parsed.text
    assert len(parsed.named("caption")) == len(parsed.named("table"))
    page.encode("utf-8")


def test_the_throughput_is_the_median_of_the_lines(tmp_path: Path) -> None:
    rates = {10: 100.0, 20: 900.0, 30: 300.0}
    lines = [metrics_line(step, blocks=(), pairs_per_s=rate) for step, rate in rates.items()]
    page = page_of(tmp_path, lines, run=preset("tiny-dense"))
    assert "Throughput 300 pairs/s" in Parsed(page).text
