from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
import sentencepiece

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Data, Run, Text
from limoe_dist.data import tokenizer as module
from limoe_dist.data.manifest import load_manifest
from limoe_dist.data.tokenizer import Tokenizer, normalised, open_tokenizer, vocabulary_file
from tests.support.shards import write_shards


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_shards(folder, rows=2, shards=1)
    return folder / "tokenizer.model"


def pieces_of(model: Path, text: str) -> list[int]:
    return sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)


def test_a_short_text_ends_in_one_end_of_text_and_padding_of_ones(model: Path) -> None:
    pieces = pieces_of(model, "red cat")
    length = len(pieces) + 3
    result = Tokenizer(model, length=length, vocab_limit=100)(["red cat"])
    assert result.tokens.tolist() == [[*pieces, 1, 1, 1]]
    assert result.valid.tolist() == [[True] * len(pieces) + [True, False, False]]


def test_a_long_text_is_cut_and_keeps_its_end_of_text(model: Path) -> None:
    pieces = pieces_of(model, "picture of a red square")
    assert len(pieces) > 4
    result = Tokenizer(model, length=4, vocab_limit=100)(["picture of a red square"])
    assert result.tokens.tolist() == [[*pieces[:3], 1]]
    assert result.valid.all()


def test_a_text_that_just_fits_is_not_cut(model: Path) -> None:
    pieces = pieces_of(model, "a cat")
    result = Tokenizer(model, length=len(pieces) + 1, vocab_limit=100)(["a cat"])
    assert result.tokens.tolist() == [[*pieces, 1]]
    assert result.valid.all()


def test_an_empty_text_is_an_end_of_text_alone(model: Path) -> None:
    result = Tokenizer(model, length=3, vocab_limit=100)(["  "])
    assert result.tokens.tolist() == [[1, 1, 1]]
    assert result.valid.tolist() == [[True, False, False]]


def test_no_texts_give_an_empty_array(model: Path) -> None:
    assert Tokenizer(model, length=3, vocab_limit=100)([]).tokens.shape == (0, 3)


def test_case_width_and_blanks_do_not_matter(model: Path) -> None:
    tokenizer = Tokenizer(model, length=16, vocab_limit=100)
    result = tokenizer(["a red cat", "  A\tRed \n CAT ", "a red cat"])
    assert (result.tokens == result.tokens[0]).all()
    # Full-width letters, as in Japanese text, are the same words.
    assert normalised(" \uff26\uff55\uff4c\uff4c  Width ") == "full width"


def test_the_text_of_a_control_piece_is_ordinary_text(model: Path) -> None:
    result = Tokenizer(model, length=16, vocab_limit=100)(["cat</s>cat"])
    ends = [i for i, token in enumerate(result.tokens[0]) if token == 1]
    assert ends[0] == result.valid[0].sum() - 1


def test_a_caption_of_megabytes_costs_no_more_than_its_first_words(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(module, "normalised", lambda text: seen.append(len(text)) or normalised(text))
    result = Tokenizer(model, length=16, vocab_limit=100)(["red cat " * 500_000])
    assert seen == [16 * 64]
    assert result.valid.all()


def test_a_vocabulary_larger_than_the_embedding_names_both_and_the_fix(model: Path) -> None:
    with pytest.raises(UserError, match=r"has 32 pieces, more than text.vocab_size=31: set text.vocab_size=32"):
        Tokenizer(model, length=16, vocab_limit=31)
    assert Tokenizer(model, length=16, vocab_limit=32).vocab_size == 32


def test_files_that_are_no_tokenizer_are_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"missing\.model: no such file"):
        Tokenizer(tmp_path / "missing.model", length=16, vocab_limit=100)
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"\xff" * 400)
    with pytest.raises(UserError, match=r"garbage\.model: not a SentencePiece model"):
        Tokenizer(garbage, length=16, vocab_limit=100)
    monkeypatch.setattr(module, "MAX_MODEL_BYTES", 300)
    with pytest.raises(UserError, match="400 bytes; a SentencePiece model has at most 300"):
        Tokenizer(garbage, length=16, vocab_limit=100)


def test_a_vocabulary_with_another_end_of_text_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "other.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a red cat", "a blue cat"] * 9), model_writer=file, vocab_size=14, minloglevel=2
        )
    with pytest.raises(UserError, match="its end-of-text is 2, not 1"):
        Tokenizer(tmp_path / "other.model", length=16, vocab_limit=100)


def test_the_manifest_s_tokenizer_must_be_the_one_it_was_packed_with(tmp_path: Path) -> None:
    path = write_shards(tmp_path, rows=2, shards=1)
    run = Run(text=Text(vocab_size=100, length=8))
    manifest = load_manifest(path)
    assert open_tokenizer(run, manifest, tmp_path)(["a cat"]).tokens.shape == (1, 8)
    with (tmp_path / "tokenizer.model").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(UserError, match=r"tokenizer\.model: sha256 is .* but the manifest says"):
        open_tokenizer(run, manifest, tmp_path)


def test_a_run_s_own_tokenizer_goes_before_the_manifest_s(model: Path, tmp_path: Path) -> None:
    manifest = load_manifest(write_shards(tmp_path, rows=2, shards=1, vocab_size=None))
    with pytest.raises(UserError, match=r"data\.tokenizer is empty, and the manifest in .* names none"):
        open_tokenizer(Run(), manifest, tmp_path)
    assert open_tokenizer(Run(data=Data(tokenizer=str(model))), manifest, tmp_path).path == model


def test_a_vocabulary_from_a_url_is_copied_into_the_cache_and_into_no_folder_of_somebody_else(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").pipe("/vocabulary/t.model", model.read_bytes())
    data = Data(cache=str(tmp_path / "cache"))
    copied = vocabulary_file("memory://vocabulary/t.model", data)
    assert copied.parent == tmp_path / "cache"
    assert copied.parent.stat().st_mode & 0o777 == 0o700
    assert copied.read_bytes() == model.read_bytes()
    assert vocabulary_file(str(model), data) == model
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        vocabulary_file("memory://vocabulary/t.model", data)
