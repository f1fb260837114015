"""A model and a tokenizer whose embeddings a test chooses: what evaluation makes of them can be worked out by hand.

Picture i is flat, of grey level 4 * i; the model reads i from its first pixel.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from limoe_dist.config.schema import Eval, Run, Text
from limoe_dist.config.schema import Image as ImageSection
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.tokenizer import Tokens
from limoe_dist.model.tower import TowerOutput
from tests.support.shards import write_shards

CPU = torch.device("cpu")
RUN = Run(
    image=ImageSection(size=16, patch=8),
    text=Text(length=8, vocab_size=64),
    eval=Eval(batch_pairs=4, templates=("{}",)),
)


def flat(number: int, *, size: int = 24) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (size, size), (4 * number,) * 3).save(encoded, "PNG")
    return encoded.getvalue()


def flat_shards(
    folder: Path,
    rows: int,
    *,
    captions: Mapping[int, Sequence[str]] | None = None,
    pictures: Mapping[int, bytes] | None = None,
) -> ShardSet:
    """Row i has the flat picture i and the concept CONCEPTS[i % 8]."""
    pictures = {row: flat(row) for row in range(rows)} | dict(pictures or {})
    return ShardSet(write_shards(folder, rows=rows, pictures=pictures, captions=captions))


class PlantedTokenizer:
    """Token 0 of a text is its place in a list."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.number = {text: number for number, text in enumerate(texts)}

    def __call__(self, texts: Sequence[str]) -> Tokens:
        tokens = np.ones((len(texts), 8), dtype=np.int64)
        tokens[:, 0] = [self.number[text] for text in texts]
        return Tokens(tokens=tokens, valid=tokens > 0)


class PlantedModel(nn.Module):
    def __init__(self, image_RP: Tensor, text_XP: Tensor) -> None:
        super().__init__()
        self.image_RP, self.text_XP = nn.Parameter(image_RP.float()), nn.Parameter(text_XP.float())
        self.rows: list[int] = []
        """Rows of all pictures that it was given, padding included."""

    def forward(self, images: Tensor | None, tokens: Tensor | None, valid: Tensor | None = None) -> TowerOutput:
        image = text = None
        if images is not None:
            # A bad row's picture is zeros, which is no row's grey.
            number = ((images[:, 0, 0, 0] * 127.5 + 127.5) / 4).round().long().clamp(max=len(self.image_RP) - 1)
            self.rows += number.tolist()
            image = self.image_RP[number]
        if tokens is not None:
            text = self.text_XP[tokens[:, 0]]
        return TowerOutput(image_BP=image, text_BP=text, records={}, image_BD=image)
