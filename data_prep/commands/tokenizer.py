"""The options of `limoe prep tokenizer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from limoe_dist.config.errors import UserError

if TYPE_CHECKING:
    from data_prep.vocabulary.train_tokenizer import Trained
    from data_prep.vocabulary.vocabulary import Options


@dataclass(frozen=True)
class Settings:
    """Train a SentencePiece vocabulary from captions, or take one that exists, and name it in the shards' manifests.

    The model is written as tokenizer.model beside each manifest of --data; training and evaluation find it there. Ids:
    0 pad, 1 end of text, 2 unknown, then the extra ids. The same captions and options give the same bytes. What it does
    to captions (tokens each, unknown pieces, how many are cut off) is printed and kept in tokenizer.json beside it.

    Exit status: 0 done, 2 an option is wrong or the captions cannot be read, 130 interrupted.
    """

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MANIFEST [MANIFEST ...]")] = ()
    """manifest.json of local shards, or their folders: one vocabulary is trained from all, and named in each."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PLACE[:COLUMN] [...]")] = ()
    """Further captions, only read: .parquet, .csv, .tsv, .jsonl and .txt files (also .gz), folders or patterns of them,
    or manifest.json of shards; paths or URLs. COLUMN: where the captions are; a number where a list has no line of
    names, from 0."""
    out: Path | None = None
    """Folder that tokenizer.model is written to as well: needed without --data."""
    use: str = ""
    """An existing SentencePiece model (path or URL, as T5's spiece.model), taken as it is: nothing is trained."""
    vocab_size: int = 32_000
    """The most pieces, with all special ones; a small set of captions gives fewer."""
    model: Literal["unigram", "bpe"] = "unigram"
    """Kind of pieces; T5 and LIMoE have unigram."""
    character_coverage: float = 0.9995
    """Share of all characters that the vocabulary knows; the rarest others are unknown, or bytes."""
    byte_fallback: bool = False
    """Cut an unknown character into its bytes: nothing is unknown, and 256 pieces are spent."""
    split_digits: bool = False
    """Each digit is a piece of its own."""
    case: Literal["lower", "keep"] = "lower"
    """keep: for a model that is used elsewhere, too. Training here lower-cases captions: capitals would idle."""
    extra_ids: int = 0
    """Sentinels <extra_id_0>, <extra_id_1>... from id 3 on, which no caption can spell; T5 has 100."""
    sample: int = 5_000_000
    """Captions to train from at most, drawn at random from all, each as likely as any other."""
    sample_mb: float = 1000.0
    """Memory of that sample, in megabytes. SentencePiece needs about twenty times the captions' bytes on top."""
    seed: int = 0
    """Of the sample."""
    overwrite: bool = False
    """Replace a vocabulary that was trained with other settings."""


def run(settings: Settings) -> int:
    from data_prep.console import say
    from data_prep.vocabulary import train_tokenizer as training
    from data_prep.watched import watched

    data = _check(settings)
    with watched("reading captions", 0, unit="captions") as advance:
        if settings.use:
            done = training.use_model(
                settings.use,
                data,
                overwrite=settings.overwrite,
                texts=settings.text,
                out=settings.out,
                seed=settings.seed,
                advance=advance,
            )
        else:
            done = training.train_tokenizer(
                data,
                vocab_size=settings.vocab_size,
                overwrite=settings.overwrite,
                texts=settings.text,
                out=settings.out,
                options=_options(settings),
                advance=advance,
            )
    say(_told(settings, done))
    return 0


def _options(settings: Settings) -> Options:
    from data_prep.vocabulary.vocabulary import Options

    return Options(
        model=settings.model,
        character_coverage=settings.character_coverage,
        byte_fallback=settings.byte_fallback,
        split_digits=settings.split_digits,
        case=settings.case,
        extra_ids=settings.extra_ids,
        sample_captions=settings.sample,
        sample_bytes=int(settings.sample_mb * 1e6) if 0 < settings.sample_mb < 1e9 else 0,
        seed=settings.seed,
    )


def _check(settings: Settings) -> list[Path]:
    """The manifests, as local paths."""
    from data_prep.writing import refuse_url
    from limoe_dist.data import places

    refuse_url(settings.out)
    for place in settings.data:
        if places.is_remote(place):
            raise UserError(
                f"--data {place}: is a URL, and the vocabulary is written beside its manifest: give it to --text, with "
                "--out FOLDER, and copy the model to it"
            )
    if not settings.data and not settings.text:
        raise UserError("--data: name at least one manifest.json of shards; or captions by --text, with --out FOLDER")
    if not settings.data and settings.out is None:
        raise UserError("--out: name a folder for the vocabulary: without --data there is no manifest to put it beside")
    if settings.out and settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"--out {settings.out}: is a file: name a folder")
    if settings.use and _changed(settings):
        raise UserError(f"--use takes the model as it is: leave out {', '.join(_changed(settings))}")
    return [places.local(place) for place in settings.data]


def _changed(settings: Settings) -> Sequence[str]:
    """Options of a training that were given."""
    names = ("vocab_size", "model", "character_coverage", "byte_fallback", "split_digits", "case", "extra_ids")
    plain = {field.name: field.default for field in Settings.__dataclass_fields__.values()}
    return [f"--{name.replace('_', '-')}" for name in names if getattr(settings, name) != plain[name]]


def _told(settings: Settings, done: Trained) -> list[str]:
    pieces = done.tokenizer.vocab_size
    how = "unchanged" if done.skipped else f"taken from {settings.use}" if settings.use else "trained"
    size = f"{pieces} pieces" if settings.use else f"{pieces} of at most {settings.vocab_size} pieces"
    places = [f"named in {place}" for place in settings.data] + ([f"written to {settings.out}"] if settings.out else [])
    lines = [f"{done.tokenizer.file}: {how}, {size}, {', '.join(places)}"]
    if not settings.data:
        lines.append(f"  a run takes it with --data.tokenizer {settings.out}/{done.tokenizer.file}")
    lines.append(f"  a run needs text.vocab_size={pieces} or more")
    if done.coverage:
        lines += _coverage(done.coverage)
    if settings.case == "keep":
        lines.append("  --case keep: training here lower-cases every caption, so pieces with capitals will not be used")
    return lines


def _coverage(of: dict[str, Any]) -> list[str]:
    which = "not trained on" if of["held_out"] else "of those that it was trained from"
    share = {length: f"{100 * cut:.1f} %" for length, cut in of["cut_share_by_length"].items()}
    cuts = ", ".join(f"{cut} cut off at text.length={length}" for length, cut in share.items())
    lines = [
        f"  on {of['captions']:,} captions, {which}, of {of['captions_read']:,}: "
        f"{of['a_caption']['mean'] or 0:.1f} tokens a caption on average, {cuts}",
        f"  {100 * of['unknown_pieces_share']:.3f} % of the pieces are unknown, "
        f"{100 * of['captions_with_unknown_share']:.2f} % of the captions have one",
    ]
    if of["byte_pieces_share"]:
        lines.append(f"  {100 * of['byte_pieces_share']:.2f} % of the pieces are single bytes")
    return lines
