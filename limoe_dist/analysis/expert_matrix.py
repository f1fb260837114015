"""Experts by modality: whose tokens each expert processed, from the last line of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["image", "text", "mixed", "idle"]
MOSTLY = 0.9
"""An expert of one modality: at least this share of its tokens is of it."""
IDLE = 0.05
"""An idle expert: fewer tokens than this share of an even part of the block's."""


@dataclass(frozen=True)
class Expert:
    number: int
    tokens: float
    """Tokens that it processed, of both modalities, per step."""
    image_frac: float | None
    text_frac: float | None
    """Of its own tokens: the two sum to 1. None where it processed none."""
    of_images_frac: float
    of_texts_frac: float
    """Of all tokens of the modality that some expert of the block processed: each sums to 1 over the experts."""
    kind: Kind


@dataclass(frozen=True)
class BlockMatrix:
    block: int
    experts: tuple[Expert, ...]

    @property
    def most_of_images_frac(self) -> float:
        """The largest share of the modality's tokens that one expert has; 1 where there are none, to divide by."""
        return max(expert.of_images_frac for expert in self.experts) or 1.0

    @property
    def most_of_texts_frac(self) -> float:
        return max(expert.of_texts_frac for expert in self.experts) or 1.0

    def count(self, kind: Kind) -> int:
        return sum(expert.kind == kind for expert in self.experts)


def expert_matrix(last: dict[str, Any]) -> tuple[BlockMatrix, ...]:
    """One for each MoE block of a line of metrics.jsonl, in order; a block without a usable `kept` is left out."""
    blocks = last.get("blocks")
    if not isinstance(blocks, dict):
        return ()
    found = []
    for name in sorted((name for name in blocks if name.isdecimal()), key=int):
        kept = _pairs(blocks[name].get("kept") if isinstance(blocks[name], dict) else None)
        if kept:
            found.append(BlockMatrix(int(name), experts_of(kept)))
    return tuple(found)


def experts_of(kept_E2: Sequence[tuple[float, float]]) -> tuple[Expert, ...]:
    """kept_E2: for each expert, the image and the text tokens that it processed."""
    images, texts = (sum(pair[modality] for pair in kept_E2) for modality in (0, 1))
    even = (images + texts) / len(kept_E2)
    experts = []
    for number, (image, text) in enumerate(kept_E2):
        tokens = image + text
        experts.append(
            Expert(
                number=number,
                tokens=tokens,
                image_frac=image / tokens if tokens else None,
                text_frac=text / tokens if tokens else None,
                of_images_frac=image / images if images else 0.0,
                of_texts_frac=text / texts if texts else 0.0,
                kind=_kind(image, text, even),
            )
        )
    return tuple(experts)


def _kind(image: float, text: float, even: float) -> Kind:
    tokens = image + text
    if tokens <= IDLE * even:
        return "idle"
    if image >= MOSTLY * tokens:
        return "image"
    return "text" if text >= MOSTLY * tokens else "mixed"


def _pairs(value: object) -> list[tuple[float, float]]:
    """The pairs of `kept`, or nothing where the line holds something else."""
    if not isinstance(value, list):
        return []
    pairs = []
    for pair in value:
        match pair:
            case [int() | float() as image, int() | float() as text] if _counts(image, text):
                pairs.append((float(image), float(text)))
            case _:
                return []
    return pairs


def _counts(*values: float) -> bool:
    return all(math.isfinite(value) and value >= 0 for value in values)
