"""A SentencePiece model from anywhere: is it one that training can read?"""

from __future__ import annotations

from dataclasses import dataclass

import sentencepiece

from limoe_dist.config.errors import UserError
from limoe_dist.data.tokenizer import EOS, MAX_MODEL_BYTES


@dataclass(frozen=True)
class Vocabulary:
    pieces: int
    pad: int
    """-1: none, as for the others."""
    end: int
    unknown: int
    begin: int

    @property
    def special(self) -> str:
        named = {"pad": self.pad, "end of text": self.end, "unknown": self.unknown, "begin": self.begin}
        return ", ".join(f"{name} {number if number >= 0 else 'none'}" for name, number in named.items())


def vocabulary_of(model: bytes, name: str) -> Vocabulary:
    """Its size and special ids. Raises UserError where it is no model, or training would refuse it, with what to do."""
    if len(model) > MAX_MODEL_BYTES:
        raise UserError(f"{name}: {len(model)} bytes; a SentencePiece model has at most {MAX_MODEL_BYTES}")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.LoadFromSerializedProto(model)
        pieces = int(processor.get_piece_size()) if loaded else 0
    except (OSError, RuntimeError, TypeError):
        pieces = 0
    if not pieces:
        raise UserError(
            f"{name}: is no SentencePiece model: give the .model file (T5 calls it spiece.model), "
            "not the .vocab beside it and no tokenizer.json of Hugging Face"
        )
    found = Vocabulary(pieces, processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id())
    if found.end != EOS:
        at = f'id {EOS} is the piece "{processor.id_to_piece(EOS)}"' if pieces > EOS else f"it has no id {EOS}"
        raise UserError(
            f"{name}: its special ids are {found.special}, and {at}; training ends and fills texts with id {EOS}, "
            f"so end of text must be {EOS}, as in T5's models: train one with `limoe prep tokenizer --data ...`"
        )
    return found
