"""`limoe prep`: data, from public packages and folders of pictures to shards with a vocabulary."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from limoe_dist.config.errors import UserError, nearest


@dataclass(frozen=True)
class FetchDemo:
    """Fetch open emoji art and captions (and photographs) through npm and apt, as folders for `limoe prep pack`."""

    out: Path
    """Folder for train/, validation/, photos/ and downloads/; what is there already is kept."""
    photos: bool = False
    """Also fetch about 950 captioned photographs and cut-outs from Debian's tuxpaint-stamps-default (161 MB)."""
    size: int = 96
    """Side of an emoji picture, in pixels; larger than the model's, so that crops stay sharp."""
    photo_size: int = 256
    """Longer side of a photograph, in pixels."""
    task: Literal["objects", "all"] = "objects"
    """objects: animals and nature, food, activities, travel and objects. all: also people, smileys, symbols, flags."""


@dataclass(frozen=True)
class Pack:
    """Pack folders of pictures and captions into Arrow shards with a manifest.

    A line of captions.jsonl is a pair, {"image": "a.png", "captions": ["a red apple"], "concept": "apple"}; a picture
    alone, {"image": "a.png", "concept": "apple"}; or a text alone, {"caption": "a red apple"}. Evaluation takes all
    three, training needs pairs: `limoe train --data.mixture` joins several manifests by weights.
    """

    source: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER [FOLDER ...]")]
    """Folders that hold captions.jsonl or captions.csv beside their pictures, or such captions files."""
    out: Path
    """Folder for shards and manifest.json."""
    name: str = ""
    """Name of the data set in the manifest; empty: the name of the folder."""
    shard_mb: float = 64.0
    """A shard closes when its pictures reach this many megabytes."""
    seed: int = 0
    """Seed of the order in which rows of all sources are mixed."""
    max_image_mb: float = 20.0
    """Larger encoded pictures are rejected."""
    max_megapixels: float = 32.0
    """Pictures with more million pixels are rejected before they are decoded; training reads up to 33."""
    threads: int = 2
    """Pictures decoded at a time; the shards do not depend on it."""
    overwrite: bool = False
    """Replace shards that were packed from other inputs or settings."""


@dataclass(frozen=True)
class TrainTokenizer:
    """Train a SentencePiece vocabulary from the captions of packed shards."""

    data: Path
    """manifest.json of the shards; tokenizer.model is written beside it and named in it."""
    vocab_size: int = 32_000
    """The most pieces; a small set of captions gives fewer."""
    overwrite: bool = False
    """Replace a vocabulary that was trained with other settings."""


def fetch_demo(given: FetchDemo) -> None:
    from data_prep import demo

    demo.fetch_demo(
        given.out,
        photos=given.photos,
        size=given.size,
        photo_size=given.photo_size,
        task=given.task,
        console=_console(),
    )


def pack(given: Pack) -> None:
    from data_prep import pack as packing
    from data_prep.pictures import Caps

    if not given.source:
        raise UserError("--source: name at least one folder of pictures and captions")
    for name, value in (
        ("shard-mb", given.shard_mb),
        ("max-image-mb", given.max_image_mb),
        ("max-megapixels", given.max_megapixels),
        ("threads", given.threads),
    ):
        if not value > 0:
            raise UserError(f"--{name}={value:g}: must be above 0")
    settings = packing.PackSettings(
        name=given.name or given.out.resolve().name,
        shard_bytes=int(given.shard_mb * 1e6),
        seed=given.seed,
        caps=Caps(max_bytes=int(given.max_image_mb * 1e6), max_pixels=int(given.max_megapixels * 1e6)),
    )
    console = _console()
    packed = packing.pack(
        given.source, given.out, settings, threads=given.threads, overwrite=given.overwrite, console=console
    )
    for line in packing.summary(packed, given.out):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def train_tokenizer(given: TrainTokenizer) -> None:
    from data_prep import train_tokenizer as training

    trained = training.train_tokenizer(given.data, vocab_size=given.vocab_size, overwrite=given.overwrite)
    how = "unchanged" if trained.skipped else "trained"
    print(
        f"{trained.tokenizer.file}: {how}, {trained.tokenizer.vocab_size} of at most {given.vocab_size} pieces, "
        f"named in {given.data}"
    )


@dataclass(frozen=True)
class Command:
    about: str
    settings: Any
    run: Callable[[Any], None]


COMMANDS = {
    "fetch-demo": Command("fetch open emoji art (and photographs) with captions", FetchDemo, fetch_demo),
    "pack": Command("pack folders of pictures and captions into Arrow shards", Pack, pack),
    "tokenizer": Command("train a SentencePiece vocabulary from the shards' captions", TrainTokenizer, train_tokenizer),
}


def usage() -> str:
    lines = [f"  {name:<12}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: limoe prep COMMAND [OPTIONS]", "", *lines, "", "limoe prep COMMAND --help says more."])


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit status: 0, or 2 for options that are wrong. Lets UserError pass."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f'unknown command "prep {name}"{nearest(name, COMMANDS)} (commands: {", ".join(COMMANDS)})')
    command = COMMANDS[name]
    _refuse_repeats(argv[1:])
    try:
        given = tyro.cli(command.settings, args=argv[1:], prog=f"limoe prep {name}")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    command.run(given)
    return 0


def _refuse_repeats(options: list[str]) -> None:
    """Of an option given twice only the last would count, and `--source A --source B` would lose A."""
    named = [option.partition("=")[0] for option in options if option.startswith("--")]
    for name in named:
        if named.count(name) > 1:
            raise UserError(f"{name} is given {named.count(name)} times: give it once, with all its values behind it")


def _console() -> Any:
    from rich.console import Console

    return Console()
