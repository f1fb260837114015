"""Retrieval: finds a picture's text among all texts, and a text's picture among all pictures.

Each picture's text is its first caption. Captions that the tokenizer's normalisation (NFKC, lower case, white space)
makes equal are ONE text: a picture's right answer is the text that it carries, and a text's right answers are all
pictures that carry it. Without this rule a model would be marked wrong for a caption that is equal to the right one.

Shapes: R pictures, X texts, P embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import Tokenizer, normalised
from limoe_dist.eval.embed import Progress, embed_pictures, embed_texts, silent
from limoe_dist.eval.ranking import chance_frac, evenly_spread, hit_fracs, nearest_keys
from limoe_dist.model.tower import Limoe
from limoe_dist.parallel.mesh import Mesh

RULE = (
    "A picture's text is its first caption; captions equal after NFKC, lower case and white space are one text. "
    "Right for a picture: its text. Right for a text: every picture that carries it."
)
COUNTS = (1, 5, 10)


@dataclass(frozen=True)
class Recall:
    """Shares of the queries, 0 to 1, with a right answer among their first 1, 5 and 10."""

    at1: float
    at5: float
    at10: float

    def to_json(self) -> dict[str, float]:
        return {"recall_at_1": self.at1, "recall_at_5": self.at5, "recall_at_10": self.at10}


@dataclass(frozen=True)
class Found:
    """One picture, its text, and what each found first."""

    row: int
    key: str
    text: str
    texts: tuple[str, ...]
    """Up to five texts that the picture found, best first."""
    rows: tuple[int, ...]
    """Up to five rows of pictures that the text found, best first."""


@dataclass(frozen=True)
class Retrieval:
    rows: int
    """Pictures: each good row with a caption, once."""
    texts: int
    """Distinct texts."""
    image_to_text: Recall
    text_to_image: Recall
    chance_image_to_text: Recall
    chance_text_to_image: Recall
    """What a random order gives."""
    bad_rows: int
    """Rows whose picture could not be decoded."""
    uncaptioned_rows: int
    """Rows without a caption."""
    capacity: str
    """moe.eval_capacity; with "paper", embeddings depend on the batch that they are in."""
    examples: tuple[Found, ...]
    """Some of the pictures, evenly spread."""

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": RULE,
            "rows": self.rows,
            "texts": self.texts,
            "image_to_text": self.image_to_text.to_json(),
            "text_to_image": self.text_to_image.to_json(),
            "chance_image_to_text": self.chance_image_to_text.to_json(),
            "chance_text_to_image": self.chance_text_to_image.to_json(),
            "bad_rows": self.bad_rows,
            "uncaptioned_rows": self.uncaptioned_rows,
            "capacity": self.capacity,
            "examples": [
                vars(found) | {"texts": list(found.texts), "rows": list(found.rows)} for found in self.examples
            ],
        }


def retrieval(
    model: Limoe,
    run: Run,
    shards: ShardSet,
    tokenizer: Tokenizer,
    *,
    mesh: Mesh,
    device: torch.device,
    progress: Progress = silent,
) -> Retrieval:
    """Recall in both directions over the whole manifest; the same result on every rank. A collective over all ranks.

    Raises UserError where no row has a caption and a picture that can be decoded, or an embedding is not finite.
    """
    captions = first_captions(shards)
    pictures = embed_pictures(model, run, shards, mesh=mesh, device=device, progress=progress)
    used = [number for number, good in enumerate(pictures.good_R.tolist()) if good and captions[number] is not None]
    if not used:
        raise UserError(
            f"{shards.path}: no row has both a caption and a picture that can be decoded: pack again", told_by=0
        )
    carried = one_text_each([captions[number] or "" for number in used])
    text_XP = embed_texts(model, run, tokenizer, carried.texts, mesh=mesh, device=device, progress=progress)
    image_RP = pictures.image_RP[torch.tensor(used, device=device)]
    text_R = carried.text_R.to(device)
    first = _first_both_ways(image_RP, text_XP)
    number_X = torch.arange(len(carried.texts), device=device)
    pictures_of_X = carried.text_R.bincount().tolist()
    return Retrieval(
        rows=len(used),
        texts=len(carried.texts),
        image_to_text=Recall(*hit_fracs(first.text_R10, text_R, number_X, COUNTS)),
        text_to_image=Recall(*hit_fracs(first.image_X10, number_X, text_R, COUNTS)),
        chance_image_to_text=Recall(*(chance_frac(len(carried.texts), 1, count) for count in COUNTS)),
        chance_text_to_image=Recall(*(_mean_chance(len(used), pictures_of_X, count) for count in COUNTS)),
        bad_rows=int((~pictures.good_R).sum()),
        uncaptioned_rows=sum(caption is None for caption in captions),
        capacity=run.moe.eval_capacity,
        examples=_examples(shards, used, carried, first),
    )


def first_captions(shards: ShardSet) -> list[str | None]:
    """The first caption of every row, in the order of the rows; None where a row has none."""
    rows = (shards.row(number) for number in range(len(shards)))
    return [row.captions[0] if row.captions else None for row in rows]


@dataclass(frozen=True)
class Carried:
    texts: tuple[str, ...]
    """X distinct texts, in the order in which they are first met."""
    text_R: Tensor
    """(R,) int64 on the CPU: the text that each picture carries."""


def one_text_each(captions: Sequence[str]) -> Carried:
    """The distinct texts among R captions, and which of them each is."""
    number_of: dict[str, int] = {}
    texts: list[str] = []
    for caption in captions:
        if number_of.setdefault(normalised(caption), len(texts)) == len(texts):
            texts.append(caption)
    return Carried(tuple(texts), torch.tensor([number_of[normalised(caption)] for caption in captions]))


@dataclass(frozen=True)
class _First:
    text_R10: Tensor
    """(R, min(10, X)) int64: the texts that each picture finds, best first."""
    image_X10: Tensor
    """(X, min(10, R)) int64: the pictures that each text finds."""


def _first_both_ways(image_RP: Tensor, text_XP: Tensor) -> _First:
    most = max(COUNTS)
    return _First(nearest_keys(image_RP, text_XP, most), nearest_keys(text_XP, image_RP, most))


def _mean_chance(pictures: int, pictures_of_X: Sequence[int], count: int) -> float:
    return sum(chance_frac(pictures, right, count) for right in pictures_of_X) / len(pictures_of_X)


def _examples(shards: ShardSet, used: Sequence[int], carried: Carried, first: _First) -> tuple[Found, ...]:
    examples = []
    for i in evenly_spread(len(used)):
        text = int(carried.text_R[i])
        examples.append(
            Found(
                row=used[i],
                key=shards.row(used[i]).key,
                text=carried.texts[text],
                texts=tuple(carried.texts[number] for number in first.text_R10[i, :5].tolist()),
                rows=tuple(used[number] for number in first.image_X10[text, :5].tolist()),
            )
        )
    return tuple(examples)
