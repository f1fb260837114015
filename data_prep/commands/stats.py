"""The options of `limoe prep stats`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from limoe_dist.config.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from data_prep.inspection.packed_sets import PackedSet
    from data_prep.inspection.token_lengths import TokenLengths


@dataclass(frozen=True)
class Settings:
    """Show what packed shards hold: sizes, captions, scripts, sources, duplicates, and a sample of the rows.

    One pass over all columns but the pictures' bytes, of which only the sample is read. A table is printed; with --out
    also stats.json and stats.html are written, a page in one file with plots and a contact sheet. Pictures of the page
    are made anew, small, and captions are shown as they are: look at it before you pass it on.

    Exit status: 0 done, 2 an option is wrong or a shard cannot be read (`limoe prep verify` says
    more), 130 interrupted.
    """

    shards: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS [SHARDS ...]")]
    """Manifests, or folders that hold one: paths or URLs (s3://bucket/set/manifest.json). Several count as one."""
    out: Path | None = None
    """Folder for stats.json and stats.html."""
    sample: int = 48
    """Rows on the contact sheet."""
    seed: int = 0
    """Of the sample: another one shows other rows."""
    dedup: str = ""
    """drop.parquet of `limoe prep dedup`: what it found is counted, too."""


def run(settings: Settings) -> int:
    import datetime
    import json

    from data_prep.console import console, say
    from data_prep.inspection import stats as statistics
    from data_prep.inspection.near_result import read_near
    from data_prep.inspection.packed_sets import open_set
    from data_prep.inspection.stats_page import page
    from data_prep.watched import watched
    from data_prep.writing import writing
    from limoe_dist.config.parse import write_atomically

    _check(settings)
    sets = [open_set(place) for place in settings.shards]
    near = read_near(settings.dedup) if settings.dedup else None
    tokens = _tokens(sets)
    with watched("counting", sum(packed.manifest.rows for packed in sets), unit="rows") as advance:
        stats = statistics.collect(
            sets, sample=settings.sample, seed=settings.seed, tokens=tokens, near=near, advance=advance
        )
    content = stats.to_json()
    console().print(table(content))
    if settings.out:
        html = page(stats, content, made=datetime.datetime.now(datetime.UTC).date())
        with writing(settings.out):
            settings.out.mkdir(parents=True, exist_ok=True)
            write_atomically(settings.out / "stats.json", json.dumps(content, indent=2) + "\n")
            write_atomically(settings.out / "stats.html", html)
        say([f"{settings.out / 'stats.html'}: the page; stats.json beside it has all figures"])
    else:
        say(["--out FOLDER writes all figures, and a page with plots and pictures"])
    return 0


def _check(settings: Settings) -> None:
    from data_prep.writing import refuse_url

    refuse_url(settings.out)
    if not settings.shards:
        raise UserError("SHARDS: name at least one manifest.json, or a folder that holds one")
    if not 0 <= settings.sample <= 2000:
        raise UserError(f"--sample={settings.sample}: must be between 0 and 2000: a page holds all of them")
    if settings.seed < 0:
        raise UserError(f"--seed={settings.seed}: must be 0 or more")
    if settings.out and settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"--out {settings.out}: is a file: name a folder")


def _tokens(sets: list[PackedSet]) -> TokenLengths | None:
    """By the vocabulary of the first set that names one."""
    from data_prep.inspection.token_lengths import TokenLengths
    from data_prep.vocabulary.model_file import vocabulary_of
    from limoe_dist.data import places

    for packed in sets:
        if entry := packed.manifest.tokenizer:
            place = places.join(packed.folder, entry.file)
            model = places.read_small(place)
            vocabulary_of(model, place)
            return TokenLengths(model)
    return None


def table(content: dict[str, Any]) -> Table:
    """The main figures, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    from data_prep.inspection.findings import printable
    from data_prep.inspection.stats_page import percent

    shown = Table(
        "", "5 %", "median", "95 %", "largest", title=f"{content['rows']['total']:,} rows", title_justify="left"
    )
    pictures, captions, tokens = content["pictures"], content["captions"], content["tokens"]
    rows = {
        "shorter side, pixels": pictures["shorter_side"],
        "width / height": pictures["aspect"],
        "encoded picture, bytes": pictures["encoded_bytes"],
        "captions of a row": captions["a_row"],
        "characters of a caption": captions["characters"],
        "words of a caption": captions["words"],
    } | ({"tokens of a caption": tokens["a_caption"]} if tokens else {})
    for name, of in rows.items():
        if of["count"]:
            values = [of["quantiles"][share] for share in ("p5", "p50", "p95")] + [of["max"]]
            shown.add_row(name, *(f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values))
    shown.add_section()
    for name in ("without_caption", "without_picture"):
        shown.add_row(f"rows {name.replace('_', ' ')}", f"{content['rows'][name]:,}")
    for name in ("pictures", "captions"):
        of = content["duplicates"][name]
        shown.add_row(f"same {name}", f"{of['surplus']:,}", f"of {of['values']:,}")
    if near := content["duplicates"]["near"]:
        shown.add_row("keys that dedup drops", f"{near['rows']:,}")
    if tokens:
        shown.add_row("unknown pieces", percent(tokens["unknown_pieces_share"]))
        for length, share in tokens["cut_share_by_length"].items():
            shown.add_row(f"captions cut at text.length={length}", percent(share))
    shown.add_section()
    for one in captions["scripts"][:4]:
        shown.add_row(f"captions in {one['script']}", f"{one['captions']:,}", percent(one["share"]))
    for one in content["sources"]["largest"][:8]:
        shown.add_row(
            Text(f"source {printable(one['name'], most=40)}"),
            f"{one['rows']:,}",
            Text(printable(one["license"], most=30)),
        )
    return shown
