"""`limoe prep tokenizer`: a SentencePiece vocabulary from captions, or one that exists, named in the shards' manifests.

Ids: 0 pad, 1 end of text, 2 unknown; there is no beginning of text. The loader pads with 1, big_vision's sticky EOS.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import sentencepiece

from data_prep.inspection.packed_sets import PackedSet
from data_prep.inspection.token_lengths import TokenLengths
from data_prep.vocabulary.caption_places import Text, captions_of_file, captions_of_set
from data_prep.vocabulary.caption_sample import CaptionSample
from data_prep.vocabulary.model_file import vocabulary_of
from data_prep.vocabulary.vocabulary import SAMPLE_BYTES, SMALLEST_VOCABULARY, Options, train
from data_prep.watched import Advance
from data_prep.writing import writing
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically
from limoe_dist.data import manifest as manifests
from limoe_dist.data import places
from limoe_dist.data.manifest import Manifest, Tokenizer
from limoe_dist.data.tokenizer import MAX_MODEL_BYTES

MODEL_FILE = "tokenizer.model"
SETTINGS_FILE = "tokenizer.json"
COVERAGE = "coverage"
HELD_CAPTIONS = 20_000
"""Captions that the vocabulary is measured on."""
_FEWEST_HELD = 1000
_SAY_EVERY = 1000


@dataclass(frozen=True)
class Trained:
    tokenizer: Tokenizer
    skipped: bool
    """The same captions and settings had been trained before."""
    coverage: dict[str, Any] | None
    """See `TokenLengths.to_json`, with `held_out`: whether these captions were not trained on."""


@dataclass(frozen=True)
class Captions:
    """All that a vocabulary is trained from, or measured on."""

    files: tuple[Path, ...]
    """manifest.json of local shards: the vocabulary is written beside each, and named in it."""
    manifests: tuple[Manifest, ...]
    texts: tuple[tuple[str, str], ...] = ()
    """(file or URL, column)"""

    def __iter__(self) -> Iterator[str]:
        sets = (PackedSet(str(file), manifest) for file, manifest in zip(self.files, self.manifests, strict=True))
        return chain(*map(captions_of_set, sets), *(captions_of_file(file, column) for file, column in self.texts))

    def settings(self) -> dict[str, Any]:
        shards = [shard.sha256 for manifest in self.manifests for shard in manifest.shards]
        texts = [[places.name_of(file), column, places.identity(file)] for file, column in self.texts]
        return {"shards": shards} | ({"texts": texts} if texts else {})


def open_captions(data: Sequence[Path], texts: Sequence[str] = ()) -> Captions:
    """Raises UserError for a missing place, and manifests without any caption."""
    files = tuple(file / "manifest.json" if file.is_dir() else file for file in data)
    loaded = tuple(manifests.load_manifest(file) for file in files)
    if loaded and not texts and all(manifest.without_caption == manifest.rows for manifest in loaded):
        raise UserError(
            f"--data {files[0]}: none of its {loaded[0].rows} rows has a caption: train the vocabulary from the "
            "shards whose captions are trained on"
        )
    asked = [Text.parse(text) for text in texts]
    return Captions(files, loaded, tuple((file, text.column) for text in asked for file in text.files()))


def train_tokenizer(
    data: Path | Sequence[Path],
    *,
    vocab_size: int,
    overwrite: bool,
    texts: Sequence[str] = (),
    out: Path | None = None,
    options: Options | None = None,
    advance: Advance = lambda captions: None,
) -> Trained:
    """Writes tokenizer.model beside each manifest and names it there. The same captions and options: the same bytes.

    vocab_size: the most pieces, with the special ones; a small set of captions gives fewer. texts: further captions,
    as --text. out: a folder that the model is written to as well. advance: called with captions as they are read.
    Raises UserError where the size is below what the captions' letters need, or another vocabulary is there already.
    """
    options = options or Options()
    options.check()
    if vocab_size < SMALLEST_VOCABULARY + options.extra_ids:
        more = f" and {options.extra_ids} extra ids" if options.extra_ids else ""
        raise UserError(f"--vocab-size={vocab_size}: must be at least {SMALLEST_VOCABULARY}{more}")
    read = open_captions([data] if isinstance(data, Path) else data, texts)
    settings = {"vocab_size": vocab_size, **read.settings(), "sentencepiece": sentencepiece.__version__}
    target = _Target(read, out, settings | options.changed())
    if done := target.already_there(overwrite=overwrite):
        return done
    held = CaptionSample(captions=HELD_CAPTIONS, size_bytes=SAMPLE_BYTES, seed=options.seed + 1)
    sample = CaptionSample(
        captions=options.sample_captions, size_bytes=options.sample_bytes, seed=options.seed, left_out=held.add
    )
    _fill(sample, read, advance)
    if not len(sample):
        raise UserError("--data and --text: hold no caption at all")
    model, pieces = train(sample, options, vocab_size=vocab_size)
    held_out = len(held) >= _FEWEST_HELD
    coverage = _coverage(model, held if held_out else sample) | {"held_out": held_out, "captions_read": sample.seen}
    return target.write(model, pieces, coverage)


def use_model(
    model_place: str,
    data: Sequence[Path],
    *,
    overwrite: bool,
    texts: Sequence[str] = (),
    out: Path | None = None,
    seed: int = 0,
    advance: Advance = lambda captions: None,
) -> Trained:
    """Copies an existing model beside each manifest and names it there; its coverage is of all captions.

    model_place: path or URL. Raises UserError where training could not read it, or another vocabulary is there already.
    """
    model = places.read_small(model_place, limit=MAX_MODEL_BYTES)
    pieces = vocabulary_of(model, f"--use {model_place}").pieces
    read = open_captions(data, texts)
    target = _Target(read, out, {"used": hashlib.sha256(model).hexdigest(), **read.settings()})
    if done := target.already_there(overwrite=overwrite):
        return done
    held = CaptionSample(captions=HELD_CAPTIONS, size_bytes=SAMPLE_BYTES, seed=seed)
    _fill(held, read, advance)
    coverage = _coverage(model, held) | {"held_out": True, "captions_read": held.seen}
    return target.write(model, pieces, coverage)


@dataclass(frozen=True)
class _Target:
    """Where a vocabulary goes: beside each manifest, and into `out`."""

    read: Captions
    out: Path | None
    settings: dict[str, Any]

    @property
    def folders(self) -> list[Path]:
        return list(dict.fromkeys([*(file.parent for file in self.read.files), *([self.out] if self.out else [])]))

    def already_there(self, *, overwrite: bool) -> Trained | None:
        """What the same settings gave before, where it is whole everywhere. Raises UserError for another vocabulary."""
        entries = [manifest.tokenizer for manifest in self.read.manifests]
        records = [_recorded(folder) for folder in self.folders]
        named = [entry for entry in entries if entry is not None]
        known = named[0] if named else _entry_of(self.out)
        whole = known is not None and all(_is_whole(known, folder) for folder in self.folders)
        same = all(entry == known for entry in entries) and all(
            _without_coverage(record) == self.settings for record in records
        )
        if known and whole and same:
            return Trained(known, skipped=True, coverage=records[0].get(COVERAGE))
        if overwrite:
            return None
        for file, entry in zip(self.read.files, entries, strict=True):
            # A model that is missing or broken has no runs that depend on it.
            if entry and _is_whole(entry, file.parent) and _without_coverage(_recorded(file.parent)) != self.settings:
                raise UserError(
                    f"{file}: already names a tokenizer of {entry.vocab_size} pieces that was "
                    "trained with other settings, and models may have been trained with it: --overwrite replaces it"
                )
        other = self.out and (self.out / MODEL_FILE).exists()
        if self.out and other and _without_coverage(_recorded(self.out)) != self.settings:
            raise UserError(
                f"--out {self.out}: holds a {MODEL_FILE} of other settings: name another folder, or --overwrite it"
            )
        return None

    def write(self, model: bytes, pieces: int, coverage: dict[str, Any]) -> Trained:
        """The models first, the manifests last: none names a model that is not there."""
        record = json.dumps(self.settings | {COVERAGE: coverage}, indent=2) + "\n"
        tokenizer = Tokenizer(file=MODEL_FILE, sha256=hashlib.sha256(model).hexdigest(), vocab_size=pieces)
        for folder in self.folders:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                _write_model(model, folder)
                write_atomically(folder / SETTINGS_FILE, record)
        for manifest, file in zip(self.read.manifests, self.read.files, strict=True):
            with writing(file):
                manifests.save_manifest(manifest.model_copy(update={"tokenizer": tokenizer}), file)
        return Trained(tokenizer, skipped=False, coverage=coverage)


def _write_model(model: bytes, folder: Path) -> None:
    """Whole and on disk, or not at all: after a power cut a manifest may name it."""
    temporary = folder / f".{MODEL_FILE}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(model)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MODEL_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def _fill(sample: CaptionSample, read: Captions, advance: Callable[[int], None]) -> None:
    number = 0
    for number, text in enumerate(read, start=1):
        sample.add(text)
        if number % _SAY_EVERY == 0:
            advance(_SAY_EVERY)
    advance(number % _SAY_EVERY)


def _coverage(model: bytes, sample: CaptionSample) -> dict[str, Any]:
    measured, texts = TokenLengths(model), islice(sample, HELD_CAPTIONS)
    while part := list(islice(texts, _SAY_EVERY)):
        measured.add(part)
    return measured.to_json()


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _without_coverage(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != COVERAGE}


def _entry_of(folder: Path | None) -> Tokenizer | None:
    """Of a model in a folder without manifest."""
    file = folder / MODEL_FILE if folder else None
    if file is None or not file.is_file():
        return None
    try:
        pieces = vocabulary_of(file.read_bytes(), str(file)).pieces
    except UserError:
        return None
    return Tokenizer(file=MODEL_FILE, sha256=manifests.sha256_of(file), vocab_size=pieces)


def _is_whole(tokenizer: Tokenizer, folder: Path) -> bool:
    file = folder / tokenizer.file
    return file.is_file() and manifests.sha256_of(file) == tokenizer.sha256
