from __future__ import annotations

import json

import pytest
import sentencepiece

from data_prep.cli import main
from data_prep.inspection.token_lengths import TokenLengths
from data_prep.vocabulary import train_tokenizer as training
from data_prep.vocabulary.train_tokenizer import open_captions, train_tokenizer, use_model
from data_prep.vocabulary.vocabulary import Options
from limoe_dist.config.errors import UserError
from limoe_dist.data import manifest as manifests
from tests.support.shards import write_shards

CAPTIONS = ["A red apple", "a green apple", "A red fire engine", "An owl in a tree", "the tree of an owl", "green tea"]


def shards(folder, texts=CAPTIONS):
    captions = {n: [text, f"an emoji of {text}"] for n, text in enumerate(texts)}
    return write_shards(folder / "out", rows=len(texts), shards=1, captions=captions, vocab_size=None)


def test_captions_are_read_back(tmp_path):
    read = list(open_captions([shards(tmp_path)]))
    expected = [text for caption in CAPTIONS for text in (caption, f"an emoji of {caption}")]
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


def test_a_model_that_does_not_fit_on_the_disk_leaves_the_old_one_and_no_part(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        training._write_model(b"new", tmp_path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("tokenizer.model", b"old")]


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


def model_of(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_several_sets_share_one_vocabulary_of_all_their_captions(tmp_path):
    files = [shards(tmp_path / "a"), shards(tmp_path / "b", ["zebra crossing", "quick fox"])]
    trained = train_tokenizer(files, vocab_size=64, overwrite=False)
    assert [manifests.load_manifest(file).tokenizer for file in files] == [trained.tokenizer] * 2
    model = model_of(files[1].parent)
    assert model.unk_id() not in model.encode("zebra apple quick owl")
    assert train_tokenizer(files, vocab_size=64, overwrite=False).skipped
    (files[1].parent / "tokenizer.model").unlink()
    assert not train_tokenizer(files, vocab_size=64, overwrite=False).skipped
    with pytest.raises(UserError, match="trained with other settings"):
        train_tokenizer(files[0], vocab_size=64, overwrite=False)


def test_captions_of_lists_count_too_and_a_folder_takes_the_model_without_a_manifest(tmp_path):
    (tmp_path / "list.tsv").write_text("caption\turl\n" + "".join(f"A quick zebra {n}\tx\n" for n in range(20)))
    texts, out = [f"{tmp_path}/list.tsv"], tmp_path / "out"
    trained = train_tokenizer([], vocab_size=64, overwrite=False, texts=texts, out=out)
    model = model_of(out)
    assert model.unk_id() not in model.encode("quick zebra")
    assert train_tokenizer([], vocab_size=64, overwrite=False, texts=texts, out=out).skipped
    (tmp_path / "list.tsv").write_text("caption\nanother list of captions\n")
    with pytest.raises(UserError, match=r"holds a tokenizer\.model of other settings"):
        train_tokenizer([], vocab_size=64, overwrite=False, texts=texts, out=out)
    assert trained.tokenizer.sha256 == manifests.sha256_of(out / "tokenizer.model")


def test_a_record_of_the_first_version_is_still_known(tmp_path):
    file = shards(tmp_path)
    train_tokenizer(file, vocab_size=64, overwrite=False)
    record = file.parent / "tokenizer.json"
    first = {name: json.loads(record.read_text())[name] for name in ("vocab_size", "shards", "sentencepiece")}
    record.write_text(json.dumps(first))
    assert train_tokenizer(file, vocab_size=64, overwrite=False).skipped
    # The command's defaults are those of the options, or it would take its own records for others.
    assert main(["tokenizer", "--data", str(file), "--vocab-size", "64"]) == 0
    assert json.loads(record.read_text()) == first


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        (Options(extra_ids=3), lambda m: m.id_to_piece([3, 4, 5]) == [f"<extra_id_{n}>" for n in range(3)]),
        (Options(extra_ids=3), lambda m: not {3, 4, 5} & {*m.encode("<extra_id_0>")}),
        (Options(byte_fallback=True), lambda m: m.unk_id() not in m.encode("\N{SNOWMAN}")),
        (Options(byte_fallback=False), lambda m: m.unk_id() in m.encode("\N{SNOWMAN}")),
        (Options(split_digits=True), lambda m: m.encode_as_pieces("1950")[-4:] == ["1", "9", "5", "0"]),
        (Options(split_digits=False), lambda m: m.encode_as_pieces("1950")[-4:] != ["1", "9", "5", "0"]),
        (Options(case="keep"), lambda m: m.encode("RED") != m.encode("red")),
        (Options(model="bpe"), lambda m: m.decode(m.encode("red apple")) == "red apple"),
    ],
)
def test_each_option_does_what_it_says(tmp_path, options, holds):
    texts = [*CAPTIONS, "RED 1950", "1950 red 2", *(f"in 1950 a red apple {n % 4}" for n in range(30))]
    file = shards(tmp_path, texts)
    train_tokenizer(file, vocab_size=330, overwrite=False, options=options)
    model = model_of(file.parent)
    assert (model.pad_id(), model.eos_id(), model.unk_id()) == (0, 1, 2)
    assert holds(model)


def test_a_sample_is_bounded_and_what_it_leaves_out_is_measured_on(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"caption {n} of the list\n" for n in range(1600)))
    texts, advanced = [f"{tmp_path}/list.txt"], []
    options = Options(sample_captions=300)
    trained = train_tokenizer(
        [], vocab_size=64, overwrite=False, texts=texts, out=tmp_path / "out", options=options, advance=advanced.append
    )
    assert sum(advanced) == 1600
    assert trained.coverage["held_out"] is True
    assert (trained.coverage["captions"], trained.coverage["captions_read"]) == (1300, 1600)
    again = train_tokenizer([], vocab_size=64, overwrite=False, texts=texts, out=tmp_path / "again", options=options)
    assert again.tokenizer == trained.tokenizer
    other = Options(sample_captions=300, seed=1)
    assert train_tokenizer([], vocab_size=64, overwrite=True, texts=texts, out=tmp_path / "out", options=other)


def test_coverage_counts_tokens_unknown_pieces_and_captions_that_are_cut(tmp_path):
    file = shards(tmp_path, ["a red apple"] * 3)
    train_tokenizer(file, vocab_size=32, overwrite=False)
    measured = TokenLengths((file.parent / "tokenizer.model").read_bytes())
    model = model_of(file.parent)
    long = "red apple " * 40
    measured.add(["A red  apple", "\N{SNOWMAN} apple", long])
    found = measured.to_json()
    lengths = [len(model.encode(text.strip())) + 1 for text in ("a red apple", "\N{SNOWMAN} apple", long)]
    assert found["a_caption"]["mean"] == pytest.approx(sum(lengths) / 3, abs=1e-4)
    unknown = model.encode("\N{SNOWMAN} apple").count(2)
    assert unknown == 1
    assert found["unknown_pieces_share"] == pytest.approx(1 / (sum(lengths) - 3))
    assert found["captions_with_unknown_share"] == pytest.approx(1 / 3)
    assert found["cut_share_by_length"]["64"] == pytest.approx(1 / 3)


def test_odd_captions_are_no_hindrance(tmp_path):
    odd = [
        "two\nlines",
        "a\ttab",
        "nul \0 byte",
        "\u2581 the mark of a space",
        "</s> <unk>",
        " ",
        "x" * 10_000,
        *CAPTIONS,
    ]
    assert train_tokenizer(shards(tmp_path, odd), vocab_size=64, overwrite=False).tokenizer.vocab_size > 16


def t5_like(file, **special):
    sentencepiece.set_random_generator_seed(0)
    settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | special
    with file.open("wb") as opened:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CAPTIONS * 3), model_writer=opened, vocab_size=40, hard_vocab_limit=False,
            minloglevel=2, **settings
        )  # fmt: skip
    return file


def test_an_existing_model_is_copied_named_and_measured(tmp_path):
    files = [shards(tmp_path / "a"), shards(tmp_path / "b")]
    model = t5_like(tmp_path / "spiece.model")
    used = use_model(str(model), files, overwrite=False)
    for file in files:
        assert manifests.load_manifest(file).tokenizer == used.tokenizer
        assert (file.parent / "tokenizer.model").read_bytes() == model.read_bytes()
    assert used.coverage["captions"] == 24
    assert use_model(str(model), files, overwrite=False).skipped
    with pytest.raises(UserError, match="trained with other settings"):
        train_tokenizer(files[0], vocab_size=64, overwrite=False)


@pytest.mark.parametrize(
    ("special", "reason"),
    [
        ({"bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": -1}, r'end of text 2, .*id 1 is the piece "<s>".*must be 1'),
        ({"eos_id": -1, "unk_id": 1}, r"end of text none"),
    ],
)
def test_a_model_whose_texts_end_otherwise_is_refused_with_its_ids(tmp_path, special, reason):
    file = shards(tmp_path)
    with pytest.raises(UserError, match=reason):
        use_model(str(t5_like(tmp_path / "other.model", **special)), [file], overwrite=False)
    assert manifests.load_manifest(file).tokenizer is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\x0a\xff\xff\xff\xff\x0f", bytes(1000)])
def test_what_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(UserError, match="is no SentencePiece model"):
        use_model(str(tmp_path / "x.model"), [shards(tmp_path)], overwrite=False)


def test_the_command_tells_what_the_vocabulary_does(tmp_path, capsys):
    file = shards(tmp_path)
    assert main(["tokenizer", "--data", str(file), "--vocab-size", "64"]) == 0
    told = capsys.readouterr().out
    assert "on 12 captions, of those that it was trained from, of 12:" in told
    assert "cut off at text.length=16" in told
    assert "a run needs text.vocab_size=" in told
    assert main(["tokenizer", "--data", str(file), "--vocab-size", "64"]) == 0
    assert "unchanged" in capsys.readouterr().out
    model = t5_like(tmp_path / "spiece.model")
    assert main(["tokenizer", "--data", str(file), "--use", str(model), "--overwrite"]) == 0
    assert f"taken from {model}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "--data: name at least one manifest.json"),
        (["--text", "a.txt"], "--out: name a folder for the vocabulary"),
        (["--data", "s3://bucket/manifest.json"], "is a URL, .* give it to --text"),
        (["--data", "x", "--use", "m", "--vocab-size", "9", "--model", "bpe"], "leave out --vocab-size, --model"),
        (["--data", "x", "--character-coverage", "2"], "--character-coverage=2: must be between 0.9 and 1"),
        (["--data", "x", "--sample", "0"], "--sample and --sample-mb: must be above 0"),
        (["--data", "x", "--extra-ids", "100", "--vocab-size", "90"], "at least 16 and 100 extra ids"),
    ],
)
def test_wrong_options_are_named(options, reason):
    with pytest.raises(UserError, match=reason):
        main(["tokenizer", *options])
