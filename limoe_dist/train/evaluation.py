"""Evaluation in the middle of training: zero-shot and retrieval on shards that are never trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from limoe_dist.config.schema import Run
from limoe_dist.eval.retrieval import Retrieval, retrieval
from limoe_dist.eval.zeroshot import ZeroShot, zeroshot
from limoe_dist.model.tower import Limoe
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.inputs import Inputs


@dataclass(frozen=True)
class Evaluation:
    zeroshot: ZeroShot | None
    """None where the validation rows have no concepts to choose between."""
    retrieval: Retrieval

    def to_json(self) -> dict[str, Any]:
        """Without the examples, which `limoe eval` writes: a long run evaluates often."""
        found = {"zeroshot": self.zeroshot.to_json()} if self.zeroshot else {}
        found |= {"retrieval": self.retrieval.to_json()}
        return {task: {k: v for k, v in figures.items() if k != "examples"} for task, figures in found.items()}

    def line(self) -> str:
        """For a person who watches."""
        classes, found = self.zeroshot, self.retrieval
        parts = [
            f"retrieval R@1 image to text {found.image_to_text.at1:.1%}, text to image {found.text_to_image.at1:.1%}"
        ]
        if classes is not None:
            parts.insert(
                0,
                f"zero-shot top-1 {classes.top1:.1%} top-5 {classes.top5:.1%} "
                f"(chance {classes.chance_top1:.2%}, {classes.chance_top5:.2%})",
            )
        return "validation: " + "; ".join(parts)


def evaluate(
    model: Limoe, run: Run, inputs: Inputs, *, mesh: Mesh, device: torch.device, between: Callable[[], None]
) -> Evaluation:
    """What can be measured on data.validation. A collective; leaves the model in training mode as it was.

    between: called after each forward pass, at the same moments on all ranks: a save goes on meanwhile.
    """
    assert inputs.validation is not None
    shards, tokenizer, classes = inputs.validation, inputs.tokenizer, inputs.classes

    def progress(what: str, done: int, total: int) -> None:
        between()

    found = None
    if classes is not None:
        found = zeroshot(model, run, shards, tokenizer, mesh=mesh, device=device, classes=classes, progress=progress)
    return Evaluation(found, retrieval(model, run, shards, tokenizer, mesh=mesh, device=device, progress=progress))
