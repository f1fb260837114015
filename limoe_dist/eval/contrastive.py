"""Contrastive accuracy in minibatches: the validation accuracy of LIMoE's Table 3 (minibatches of 1,024 pairs).

In a minibatch each picture chooses among its texts and each text among its pictures. Pairs go into minibatches in the
order of the manifest (`limoe prep pack` shuffles), whatever the number of ranks; the last incomplete one is left out.

Shapes: R pairs, n pairs of a minibatch, P embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.eval.embed import Embedder, Progress, silent
from limoe_dist.eval.ranking import nearest_keys
from limoe_dist.eval.retrieval import texts_of_pictures, usable_pairs
from limoe_dist.eval.rows import check_pairs
from limoe_dist.model.tower import Limoe
from limoe_dist.parallel.mesh import Mesh

RULE = (
    "Each picture chooses among the first captions of its minibatch, and each caption among the pictures. "
    "A caption equal to the right one, after NFKC, lower case and white space, is right too."
)


@dataclass(frozen=True)
class Contrastive:
    image_to_text: float
    text_to_image: float
    """Shares of the rows, 0 to 1, whose first choice is right."""
    chance: float
    """What guessing gives, in either direction."""
    minibatch: int
    """Pairs of a minibatch: what was asked for, or all rows where there are fewer."""
    asked: int
    minibatches: int
    rows: int
    """Pairs that were counted: minibatch * minibatches."""
    left_out: int
    """Pairs of the last, incomplete minibatch."""
    bad_rows: int
    """Rows whose picture could not be decoded."""
    pictureless_rows: int
    uncaptioned_rows: int
    capacity: str
    """moe.eval_capacity; with "paper", embeddings depend on the batch that they are in."""

    @property
    def accuracy(self) -> float:
        """The mean of both directions."""
        return (self.image_to_text + self.text_to_image) / 2

    def to_json(self) -> dict[str, Any]:
        figures = dict(vars(self))
        return {
            "rule": RULE,
            "image_to_text": figures.pop("image_to_text"),
            "text_to_image": figures.pop("text_to_image"),
            "accuracy": self.accuracy,
            "chance": figures.pop("chance"),
            "minibatch": figures.pop("minibatch"),
            "asked_minibatch": figures.pop("asked"),
            "left_out_rows": figures.pop("left_out"),
            **figures,
        }


def contrastive(
    model: Limoe,
    run: Run,
    shards: ShardSet,
    tokenizer: Tokenizer,
    *,
    mesh: Mesh,
    device: torch.device,
    progress: Progress = silent,
) -> Contrastive:
    """Accuracy in minibatches of eval.minibatch pairs; the same result on every rank. A collective over all ranks.

    Raises UserError where no row has a caption and a picture that can be decoded, or an embedding is not finite.
    """
    return contrastive_of(Embedder(model, run, shards, tokenizer, mesh=mesh, device=device, progress=progress))


def contrastive_of(embedder: Embedder) -> Contrastive:
    """As `contrastive`, with the embeddings that other tasks may have asked for already."""
    rows, run = embedder.rows, embedder.run
    check_pairs(rows, needed_by="contrastive accuracy")
    used = usable_pairs(embedder)
    carried = texts_of_pictures([rows.captions[number][:1] for number in used])
    text_XP = embedder.texts(carried.texts)
    text_R = carried.first_R.to(embedder.device)
    image_RP = embedder.pictures.image_RP[torch.tensor(used, device=embedder.device)]
    minibatch = min(run.eval.minibatch, len(used))
    counted = len(used) // minibatch * minibatch
    found = accuracy_in_minibatches(image_RP[:counted], text_XP[text_R[:counted]], text_R[:counted], minibatch)
    return Contrastive(
        image_to_text=found[0],
        text_to_image=found[1],
        chance=_chance(carried.first_R[:counted].tolist(), minibatch),
        minibatch=minibatch,
        asked=run.eval.minibatch,
        minibatches=counted // minibatch,
        rows=counted,
        left_out=len(used) - counted,
        bad_rows=embedder.undecodable(),
        pictureless_rows=rows.pictureless,
        uncaptioned_rows=rows.uncaptioned,
        capacity=run.moe.eval_capacity,
    )


def accuracy_in_minibatches(image_RP: Tensor, text_RP: Tensor, label_R: Tensor, minibatch: int) -> tuple[float, float]:
    """Image to text, and text to image: shares of the R pairs that choose a partner of their own label first.

    label_R: (R,) int64, equal where texts are. minibatch: n, divides R.
    """
    right = torch.zeros(2, dtype=torch.int64, device=image_RP.device)
    for image_nP, text_nP, label_n in zip(
        image_RP.split(minibatch), text_RP.split(minibatch), label_R.split(minibatch), strict=True
    ):
        right[0] += (label_n[nearest_keys(image_nP, text_nP, 1)[:, 0]] == label_n).sum()
        right[1] += (label_n[nearest_keys(text_nP, image_nP, 1)[:, 0]] == label_n).sum()
    image_to_text, text_to_image = (right.double() / len(image_RP)).tolist()
    return image_to_text, text_to_image


def _chance(label_R: Sequence[int], minibatch: int) -> float:
    """Of a minibatch, a text that n pairs carry is right for those n, so that guessing finds it n times in n."""
    starts = range(0, len(label_R), minibatch)
    hits = sum(times**2 for start in starts for times in Counter(label_R[start : start + minibatch]).values())
    return hits / (minibatch * len(label_R))
