"""How a vocabulary cuts captions: tokens each, what is unknown to it, and what a text length would cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece

from data_prep.inspection.tallies import Distribution
from limoe_dist.data.tokenizer import normalised

LENGTHS = (16, 64)
"""Of `text.length`: the presets' is 16."""
_LONGEST = 8192
"""Characters of a caption: it bounds the work that a hostile one can cause."""


class TokenLengths:
    def __init__(self, model: bytes) -> None:
        """model: a SentencePiece model that `model_file.vocabulary_of` accepts."""
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.tokens = Distribution()
        """With the one that ends a text."""
        self.unknown = self.with_unknown = self.bytes_pieces = 0
        self.cut = dict.fromkeys(LENGTHS, 0)

    def add(self, texts: Sequence[str]) -> None:
        if not texts:
            return
        cut = self._pieces.encode([normalised(text[:_LONGEST]) for text in texts])
        lengths = np.array([len(pieces) + 1 for pieces in cut])
        self.tokens.add(lengths)
        for length in LENGTHS:
            self.cut[length] += int((lengths > length).sum())
        unknown = self._pieces.unk_id()
        for pieces in cut:
            found = pieces.count(unknown)
            self.unknown, self.with_unknown = self.unknown + found, self.with_unknown + bool(found)
            self.bytes_pieces += sum(self._pieces.is_byte(piece) for piece in pieces)

    def to_json(self) -> dict[str, Any]:
        """Shares: of pieces, without the end of text, that are unknown or stand for a byte; of captions cut off."""
        captions, pieces = self.tokens.count, self.tokens.sum - self.tokens.count
        return {
            "captions": captions,
            "vocab_size": int(self._pieces.vocab_size()),
            "a_caption": self.tokens.to_json(),
            "unknown_pieces_share": self.unknown / max(1, pieces),
            "byte_pieces_share": self.bytes_pieces / max(1, pieces),
            "captions_with_unknown_share": self.with_unknown / max(1, captions),
            "cut_share_by_length": {str(length): count / max(1, captions) for length, count in self.cut.items()},
        }
