"""SentencePiece's training, with what T5's vocabularies have and what makes the same captions give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sentencepiece

from limoe_dist.config.errors import UserError

SMALLEST_VOCABULARY = 16
LARGEST_SAMPLE = 5_000_000
SAMPLE_BYTES = 1_000_000_000
LONGEST_CAPTION_BYTES = 4192
# A constant, not the machine's cores: SentencePiece adds up its counts thread by thread, and their number shows.
THREADS = 4


@dataclass(frozen=True)
class Options:
    model: Literal["unigram", "bpe"] = "unigram"
    character_coverage: float = 0.9995
    byte_fallback: bool = False
    split_digits: bool = False
    case: Literal["lower", "keep"] = "lower"
    extra_ids: int = 0
    sample_captions: int = LARGEST_SAMPLE
    sample_bytes: int = SAMPLE_BYTES
    seed: int = 0

    def check(self) -> None:
        """Raises UserError."""
        if not 0.9 <= self.character_coverage <= 1:
            raise UserError(
                f"--character-coverage={self.character_coverage:g}: must be between 0.9 and 1: the share of all "
                "characters that the vocabulary knows; 0.9995 for many scripts, 1 for few letters"
            )
        if not 0 <= self.extra_ids <= 1000:
            raise UserError(f"--extra-ids={self.extra_ids}: must be between 0 and 1000; T5 has 100")
        if self.sample_captions < 1 or self.sample_bytes < 1:
            raise UserError("--sample and --sample-mb: must be above 0")
        if self.seed < 0:
            raise UserError(f"--seed={self.seed}: must be 0 or more")

    def changed(self) -> dict[str, Any]:
        """Those that are not the defaults: what was trained before one of them was added keeps its record."""
        plain = asdict(Options())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


def train(captions: Iterable[str], options: Options, *, vocab_size: int) -> tuple[bytes, int]:
    """(the model's bytes, its number of pieces). Ids: 0 pad, 1 end of text, 2 unknown, then the extra ids.

    Raises UserError where the size is below what the captions' letters need.
    """
    sentencepiece.set_random_generator_seed(0)  # it would shuffle by the clock
    model = io.BytesIO()
    texts = (text.lower() for text in captions) if options.case == "lower" else iter(captions)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type=options.model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            # The model itself folds case, whoever calls it.
            normalization_rule_name="nmt_nfkc_cf" if options.case == "lower" else "nmt_nfkc",
            character_coverage=options.character_coverage,
            byte_fallback=options.byte_fallback,
            split_digits=options.split_digits,
            # Control symbols, not user-defined ones: a caption that spells <extra_id_0> does not become one.
            control_symbols=[f"<extra_id_{number}>" for number in range(options.extra_ids)],
            input_sentence_size=max(LARGEST_SAMPLE, options.sample_captions),
            shuffle_input_sentence=True,
            max_sentence_length=LONGEST_CAPTION_BYTES,
            num_threads=THREADS,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"--vocab-size={vocab_size}: SentencePiece cannot train on these captions: {' '.join(str(error).split())}: "
            "use a larger size where it speaks of required characters, and more captions where it speaks of none"
        ) from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = processor.get_piece_size()
    assert pieces <= vocab_size, f"{pieces} pieces, but only {vocab_size} were asked for"
    return model.getvalue(), pieces
