from __future__ import annotations

import io

import pytest
import sentencepiece
from rich.console import Console

from data_prep.pack import PackSettings, pack
from data_prep.pictures import Caps
from data_prep.train_tokenizer import captions, train_tokenizer
from limoe_dist.config.errors import UserError
from limoe_dist.data import manifest as manifests
from tests.data_prep.pictures_of import encoded, folder_source, noisy

CAPTIONS = ["A red apple", "a green apple", "A red fire engine", "An owl in a tree", "the tree of an owl", "green tea"]


def shards(folder, texts=CAPTIONS):
    rows = [{"image": f"{n}.png", "captions": [text, f"an emoji of {text}"]} for n, text in enumerate(texts)]
    source = folder_source(folder / "src", rows, {row["image"]: encoded(noisy(1)) for row in rows})
    settings = PackSettings("test", 1_000_000, 0, Caps(1_000_000, 100_000))
    pack([source], folder / "out", settings, threads=1, overwrite=False, console=Console(file=io.StringIO()))
    return folder / "out/manifest.json"


def test_captions_are_read_back_in_lower_case(tmp_path):
    file = shards(tmp_path)
    read = list(captions(manifests.load_manifest(file), file.parent))
    expected = [text for caption in CAPTIONS for text in (caption.lower(), f"an emoji of {caption.lower()}")]
    assert sorted(read) == sorted(expected)


def test_a_small_set_gives_as_many_pieces_as_it_can(tmp_path):
    trained = train_tokenizer(shards(tmp_path), vocab_size=32_000, overwrite=False)
    assert 20 < trained.tokenizer.vocab_size < 32_000


def test_the_vocabulary_never_exceeds_the_request(tmp_path):
    assert train_tokenizer(shards(tmp_path), vocab_size=32, overwrite=False).tokenizer.vocab_size <= 32


def test_the_model_folds_case_ends_with_1_and_knows_every_word(tmp_path):
    file = shards(tmp_path)
    train_tokenizer(file, vocab_size=64, overwrite=False)
    model = sentencepiece.SentencePieceProcessor(model_file=str(file.parent / "tokenizer.model"))
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)
    assert model.encode("RED Apple") == model.encode("red apple")
    assert model.decode(model.encode("an owl in a green tree")) == "an owl in a green tree"
    assert model.unk_id() not in model.encode("an owl in a green tree")


def test_the_manifest_names_the_model_and_keeps_the_rest(tmp_path):
    file = shards(tmp_path)
    before = manifests.load_manifest(file)
    trained = train_tokenizer(file.parent, vocab_size=64, overwrite=False)
    after = manifests.load_manifest(file)
    assert after.tokenizer == trained.tokenizer
    assert after.tokenizer.sha256 == manifests.sha256_of(file.parent / after.tokenizer.file)
    assert after.model_copy(update={"tokenizer": None}) == before
    assert not list(file.parent.glob(".*"))


def test_the_same_captions_give_the_same_bytes(tmp_path):
    models = []
    for name in ("a", "b"):
        file = shards(tmp_path / name)
        train_tokenizer(file, vocab_size=64, overwrite=False)
        models.append((file.parent / "tokenizer.model").read_bytes())
    assert models[0] == models[1]
    other = shards(tmp_path / "c", [*CAPTIONS, "zebra crossing"])
    train_tokenizer(other, vocab_size=64, overwrite=False)
    assert (other.parent / "tokenizer.model").read_bytes() != models[0]


def test_the_same_settings_are_trained_once(tmp_path):
    file = shards(tmp_path)
    assert not train_tokenizer(file, vocab_size=64, overwrite=False).skipped
    assert train_tokenizer(file, vocab_size=64, overwrite=False).skipped
    (file.parent / "tokenizer.model").write_bytes(b"broken")
    assert not train_tokenizer(file, vocab_size=64, overwrite=False).skipped
    assert train_tokenizer(file, vocab_size=64, overwrite=False).skipped


def test_another_size_is_refused_unless_overwritten(tmp_path):
    file = shards(tmp_path)
    first = train_tokenizer(file, vocab_size=64, overwrite=False).tokenizer
    with pytest.raises(UserError, match=r"already names a tokenizer of .* --overwrite replaces it"):
        train_tokenizer(file, vocab_size=40, overwrite=False)
    assert manifests.load_manifest(file).tokenizer == first
    assert train_tokenizer(file, vocab_size=40, overwrite=True).tokenizer.vocab_size <= 40


def test_a_size_below_what_the_letters_need_is_an_error(tmp_path):
    file = shards(tmp_path, ["abcdefghijklmnopqrstuvwxyz 0123456789"])
    with pytest.raises(UserError, match=r"--vocab-size=16: .*required_chars"):
        train_tokenizer(file, vocab_size=16, overwrite=False)
    with pytest.raises(UserError, match=r"--vocab-size=3: must be at least 16"):
        train_tokenizer(file, vocab_size=3, overwrite=False)
    assert manifests.load_manifest(file).tokenizer is None


def test_pictures_alone_have_nothing_to_train_a_vocabulary_from(tmp_path):
    manifest = manifests.Manifest(
        rows=1, shards=(manifests.Shard(file="a", rows=1, bytes=1, sha256="0"),), without_caption=1, without_picture=0
    )
    (tmp_path / "a").write_bytes(b"x")
    manifests.save_manifest(manifest, tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"none of its 1 rows has a caption"):
        train_tokenizer(tmp_path / "manifest.json", vocab_size=64, overwrite=False)
