"""Retrieval: finds a picture's text among all texts, and a text's picture among all pictures.

Each picture carries its first caption (eval.captions=first) or all of them (all, the protocol for COCO). Captions that
the tokenizer's normalisation (NFKC, lower case, white space) makes equal are ONE text: right for a picture is any text
that it carries, right for a text is any picture that carries it, and each text is one query. Without this rule a model
would be marked wrong for a caption that is equal to the right one.

Shapes: R pictures, X texts, L links between a picture and a text that it carries, P embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import Tokenizer, normalised
from limoe_dist.eval.embed import Embedder, Progress, silent
from limoe_dist.eval.ranking import chance_frac, evenly_spread, linked_fracs, nearest_keys
from limoe_dist.eval.rows import check_pairs
from limoe_dist.model.tower import Limoe
from limoe_dist.parallel.mesh import Mesh

_RULE = (
    "{carried}; captions equal after NFKC, lower case and white space are one text. "
    "Right for a picture: {right}. Right for a text: every picture that carries it."
)
RULES = {
    "first": _RULE.format(carried="A picture's text is its first caption", right="its text"),
    "all": _RULE.format(carried="A picture carries all of its captions", right="any text that it carries"),
}
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
    """One picture, the text of its first caption, and what each found first."""

    row: int
    key: str
    text: str
    texts: tuple[str, ...]
    """Up to five texts that the picture found, best first."""
    rows: tuple[int, ...]
    """Up to five rows of pictures that the text found, best first."""


@dataclass(frozen=True)
class Retrieval:
    captions: Literal["first", "all"]
    """Which captions a picture carries."""
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
    pictureless_rows: int
    """Rows that hold no picture."""
    uncaptioned_rows: int
    """Rows without a caption."""
    capacity: str
    """moe.eval_capacity; with "paper", embeddings depend on the batch that they are in."""
    examples: tuple[Found, ...]
    """Some of the pictures, evenly spread."""

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": RULES[self.captions],
            "captions": self.captions,
            "rows": self.rows,
            "texts": self.texts,
            "image_to_text": self.image_to_text.to_json(),
            "text_to_image": self.text_to_image.to_json(),
            "chance_image_to_text": self.chance_image_to_text.to_json(),
            "chance_text_to_image": self.chance_text_to_image.to_json(),
            "bad_rows": self.bad_rows,
            "pictureless_rows": self.pictureless_rows,
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
    return retrieval_of(Embedder(model, run, shards, tokenizer, mesh=mesh, device=device, progress=progress))


def retrieval_of(embedder: Embedder) -> Retrieval:
    """As `retrieval`, with the embeddings that other tasks may have asked for already."""
    rows, run = embedder.rows, embedder.run
    check_pairs(rows, needed_by="retrieval")
    used, most = usable_pairs(embedder), 1 if run.eval.captions == "first" else None
    carried = texts_of_pictures([rows.captions[number][:most] for number in used])
    text_XP = embedder.texts(carried.texts)
    image_RP = embedder.pictures.image_RP[torch.tensor(used, device=embedder.device)]
    first = _first_both_ways(image_RP, text_XP)
    link_L2 = carried.link_L2.to(embedder.device)
    texts_of_R, pictures_of_X = (carried.link_L2[:, side].bincount().tolist() for side in (0, 1))
    return Retrieval(
        captions=run.eval.captions,
        rows=len(used),
        texts=len(carried.texts),
        image_to_text=Recall(*linked_fracs(first.text_R10, link_L2, COUNTS)),
        text_to_image=Recall(*linked_fracs(first.image_X10, link_L2.flip(1), COUNTS)),
        chance_image_to_text=Recall(*(_mean_chance(len(carried.texts), texts_of_R, count) for count in COUNTS)),
        chance_text_to_image=Recall(*(_mean_chance(len(used), pictures_of_X, count) for count in COUNTS)),
        bad_rows=embedder.undecodable(),
        pictureless_rows=rows.pictureless,
        uncaptioned_rows=rows.uncaptioned,
        capacity=run.moe.eval_capacity,
        examples=_examples(embedder.shards, used, carried, first),
    )


def usable_pairs(embedder: Embedder) -> list[int]:
    """The rows that have a caption and a picture that was decoded. Raises UserError where none has.

    A collective over all ranks, where the pictures were not embedded yet.
    """
    rows = embedder.rows
    good = embedder.pictures.good_R.tolist()
    used = [number for number, captions in enumerate(rows.captions) if captions and good[number]]
    if not used:
        raise UserError(
            f"{rows.place}: no row has both a caption and a picture that can be decoded: pack again", told_by=0
        )
    return used


@dataclass(frozen=True)
class Carried:
    texts: tuple[str, ...]
    """X distinct texts, in the order in which they are first met."""
    first_R: Tensor
    """(R,) int64 on the CPU: the text of each picture's first caption."""
    link_L2: Tensor
    """(L, 2) int64 on the CPU: a picture, and a text that it carries; each link once."""


def texts_of_pictures(captions: Sequence[Sequence[str]]) -> Carried:
    """The distinct texts among the captions of R pictures, none of them without, and who carries which."""
    number_of: dict[str, int] = {}
    texts: list[str] = []
    links: dict[tuple[int, int], None] = {}
    firsts = []
    for picture, own in enumerate(captions):
        for caption in own:
            number = number_of.setdefault(normalised(caption), len(texts))
            if number == len(texts):
                texts.append(caption)
            links[picture, number] = None
        firsts.append(number_of[normalised(own[0])])
    return Carried(tuple(texts), torch.tensor(firsts), torch.tensor(list(links)))


@dataclass(frozen=True)
class _First:
    text_R10: Tensor
    """(R, min(10, X)) int64: the texts that each picture finds, best first."""
    image_X10: Tensor
    """(X, min(10, R)) int64: the pictures that each text finds."""


def _first_both_ways(image_RP: Tensor, text_XP: Tensor) -> _First:
    most = max(COUNTS)
    return _First(nearest_keys(image_RP, text_XP, most), nearest_keys(text_XP, image_RP, most))


def _mean_chance(keys: int, right: Sequence[int], count: int) -> float:
    """right: of each query, how many keys are right."""
    times = Counter(right)
    return sum(chance_frac(keys, number, count) * often for number, often in times.items()) / len(right)


def _examples(shards: ShardSet, used: Sequence[int], carried: Carried, first: _First) -> tuple[Found, ...]:
    examples = []
    for i in evenly_spread(len(used)):
        text = int(carried.first_R[i])
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
