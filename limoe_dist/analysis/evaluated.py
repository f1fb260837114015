"""The figures of a run's evaluations beside what guessing gives: those in training, and those of `limoe eval`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limoe_dist.analysis.history import History

_WAYS = (("image_to_text", "Image to text"), ("text_to_image", "Text to image"))


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    chance: float | None
    """Shares, 0 to 1."""


@dataclass(frozen=True)
class Result:
    title: str
    figures: tuple[Figure, ...]
    step: int
    data: str
    rows: int


def results(folder: Path, evaluations: History | None, *, validation: str) -> tuple[Result, ...]:
    """The last evaluation in training, and the newest of each task that `limoe eval` left in the run's directory."""
    found = []
    if evaluations is not None:
        last = evaluations.last
        figures = (*zeroshot_figures(last), *retrieval_figures(last), *contrastive_figures(last))
        if figures:
            rows = next(filter(None, (_object(last, task).get("rows") for task in ("retrieval", "zeroshot"))), 0)
            found.append(Result("During training", figures, int(last["step"]), validation, _whole(rows)))
    for task, figures_of in (
        ("zeroshot", zeroshot_figures),
        ("retrieval", retrieval_figures),
        ("contrastive", contrastive_figures),
        ("fewshot", fewshot_figures),
    ):
        content = _newest(folder, task)
        figures = figures_of(content)
        if figures:
            rows = _object(content, task).get("rows")
            title = f"limoe eval {task}"
            found.append(Result(title, figures, _whole(content.get("step")), str(content.get("data")), _whole(rows)))
    return tuple(found)


def zeroshot_figures(content: dict[str, Any]) -> tuple[Figure, ...]:
    """Of an object with "zeroshot", and maybe "pixel_nearest_neighbour"."""
    of, pixels = _object(content, "zeroshot"), _object(content, "pixel_nearest_neighbour")
    figures = [_figure(f"Zero-shot top-{n}", of.get(f"top{n}"), of.get(f"chance_top{n}")) for n in (1, 5)]
    figures += [
        _figure(f"Nearest training picture in pixels, top-{n}", pixels.get(f"top{n}"), of.get(f"chance_top{n}"))
        for n in (1, 5)
    ]
    return tuple(figure for figure in figures if figure is not None)


def retrieval_figures(content: dict[str, Any]) -> tuple[Figure, ...]:
    """Of an object with "retrieval"."""
    of = _object(content, "retrieval")
    figures = [
        _figure(f"{name} R@{n}", _object(of, way).get(at), _object(of, f"chance_{way}").get(at))
        for way, name in _WAYS
        for n in (1, 5, 10)
        for at in (f"recall_at_{n}",)
    ]
    return tuple(figure for figure in figures if figure is not None)


def contrastive_figures(content: dict[str, Any]) -> tuple[Figure, ...]:
    """Of an object with "contrastive"."""
    of = _object(content, "contrastive")
    figure = _figure(f"Contrastive accuracy among {_whole(of.get('minibatch'))}", of.get("accuracy"), of.get("chance"))
    return () if figure is None else (figure,)


def fewshot_figures(content: dict[str, Any]) -> tuple[Figure, ...]:
    """Of an object with "fewshot"."""
    of = _object(content, "fewshot")
    figure = _figure(f"{_whole(of.get('shots'))}-shot, linear", of.get("accuracy"), of.get("chance"))
    return () if figure is None else (figure,)


def _newest(folder: Path, task: str) -> dict[str, Any]:
    """What `limoe eval` wrote for the latest step; empty where there is nothing that can be read."""
    files = [path for path in folder.glob(f"eval-{task}-*.json") if path.stem.rpartition("-")[2].isdecimal()]
    if not files:
        return {}
    try:
        content = json.loads(max(files, key=lambda path: int(path.stem.rpartition("-")[2])).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _figure(name: str, value: object, chance: object) -> Figure | None:
    share, guess = _share(value), _share(chance)
    return None if share is None else Figure(name, share, guess)


def _share(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _object(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
