"""Evaluation in the middle of training: zero-shot, retrieval and contrastive accuracy on shards never trained on.

All three share one embedding of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from limoe_dist.config.schema import Run
from limoe_dist.eval.contrastive import Contrastive, contrastive_of
from limoe_dist.eval.embed import Embedder
from limoe_dist.eval.retrieval import Retrieval, retrieval_of
from limoe_dist.eval.zeroshot import ZeroShot, zeroshot_of
from limoe_dist.model.tower import Limoe
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.inputs import Inputs


@dataclass(frozen=True)
class Evaluation:
    zeroshot: ZeroShot | None
    """None where the validation rows have no concepts to choose between."""
    retrieval: Retrieval | None
    contrastive: Contrastive | None
    """None where no validation row has both a picture and a caption."""

    def to_json(self) -> dict[str, Any]:
        """Without the examples, which `limoe eval` writes: a long run evaluates often."""
        results = {"zeroshot": self.zeroshot, "retrieval": self.retrieval, "contrastive": self.contrastive}
        found = {task: result.to_json() for task, result in results.items() if result is not None}
        return {task: {k: v for k, v in figures.items() if k != "examples"} for task, figures in found.items()}

    def line(self) -> str:
        """For a person who watches."""
        parts = []
        if (classes := self.zeroshot) is not None:
            parts.append(
                f"zero-shot top-1 {classes.top1:.1%} top-5 {classes.top5:.1%} "
                f"(chance {classes.chance_top1:.2%}, {classes.chance_top5:.2%})"
            )
        if (found := self.retrieval) is not None:
            recalls = f"image to text {found.image_to_text.at1:.1%}, text to image {found.text_to_image.at1:.1%}"
            parts.append(f"retrieval R@1 {recalls}")
        if (pairs := self.contrastive) is not None:
            parts.append(f"contrastive accuracy {pairs.accuracy:.1%} in {pairs.minibatch} pairs")
        return "validation: " + ("; ".join(parts) or "no row has a concept or a caption beside its picture")


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

    embedder = Embedder(model, run, shards, tokenizer, mesh=mesh, device=device, progress=progress)
    pairs = embedder.rows.pairs > 0
    return Evaluation(
        zeroshot=zeroshot_of(embedder, classes=classes) if classes is not None else None,
        retrieval=retrieval_of(embedder) if pairs else None,
        contrastive=contrastive_of(embedder) if pairs else None,
    )
