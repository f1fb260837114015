"""The text of SentencePiece's pieces by their number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import sentencepiece


def piece_names(path: Path) -> Callable[[int], str]:
    """path: a SentencePiece model. The name of a number that the vocabulary lacks is the number."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = int(pieces.vocab_size())
    return lambda number: str(pieces.id_to_piece(number)) if 0 <= number < size else str(number)
