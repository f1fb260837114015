"""Evaluation in the middle of training: zero-shot and retrieval on shards that are never trained on."""

from __future__ import annotations

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
    zeroshot: ZeroShot
    retrieval: Retrieval

    def to_json(self) -> dict[str, Any]:
        return {"zeroshot": self.zeroshot.to_json(), "retrieval": self.retrieval.to_json()}

    def line(self) -> str:
        """For a person who watches."""
        zeroshot, retrieval = self.zeroshot, self.retrieval
        return (
            f"validation: zero-shot top-1 {zeroshot.top1:.1%} top-5 {zeroshot.top5:.1%} "
            f"(chance {zeroshot.chance_top1:.2%}, {zeroshot.chance_top5:.2%}); "
            f"retrieval R@1 image to text {retrieval.image_to_text.at1:.1%}, text to image {retrieval.text_to_image.at1:.1%}"
        )


def evaluate(model: Limoe, run: Run, inputs: Inputs, *, mesh: Mesh, device: torch.device) -> Evaluation:
    """Both tasks over data.validation. A collective; leaves the model in training mode as it was."""
    assert inputs.validation is not None
    return Evaluation(
        zeroshot=zeroshot(model, run, inputs.validation, inputs.tokenizer, mesh=mesh, device=device, classes=None),
        retrieval=retrieval(model, run, inputs.validation, inputs.tokenizer, mesh=mesh, device=device),
    )
