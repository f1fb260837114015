"""Lines of metrics.jsonl and evaluations.jsonl as a run writes them, and the page about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from limoe_dist.analysis.evaluated import results
from limoe_dist.analysis.examples import Examples
from limoe_dist.analysis.history import read_evaluations, read_metrics
from limoe_dist.analysis.incidents import read_incidents
from limoe_dist.analysis.report import page
from limoe_dist.analysis.routing_section import Section
from limoe_dist.analysis.summary import Facts
from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Run

AUX = ("importance", "load", "z", "local_image", "local_text", "global_image", "global_text", "mutual_information")
KEPT = [[30.0, 10.0], [60.0, 0.0], [0.0, 9.0], [0.0, 0.0]]
"""Four experts: 90 image tokens and 19 text tokens were processed."""


def metrics_line(step: int, *, blocks: Sequence[int] = (1, 3), **others: Any) -> dict[str, Any]:
    block = dict.fromkeys(AUX, 0.5) | {"kept": KEPT}
    for modality, success in (("image", 0.75), ("text", 0.875)):
        block |= {f"success_{modality}": success, f"entropy_{modality}": 1.25, f"experts_{modality}": 3}
    line: dict[str, Any] = {"step": step, "time": 1.7e9 + step, "loss": 5.25, "contrastive": 5.0, "aux": 0.25}
    line |= {"accuracy_image_to_text": 0.25, "accuracy_text_to_image": 0.5, "grad_norm": 2.0, "lr": 0.001}
    line |= {"temperature": 0.07, "pairs_per_s": 320.0, "seconds_per_step": 0.5, "memory_bytes": 2**30}
    if blocks:
        line |= {f"aux_{name}": 0.5 for name in AUX}
    return line | {"blocks": {str(number): block for number in blocks}} | others


def evaluation_line(step: int) -> dict[str, Any]:
    recall = {f"recall_at_{n}": n / 20 for n in (1, 5, 10)}
    chance = {f"recall_at_{n}": n / 1000 for n in (1, 5, 10)}
    ways = {"image_to_text": recall, "text_to_image": recall}
    chances = {f"chance_{way}": chance for way in ways}
    return {
        "step": step,
        "zeroshot": {"rows": 50, "top1": 0.42, "top5": 0.77, "chance_top1": 0.002, "chance_top5": 0.01},
        "retrieval": {"rows": 50} | ways | chances,
    }


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def page_of(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    *,
    run: Run | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
    examples: Examples | str = "none here",
    routed: Section | str = "not analysed",
) -> str:
    run = run or preset("tiny")
    history = read_metrics(write(folder / "metrics.jsonl", lines))
    evaluated = read_evaluations(write(folder / "evaluations.jsonl", evaluations))
    found = results(folder, evaluated, validation=run.data.validation)
    return page(run, history, evaluated, found, Facts("runs/first"), examples, routed, read_incidents(folder))


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
