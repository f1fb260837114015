"""The options of `limoe prep verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from limoe_dist.config.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from data_prep.inspection.findings import Findings


@dataclass(frozen=True)
class Settings:
    """Check packed shards against their manifest: checksums, columns, texts, keys, pictures, tokenizer.

    Every shard is read once, whole. Of every row the texts, the key and the picture's header are checked; of a sample,
    or with --all of every row, the picture is also decoded and compared with its checksum. A shard of a store is copied
    to the temporary folder ($TMPDIR), one for each worker at a time. One flipped bit is found, and so are
    shards that are missing, cut off, exchanged or left over.

    Exit status: 0 all is as the manifest says, 1 something is wrong (the table and --json say what), 2 an option or
    the manifest itself cannot be read, 130 interrupted.
    """

    shards: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS [SHARDS ...]")]
    """Manifests, or folders that hold one: paths or URLs (s3://bucket/set/manifest.json)."""
    sample: int = 500
    """Pictures to decode of each set, spread over all shards, at least one of each."""
    all: bool = False
    """Decode every picture."""
    seed: int = 0
    """Of the sample: another one looks at other rows."""
    workers: int = 2
    """Shards read at a time, each by a process; what is found does not depend on it."""
    json: Path | None = None
    """Write the findings to this file, too."""


def run(settings: Settings) -> int:
    import json
    import time

    from data_prep.console import console, say
    from data_prep.inspection import verify as verifying
    from data_prep.inspection.findings import printable
    from data_prep.watched import watched
    from data_prep.writing import writing
    from limoe_dist.config.parse import write_atomically

    _check(settings)
    began, sets = time.monotonic(), [verifying.open_set(place) for place in settings.shards]
    done = []
    for packed in sets:
        what = f"verifying {printable(packed.manifest.name or packed.place)}"
        with watched(what, packed.manifest.rows, unit="rows") as advance:
            sample = None if settings.all else settings.sample
            done.append(
                verifying.verify(packed, sample=sample, seed=settings.seed, workers=settings.workers, advance=advance)
            )
        if done[-1].findings:
            console().print(table(done[-1].findings))
        say(verifying.summary(done[-1]))
    wrong = any(one.findings for one in done)
    if settings.json:
        content = {
            "result": "wrong" if wrong else "ok",
            "seconds": round(time.monotonic() - began, 1),
            "sample": "all" if settings.all else settings.sample,
            "seed": settings.seed,
            "sets": [one.to_json() for one in done],
        }
        with writing(settings.json):
            write_atomically(settings.json, json.dumps(content, indent=2) + "\n")
    return 1 if wrong else 0


def table(findings: Findings) -> Table:
    """The findings by kind, the first of each by name."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("finding", "count", "where", "what", title="what is wrong", title_justify="left")
    for kind, count, first in findings:
        for number, one in enumerate(first):
            head = (kind, f"{count:,}") if not number else ("", "")
            shown.add_row(*head, Text(one.where), Text(one.what))
        if count > len(first):
            shown.add_row("", "", f"and {count - len(first):,} more", "")
    return shown


def _check(settings: Settings) -> None:
    from data_prep.writing import refuse_url

    refuse_url(settings.json, "--json")
    if not settings.shards:
        raise UserError("SHARDS: name at least one manifest.json, or a folder that holds one")
    for name, value in (("sample", settings.sample), ("workers", settings.workers)):
        if value < 1:
            raise UserError(f"--{name}={value}: must be 1 or more")
    if settings.seed < 0:
        raise UserError(f"--seed={settings.seed}: must be 0 or more")
    if settings.json and not settings.json.absolute().parent.is_dir():
        raise UserError(f"--json {settings.json}: its folder does not exist")
