"""The options of `limoe prep tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Train a SentencePiece vocabulary from the captions of packed shards."""

    data: Path
    """manifest.json of the shards; tokenizer.model is written beside it and named in it."""
    vocab_size: int = 32_000
    """The most pieces; a small set of captions gives fewer."""
    overwrite: bool = False
    """Replace a vocabulary that was trained with other settings."""


def run(settings: Settings) -> int:
    from data_prep import train_tokenizer as training

    trained = training.train_tokenizer(settings.data, vocab_size=settings.vocab_size, overwrite=settings.overwrite)
    how = "unchanged" if trained.skipped else "trained"
    print(
        f"{trained.tokenizer.file}: {how}, {trained.tokenizer.vocab_size} of at most {settings.vocab_size} pieces, "
        f"named in {settings.data}"
    )
    return 0
