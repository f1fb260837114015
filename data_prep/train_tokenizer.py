"""`limoe prep tokenizer`: a SentencePiece vocabulary (unigram, lower case) from the captions of packed shards.

Ids: 0 pad, 1 end of text, 2 unknown; there is no beginning of text. The loader pads with 1, big_vision's sticky EOS.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import sentencepiece

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically
from limoe_dist.data import manifest as manifests
from limoe_dist.data.manifest import Manifest, Tokenizer

MODEL_FILE = "tokenizer.model"
SETTINGS_FILE = "tokenizer.json"
SMALLEST_VOCABULARY = 16
LARGEST_SAMPLE = 5_000_000
LONGEST_CAPTION_BYTES = 4192
# A constant, not the machine's cores: SentencePiece adds up its counts thread by thread, and their number shows.
THREADS = 4


@dataclass(frozen=True)
class Trained:
    tokenizer: Tokenizer
    skipped: bool
    """The same captions and size had been trained before."""


def train_tokenizer(manifest_file: Path, *, vocab_size: int, overwrite: bool) -> Trained:
    """Writes tokenizer.model beside the manifest and names it there. The same captions give the same bytes.

    vocab_size: the most pieces, with the three special ones; a small set of captions gives fewer.
    Raises UserError where the size is below what the captions' letters need, or another vocabulary is there already.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size={vocab_size}: must be at least {SMALLEST_VOCABULARY}")
    if manifest_file.is_dir():
        manifest_file = manifest_file / "manifest.json"
    manifest = manifests.load_manifest(manifest_file)
    if manifest.without_caption == manifest.rows:
        raise UserError(
            f"--data {manifest_file}: none of its {manifest.rows} rows has a caption: train the vocabulary from the "
            "shards whose captions are trained on"
        )
    folder = manifest_file.parent
    settings = _settings(manifest, vocab_size)
    if manifest.tokenizer and _is_whole(manifest.tokenizer, folder):
        if _recorded(folder) == settings:
            return Trained(manifest.tokenizer, skipped=True)
        if not overwrite:
            raise UserError(
                f"{manifest_file}: already names a tokenizer of {manifest.tokenizer.vocab_size} pieces that was "
                "trained with other settings, and models may have been trained with it: --overwrite replaces it"
            )
    model, pieces = _train(manifest, folder, vocab_size)
    temporary = folder / f".{MODEL_FILE}.{os.getpid()}.tmp"
    temporary.write_bytes(model)
    os.replace(temporary, folder / MODEL_FILE)
    write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    tokenizer = Tokenizer(file=MODEL_FILE, sha256=hashlib.sha256(model).hexdigest(), vocab_size=pieces)
    manifests.save_manifest(manifest.model_copy(update={"tokenizer": tokenizer}), manifest_file)
    return Trained(tokenizer, skipped=False)


def _settings(manifest: Manifest, vocab_size: int) -> dict[str, object]:
    return {
        "vocab_size": vocab_size,
        "shards": [shard.sha256 for shard in manifest.shards],
        "sentencepiece": sentencepiece.__version__,
    }


def _recorded(folder: Path) -> object:
    try:
        return json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_whole(tokenizer: Tokenizer, folder: Path) -> bool:
    file = folder / tokenizer.file
    return file.is_file() and manifests.sha256_of(file) == tokenizer.sha256


def captions(manifest: Manifest, folder: Path) -> Iterator[str]:
    """All captions in the order of the shards, lower-cased, a batch of rows in memory at a time."""
    for shard in manifest.shards:
        try:
            with pa.memory_map(str(folder / shard.file)) as mapped, pa.ipc.open_file(mapped) as reader:
                for index in range(reader.num_record_batches):
                    batch = reader.get_batch(index)
                    # Before a value is read: offsets of a damaged shard point anywhere.
                    batch.validate(full=True)
                    for row in batch.column("captions").to_pylist():
                        yield from (caption.lower() for caption in row or () if caption)
        except (pa.ArrowException, KeyError, OSError) as error:
            raise UserError(f"{folder / shard.file}: is no shard with captions: {error}: pack again") from None


def _train(manifest: Manifest, folder: Path, vocab_size: int) -> tuple[bytes, int]:
    """(the model's bytes, its number of pieces)."""
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)  # it draws the sample where there are more than LARGEST_SAMPLE captions
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=captions(manifest, folder),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",  # the model itself folds case, whoever calls it
            character_coverage=0.9995,
            input_sentence_size=LARGEST_SAMPLE,
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
