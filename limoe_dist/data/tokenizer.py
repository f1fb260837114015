"""Captions to tokens: SentencePiece, lower case, a sticky end-of-text, padding with 1, as in big_vision."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Data, Run
from limoe_dist.data.manifest import Manifest, sha256_of
from limoe_dist.data.manifest import Tokenizer as TokenizerEntry
from limoe_dist.data.places import is_remote, join, local, read_small

PAD_VALUE = 1
EOS = 1
"""End of text; padding repeats it, so that an unmasked text ends in a row of them."""

MAX_MODEL_BYTES = 64 << 20
# Nobody writes words this long; it bounds the work that one hostile caption can cause.
_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Tokens:
    tokens: npt.NDArray[np.int64]
    """(n, length)"""
    valid: npt.NDArray[np.bool_]
    """(n, length) True on the pieces of the text and on the one end-of-text after them, False on padding."""


class Tokenizer:
    """A SentencePiece vocabulary whose end-of-text is 1, for texts of at most `length` tokens."""

    def __init__(self, path: Path | str, *, length: int, vocab_limit: int, entry: TokenizerEntry | None = None) -> None:
        """vocab_limit: text.vocab_size, the rows of the token embedding. entry: the manifest's, with its checksum.

        Raises UserError where the file is missing, too large, no SentencePiece model or not the one of `entry`, and
        where its vocabulary is larger than `vocab_limit` or its end-of-text is not 1.
        """
        self.path, self.length = Path(path), length
        _check_file(self.path, entry)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"tokenizer {self.path}: not a SentencePiece model ({reason})") from None
        self.vocab_size = int(self._pieces.vocab_size())
        if self.vocab_size > vocab_limit:
            raise UserError(
                f"tokenizer {self.path} has {self.vocab_size} pieces, more than text.vocab_size={vocab_limit}: "
                f"set text.vocab_size={self.vocab_size} or more, or train a smaller one with "
                f"`limoe prep tokenizer --data MANIFEST --vocab-size {vocab_limit} --overwrite`"
            )
        if self._pieces.eos_id() != EOS:
            raise UserError(
                f"tokenizer {self.path}: its end-of-text is {self._pieces.eos_id()}, not {EOS}: "
                "train one with `limoe prep tokenizer`"
            )

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokens and mask of n texts, (n, length) each. A text without a piece is an end-of-text alone."""
        tokens = np.full((len(texts), self.length), PAD_VALUE, dtype=np.int64)
        valid = np.zeros((len(texts), self.length), dtype=np.bool_)
        limit = self.length * _CHARACTERS_PER_TOKEN
        for i, pieces in enumerate(self._pieces.encode([normalised(text[:limit]) for text in texts])):
            # Sticky: the last place is kept for the end-of-text, also where the text is cut.
            kept = pieces[: self.length - 1]
            tokens[i, : len(kept)] = kept
            tokens[i, len(kept)] = EOS
            valid[i, : len(kept) + 1] = True
        return Tokens(tokens=tokens, valid=valid)


def open_tokenizer(run: Run, manifest: Manifest, folder: Path | str) -> Tokenizer:
    """The run's tokenizer: data.tokenizer, or where that is empty the one that the manifest in `folder` names.

    folder: a path or a URL; from a URL it is copied into data.cache.

    Raises UserError as `Tokenizer` does, and where neither names one.
    """
    entry = manifest.tokenizer
    if run.data.tokenizer:
        place, entry = run.data.tokenizer, None
    elif entry is not None:
        place = join(str(folder), entry.file)
    else:
        raise UserError(
            f"data.tokenizer is empty, and the manifest in {folder} names none: "
            "give data.tokenizer, or train one with "
            f"`limoe prep tokenizer --data {join(str(folder), 'manifest.json')} --vocab-size {run.text.vocab_size}`"
        )
    path = vocabulary_file(place, run.data)
    return Tokenizer(path, length=run.text.length, vocab_limit=run.text.vocab_size, entry=entry)


def vocabulary_file(place: str, data: Data) -> Path:
    """The model on this host; from a URL it is copied into data.cache. Raises UserError where that cannot be done."""
    return _local_copy(place, data) if is_remote(place) else local(place)


def _local_copy(url: str, data: Data) -> Path:
    """A model from a URL, under the name of its content."""
    from limoe_dist.data.cache import cache_folder, open_cache

    content = read_small(url, limit=MAX_MODEL_BYTES)
    # Makes the folder, for us alone; refuses one that somebody else made for us.
    open_cache(data)
    path = cache_folder(data) / f"{hashlib.sha256(content).hexdigest()}.model"
    try:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"data.cache={path.parent}: the vocabulary cannot be written there: {error.strerror}") from None
    return path


def normalised(text: str) -> str:
    """NFKC, lower case, every run of white space one blank, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def _check_file(path: Path, entry: TokenizerEntry | None) -> None:
    if not path.is_file():
        raise UserError(
            f"tokenizer {path}: no such file: give data.tokenizer, or train one with `limoe prep tokenizer`"
        )
    if path.stat().st_size > MAX_MODEL_BYTES:
        raise UserError(
            f"tokenizer {path}: {path.stat().st_size} bytes; a SentencePiece model has at most {MAX_MODEL_BYTES}"
        )
    if entry is not None and (found := sha256_of(path)) != entry.sha256:
        raise UserError(
            f"tokenizer {path}: sha256 is {found[:12]}..., but the manifest says {entry.sha256[:12]}...: "
            "the vocabulary was changed after packing; train it again or copy the whole folder"
        )
