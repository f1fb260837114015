"""What is measured of a finished run: from the lines that it logged, and from its evaluation at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.reproduction.figure import Measure
from limoe_dist.analysis.history import History, read_metrics

Column = npt.NDArray[np.float64]

TITLES: dict[Measure, str] = {
    "success_image": "image success",
    "success_text": "text success",
    "success_text_lowest": "text success, lowest block",
    "entropy_text": "text router entropy, nats",
    "text_experts": "text experts",
    "loss": "training loss, nats",
    "accuracy": "validation accuracy",
    "zeroshot_top1": "0-shot top-1",
    "zeroshot_top5": "0-shot top-5",
    "fewshot": "few-shot",
    "image_to_text": "i2t R@1",
    "text_to_image": "t2i R@1",
}
SHARES: frozenset[Measure] = frozenset(TITLES) - {"entropy_text", "text_experts", "loss"}
"""Shown in per cent."""
LOWER_IS_BETTER: frozenset[Measure] = frozenset({"loss"})

LAST = 0.2
"""Of what is logged while training, the mean over the last fifth of the steps counts."""

_IN_BLOCKS: dict[Measure, tuple[str, Callable[[Column, int], Column]]] = {
    "success_image": ("success_image", np.mean),
    "success_text": ("success_text", np.mean),
    "success_text_lowest": ("success_text", np.min),
    "entropy_text": ("entropy_text", np.mean),
    "text_experts": ("spread_text", np.mean),
}
_EVALUATED: dict[Measure, tuple[str, ...]] = {
    "accuracy": ("contrastive", "accuracy"),
    "zeroshot_top1": ("zeroshot", "top1"),
    "zeroshot_top5": ("zeroshot", "top5"),
    "image_to_text": ("retrieval", "image_to_text", "recall_at_1"),
    "text_to_image": ("retrieval", "text_to_image", "recall_at_1"),
}


def curve(folder: Path, measure: Measure) -> tuple[Column, Column] | None:
    """Steps and values, (n,) each, of what is logged while training; None where it is not, or the model is dense."""
    if measure == "loss":
        history = read_metrics(folder / "metrics.jsonl")
        return history.steps, history.column("contrastive")
    if measure not in _IN_BLOCKS:
        return None
    history = read_metrics(folder / "metrics.jsonl")
    name, over_blocks = _IN_BLOCKS[measure]
    values = [_of_block(history, folder, block, name) for block in history.blocks]
    return (history.steps, over_blocks(np.stack(values), 0)) if values else None


def _of_block(history: History, folder: Path, block: int, name: str) -> Column:
    return text_spread(folder, block) if name == "spread_text" else history.column(f"blocks.{block}.{name}")


def text_spread(folder: Path, block: int) -> Column:
    """(n,): over how many experts the served text tokens of a block spread, exp of the entropy of their shares."""
    found = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        kept_E = np.array(json.loads(line)["blocks"][str(block)]["kept"])[:, 1]
        share_E = kept_E[kept_E > 0] / max(kept_E.sum(), 1)
        found.append(float(np.exp(-(share_E * np.log(share_E)).sum())))
    return np.array(found)


def value(folder: Path, measure: Measure, *, steps: int) -> float | None:
    """One number of a run that has finished; None where the run has none, as a dense model no success rate."""
    if measure == "fewshot":
        return _few_shot(folder, steps)
    if measure in _EVALUATED:
        return _evaluated(folder, _EVALUATED[measure], steps)
    found = curve(folder, measure)
    if found is None:
        return None
    at, values = found
    last = values[(at > (1 - LAST) * steps) & np.isfinite(values)]
    return float(last.mean()) if len(last) else None


def _evaluated(folder: Path, place: tuple[str, ...], steps: int) -> float | None:
    for line in (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines():
        found: Any = json.loads(line)
        if found["step"] == steps:
            for name in place:
                found = found.get(name) if isinstance(found, dict) else None
            return None if found is None else float(found)
    return None


def _few_shot(folder: Path, steps: int) -> float | None:
    path = folder / f"eval-fewshot-{steps}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))["fewshot"]
    return float(found["accuracy"])
