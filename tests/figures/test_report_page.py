"""Tables and sentences of the report as a reader sees them, from files in which no two numbers are alike."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from limoe_dist.analysis import report
from limoe_dist.analysis.evaluated import Figure, results
from limoe_dist.analysis.examples import Examples
from limoe_dist.analysis.history import History, read_evaluations, read_metrics
from limoe_dist.analysis.incidents import read_incidents
from limoe_dist.analysis.routing_record import (
    RANK_BINS,
    Analysis,
    BlockRouting,
    ExpertRouting,
    ModalityRouting,
    PieceCount,
    Ranks,
)
from limoe_dist.analysis.routing_section import Section, section
from limoe_dist.analysis.summary import Facts, Tile, duration, tiles
from limoe_dist.config.schema import Data, Model, Moe, Parallel, Run, Train
from tests.support.shards import write_shards

DASH = "\N{EN DASH}"
RUN = Run(
    preset="tiny",
    train=Train(steps=40, batch_pairs=64),
    model=Model(depth=4, heads=3),
    moe=Moe(blocks=(1, 3), num_experts=4, group_pairs=16),
)
# Image and text tokens that each of 4 experts kept, a step.
KEPT = [[30.0, 10.0], [1260.0, 4.0], [0.0, 66.0], [1.0, 0.0]]
LINES = [
    {"step": 10, "contrastive": 5.0, "blocks": {}},
    {
        **{"step": 20, "time": 1.7e9, "loss": 5.25, "contrastive": 5.0, "aux": 0.25, "pairs_per_s": 300.0},
        **{"seconds_per_step": 2.0, "blocks": {"3": {"kept": KEPT}}},
    },
]


class Tables(HTMLParser):
    """Rows of cells of each table, by its caption; and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self._caption = ""
        self._inside: list[str] = []
        self._row: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("caption", "td", "th"):
            self._inside = []
        if tag == "tr":
            self._row = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._caption = " ".join("".join(self._inside).split())
            self.rows[self._caption] = []
        if tag in ("td", "th"):
            self._row.append(" ".join("".join(self._inside).split()))
        if tag == "tr":
            self.rows[self._caption].append(self._row)

    def handle_data(self, data: str) -> None:
        self._inside.append(data)
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(autouse=True)
def _without_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have words of their own (test_curves.py), and take the time."""
    monkeypatch.setattr(report, "svg", lambda panel, prefix: "<svg></svg>")
    for name in ("text_shares_svg", "image_shares_svg", "ranks_svg"):
        monkeypatch.setattr(report.routing_plots, name, lambda *of, **others: "<svg></svg>")


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def page_of(
    folder: Path,
    *,
    run: Run = RUN,
    metrics: list[Any] = LINES,
    evaluations: list[Any] | None = None,
    examples: Examples | str = "no examples",
    routed: Section | str = "not analysed",
) -> Tables:
    history = read_metrics(write(folder / "metrics.jsonl", metrics))
    evaluated = read_evaluations(write(folder / "evaluations.jsonl", evaluations)) if evaluations else None
    found = results(folder, evaluated, validation="val/manifest.json")
    facts = Facts("runs/first")
    return Tables(report.page(run, history, evaluated, found, facts, examples, routed, read_incidents(folder)))


def test_experts_by_modality(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    # 1,291 image and 80 text tokens. Expert 0: 30 / 40, 10 / 40, 30 / 1,291 = 2.32 %, 10 / 80. Expert 1: 1,260 / 1,264
    # = 99.68 %, 4 / 1,264 = 0.32 %, 1,260 / 1,291 = 97.60 %, 4 / 80. Expert 3: 1 / 1,291 = 0.08 %, of an even part of
    # 1,371 / 4 = 343 tokens less than 5 %: 17.1.
    assert page.rows["Block 3 1 image, 1 text, 1 mixed, 1 idle"] == [
        ["Expert", "Image share", "Text share", "Of all image", "Of all text", "Tokens a step", "Takes"],
        ["0", "75.0 %", "25.0 %", "2.3 %", "12.5 %", "40", "mixed"],
        ["1", "99.7 %", "0.3 %", "97.6 %", "5.0 %", "1,264", "image"],
        ["2", "0.0 %", "100.0 %", "0.0 %", "82.5 %", "66", "text"],
        ["3", "100.0 %", "0.0 %", "0.1 %", "0.0 %", "1", "idle"],
    ]
    assert "mean over the steps up to 20 that the last log line covers" in page.text
    assert "Of 4: experts that get at least half" in page.text
    assert "tiny: 20 steps" in page.text
    assert "could not be read" not in page.text


def test_kinds_of_experts_are_counted_by_kind(tmp_path: Path) -> None:
    # 3 of images, none of texts, 1 mixed, 2 idle.
    kept = [[90.0, 1.0], [91.0, 0.0], [92.0, 0.0], [50.0, 49.0], [1.0, 0.0], [0.0, 1.0]]
    page = page_of(tmp_path, metrics=[{"step": 1, "blocks": {"1": {"kept": kept}}}])
    assert "Block 1 3 image, 0 text, 1 mixed, 2 idle" in page.rows


def test_lines_that_could_not_be_read_are_counted(tmp_path: Path) -> None:
    page = page_of(tmp_path, metrics=["cut\n", "[]\n", *LINES, '{"step": 3'])
    assert "3 lines of metrics.jsonl could not be read" in page.text


EVALUATION = {
    "step": 17,
    "zeroshot": {"rows": 1050, "top1": 0.4249, "top5": 0.0049, "chance_top1": 0.00205, "chance_top5": 0.01},
    "retrieval": {"rows": 1048, "image_to_text": {"recall_at_1": 0.5}},
}


def test_a_table_of_evaluations_has_results_beside_their_chance(tmp_path: Path) -> None:
    (tmp_path / "eval-fewshot-9.json").write_text(
        json.dumps({"step": 9, "data": "d.json", "fewshot": {"rows": 77, "shots": 10, "accuracy": 0.25, "chance": 0.1}})
    )
    pixels = {"pixel_nearest_neighbour": {"top1": 0.5, "top5": 0.75}}
    (tmp_path / "eval-zeroshot-1200.json").write_text(
        json.dumps({"step": 1200, "data": "z.json", "zeroshot": EVALUATION["zeroshot"]} | pixels)
    )
    page = page_of(tmp_path, evaluations=[EVALUATION | {"step": 7}, EVALUATION])
    head = ["Evaluation", "Result", "Chance"]
    # Below 1 % with two decimals, else with one.
    zeroshot = [["Zero-shot top-1", "42.5 %", "0.21 %"], ["Zero-shot top-5", "0.49 %", "1.0 %"]]
    during = page.rows["During training, step 17 1,048 pictures of val/manifest.json"]
    assert during == [head, *zeroshot, ["Image to text R@1", "50.0 %", DASH]]
    assert page.rows["limoe eval fewshot, step 9 77 pictures of d.json"] == [
        head,
        ["10-shot, linear", "25.0 %", "10.0 %"],
    ]
    assert page.rows["limoe eval zeroshot, step 1,200 1,050 pictures of z.json"] == [
        head,
        *zeroshot,
        ["Nearest training picture in pixels, top-1", "50.0 %", "0.21 %"],
        ["Nearest training picture in pixels, top-5", "75.0 %", "1.0 %"],
    ]


def event(kind: str, action: str, step: int, **others: Any) -> dict[str, Any]:
    return {"kind": kind, "action": action, "step": step, "time": 1.7e9, "text": f"step {step}: it leaps"} | others


def test_what_the_guard_did_is_counted_by_kind_and_action(tmp_path: Path) -> None:
    spans = ({"first": 100, "end": 116}, {"first": 1000, "end": 2000, "to_step": 1500}, {"first": 1984, "end": 2016})
    events = [
        *(event("spike", "note", step) for step in (1, 2, 3)),
        event("spike", "skip", 1234, **spans[0]),
        event("spike", "rollback", 4, **spans[1]),
        event("non_finite", "skip", 5, **spans[2]),
        event("non_finite", "skip", 6),
        event("collapse", "stop", 7),
    ]
    write(tmp_path / "guard.jsonl", events)
    page = page_of(tmp_path)
    assert page.rows["Events by kind"] == [
        ["Kind", "Noted", "Left out", "Went back", "Stopped"],
        ["Not finite", DASH, "2", DASH, DASH],
        ["Spike", "3", "1", "1", DASH],
        ["Collapse", DASH, DASH, DASH, "1"],
    ]
    _, *rows = page.rows["Events as they happened"]
    when = "2023-11-14 22:13:20"
    assert rows[2:6] == [
        ["3", when, "spike", "it leaps", "noted", DASH, DASH],
        ["1,234", when, "spike", "it leaps", "left out", "100 to 115", DASH],
        ["4", when, "spike", "it leaps", "went back", "1,000 to 1,999", "1,500"],
        ["5", when, "not finite", "it leaps", "left out", "1,984 to 2,015", DASH],
    ]
    assert len(rows) == 8
    # 16 positions, and 1,000 to 2,015.
    assert "In all, 1,032 pairs of the data order are passed over." in page.text


def test_faults_are_counted_by_host_and_kind(tmp_path: Path) -> None:
    def fault(kind: str, *hosts: str) -> dict[str, Any]:
        return {"kind": kind, "hosts": list(hosts), "time": 1.7e9, "text": "no answer"}

    # 6 lines; that of two hosts counts for both.
    faults = [fault("hang", "n1"), *[fault("hang", "n2", "n1")] * 2, fault("broken", "n1"), fault("hang", "n1")]
    write(tmp_path / "faults.jsonl", [*faults, fault("failed")])
    _, *rows = page_of(tmp_path).rows["6 faults over all starts of the run"]
    assert [(row[0], row[1], row[2]) for row in rows] == [
        ("n1", "stood still", "4"),
        ("n2", "stood still", "2"),
        ("n1", "died, or lost a connection", "1"),
        ("not known", "raised an exception", "1"),
    ]
    write(tmp_path / "faults.jsonl", [fault("hang", f"n{number}") for number in range(1023)])
    caption = (
        "1,023 faults over all starts of the run the 20 most frequent of 1,023 kinds and hosts; faults.jsonl has all"
    )
    assert len(page_of(tmp_path).rows[caption]) == 21


def routing(**others: Any) -> ModalityRouting:
    ranks = Ranks(median=0.31, lower_quartile=0.21, upper_quartile=0.41, histogram=(1.0,) + (0.0,) * (RANK_BINS - 1))
    given = {
        **{"requested": 800, "kept": 620, "success_rate": 0.775, "effective_experts": 2.345},
        **{"effective_experts_by_gates": 3.456, "used_experts": 5, "soft_minimum": 6.5, "soft_minimum_trained": True},
    }
    return ModalityRouting(**(given | {"ranks": ranks} | others))


def test_the_analysis_of_a_checkpoint(tmp_path: Path) -> None:
    def expert(number: int, texts: int, kind: str, *pieces: PieceCount) -> ExpertRouting:
        shares = {"image_frac": 0.25, "of_images_frac": 0.35, "of_texts_frac": texts / 1000}
        return ExpertRouting.model_validate(
            {"expert": number, "image_tokens": 50, "text_tokens": texts, "kind": kind, "pieces": pieces} | shares
        )

    bear = PieceCount(piece="bear", count=1234, of_piece_frac=0.5, lift=2.25)
    cat = PieceCount(piece="cat", count=17, of_piece_frac=0.75, lift=10.0)
    # 9 experts with text, of which 8 are listed, those with the most text first; and one without.
    experts = [expert(number, 101 + number, "mixed", cat) for number in range(7)]
    experts += [expert(7, 7, "text", cat), expert(8, 333, "text", bear, cat), expert(9, 0, "idle")]
    off = {"soft_minimum": 9.0, "soft_minimum_trained": False, "ranks": None, "used_experts": 2}
    found = Analysis(
        run="r",
        preset="tiny",
        step=1500,
        data="val/manifest.json",
        modalities=("image", "text"),
        rows=1024,
        rows_of=2048,
        bad_rows=3,
        left_over_rows=5,
        groups=64,
        group_pairs=16,
        num_experts=10,
        top_k=1,
        capacity=12,
        capacity_factor=1.05,
        order="priority",
        blocks={"3": BlockRouting(image=routing(), text=routing(**off, success_rate=0.5), experts=tuple(experts))},
    )
    shown = section(tmp_path / "analysis-1500.json", found)
    page = page_of(tmp_path, routed=shown)
    assert "The checkpoint of step 1,500 routed 1,024 of the 2,048 rows of" in page.text
    assert "in 64 groups of 16, as in training but without noise and augmentation: an expert has 12 slots" in page.text
    assert "(capacity factor 1.05)" in page.text
    caption = "By block soft minimum: exp(\N{GREEK SMALL LETTER TAU}) of the global entropy loss"
    assert page.rows[caption][1:] == [
        ["3", "image", "77.5 %", "2.35", "3.46", "5", "6.5", "0.31"],
        ["3", "text", "50.0 %", "2.35", "3.46", "2", "9 (off)", DASH],
    ]
    assert shown.blocks[0].kinds == "2 text, 7 mixed, 1 idle"
    _, *rows = page.rows["Block 3 and 1 experts with fewer text tokens"]
    lift = "\N{MULTIPLICATION SIGN}"
    assert rows[0] == ["8", "33.3 %", f"bear 1,234 · 2.2{lift} cat 17 · 10.0{lift}"]
    assert [row[0] for row in rows] == ["8", "6", "5", "4", "3", "2", "1", "0"]


def test_example_retrievals_say_how_much_was_searched(tmp_path: Path) -> None:
    figures = (Figure("Image to text R@1", 0.125, 0.0025),)
    examples = Examples(1500, "val.json", "role", 1003, 1007, 1009, 991, figures, ())
    page = page_of(tmp_path, examples=examples)
    assert "The checkpoint of step 1,500 searched 1,003 of the 1,009 pictures of" in page.text
    assert "and their 991 different texts" in page.text
    assert "Only its first 1,007 rows were read." in page.text
    assert page.rows["Retrieval on this data step 1,500"][1:] == [["Image to text R@1", "12.5 %", "0.25 %"]]


def test_pairs_of_the_data_are_counted_by_source(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards", rows=12, shards=1)
    content = json.loads(manifest.read_text())
    assert [source["rows"] for source in content["sources"]] == [12]
    content["sources"].append(content["sources"][0] | {"name": "other", "rows": 5})
    content["sources"][0]["rows"] = 7
    manifest.write_text(json.dumps(content))
    page = page_of(tmp_path, run=RUN.model_copy(update={"data": Data(manifest=str(manifest))}))
    _, *rows = page.rows[f"Training: 12 pairs {manifest}"]
    assert [row[1] for row in rows] == ["7", "5"]


def head(history: History, **settings: Any) -> dict[str, Tile]:
    facts = Facts("runs/first", parameters=settings.pop("parameters", None), world=settings.pop("world", None))
    stopped = settings.pop("stopped", False)
    return {tile.name: tile for tile in tiles(RUN.model_copy(update=settings), history, facts, stopped=stopped)}


def test_the_head_of_a_run_that_has_not_ended(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "seconds_per_step": 360.0, "pairs_per_s": 5000.0},
        {
            "step": 30,
            "seconds_per_step": 7200.0,
            "pairs_per_s": None,
            "loss": 2.71828,
            "contrastive": 2.5,
            "aux": 0.21828,
        },
    ]
    history = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    found = head(history, parameters=2_345_678_901, world=12, parallel=Parallel(tp=3, ep=4))
    assert (found["Steps"].value, found["Steps"].note) == ("30 of 40", "running, or stopped early; 1,920 pairs")
    assert (found["Latest loss"].value, found["Latest loss"].note) == ("2.718", "contrastive 2.5 + auxiliary 0.2183")
    # 10 * 360 s + 20 * 7,200 s = 147,600 s = 41 h.
    assert found["Training time"].value == "41 h 0 min"
    assert found["Throughput"].value == "5,000 pairs/s"
    assert found["Parameters"].value == "2.35 B"
    times = "\N{MULTIPLICATION SIGN}"
    assert (found["Ranks"].value, found["Ranks"].note) == ("12", f"dp 4 {times} tp 3; experts edp 3 {times} ep 4")
    assert found["Preset"].note == "4 experts in 2 of 4 blocks, top-1"
    assert head(history, stopped=True)["Steps"].note.startswith("stopped by its guard;")
    assert head(history, train=Train(steps=30, batch_pairs=64))["Steps"].note.startswith("finished;")
    assert "Final loss" in head(history, train=Train(steps=30, batch_pairs=64))


@pytest.mark.parametrize(
    ("number", "text"),
    [(999_999, "999,999"), (1_000_000, "1 M"), (12_345_678, "12.3 M"), (10**9, "1 B"), (None, "unknown")],
)
def test_parameters_are_counted_in_millions_and_billions(tmp_path: Path, number: int | None, text: str) -> None:
    history = read_metrics(write(tmp_path / "metrics.jsonl", [{"step": 1}]))
    assert head(history, parameters=number)["Parameters"].value == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        # 3 h, 2 min and 59 s.
        (10_979, "3 h 2 min"),
        # 47 h 59 min, and 51 h.
        (172_799, "47 h 59 min"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_of_the_head(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "percent", "tenths"),
    [
        (0.00994, "0.99 %", "1.0 %"),
        (0.01, "1.0 %", "1.0 %"),
        (0.0996, "10.0 %", "10.0 %"),
        (0.12345, "12.3 %", "12.3 %"),
        (0.0, "0.00 %", "0.0 %"),
        (1.0, "100.0 %", "100.0 %"),
        (None, DASH, DASH),
    ],
)
def test_shares_are_shown_as_percent(share: float | None, percent: str, tenths: str) -> None:
    assert (report.percent(share), report.tenths(share)) == (percent, tenths)
