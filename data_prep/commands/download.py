"""The options of `limoe prep download`, and those that it shares with `limoe prep retry-failed`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from limoe_dist.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Network:
    """How pictures are asked for."""

    connections: int = 256
    """Pictures that are fetched at a time."""
    per_host: int = 32
    """Of one host at a time."""
    timeout: float = 30.0
    """Seconds for one try, from the first look-up to the last byte, redirects and all."""
    connect_timeout: float = 10.0
    """Seconds for one connection to be made."""
    retries: int = 4
    """The most times that a row is tried again; how often which class is, the documentation lists. 0: never."""
    patience: float = 60.0
    """Seconds that a host may be left alone (429, 503, or failing again and again) before its rows are given up."""
    redirects: int = 5
    """The most redirects that are followed."""
    max_mb: float = 20.0
    """Larger bodies are refused."""
    max_megapixels: float = 64.0
    """Pictures whose headers declare more million pixels are refused."""
    memory_mb: float = 512.0
    """Megabytes of bodies that may be in memory."""
    user_agent: str = "limoe-dist/1.0"
    """Sent with each request; the part before the slash is the name that X-Robots-Tag may address."""
    ignore_robots_tag: bool = False
    """Take pictures whose X-Robots-Tag asks not to (noai, noimageai, noindex, noimageindex, none)."""
    ignore_tls: bool = False
    """Take pictures from hosts whose certificate is not good."""
    allow_private: tuple[str, ...] = ()
    """Networks that are not public and may be fetched from, as 10.1.0.0/16 or 127.0.0.1:8080; never link-local ones."""
    unit: str = ""
    """I/N: this process does the parts p with p % N = I; empty: from a Slurm array or mpirun, else all."""


@dataclass(frozen=True, kw_only=True)
class Settings(Network):
    """Fetch the pictures of a list of addresses into WebDataset tars, with a ledger row for each address.

    Lists are parquet, CSV or TSV (also .gz), by path, pattern or URL: LAION, DataComp, COYO, CC3M and CC12M are
    recognised. The same command goes on where it was stopped or killed, and asks for no row twice. Only public
    addresses are connected to, and X-Robots-Tag is honoured.

    Exit status: 0 every row is in the ledger, 1 not one picture came, 2 a setting or file that you can mend, 130 or
    143 stopped by Ctrl-C or SIGTERM.
    """

    list: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PLACE [PLACE ...]")]
    """Files, folders, patterns or URLs (s3://, https://) of lists."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for part-00000.tar (KEY.jpg, KEY.txt, KEY.json), part-00000.parquet (the ledger) and download.json."""
    url_column: str = ""
    """Column of the addresses; empty: url, image_url, img_url, imageurl or link, in letters of any case."""
    caption_column: str = ""
    """Column of the captions; empty: caption, text, alt_text, alt, description or title."""
    keep_columns: tuple[str, ...] | None = None
    """Other columns that are carried into KEY.json, as scores; not given: all of text, numbers or truth values."""
    header: tuple[str, ...] = ()
    """Names of the columns, for CSV and TSV without a header line."""
    rows_per_part: int = 10_000
    """Rows of a list that go into one tar."""


def run(settings: Settings) -> int:
    from data_prep.fetching import download_folder as folder
    from data_prep.fetching.download_parts import MOST_ROWS_PER_PART, ListParts
    from data_prep.fetching.download_run import fetch, of_options, told_settings
    from data_prep.sources.url_list import Columns, open_list
    from data_prep.units import find_meeting, find_unit

    if not settings.list:
        raise UserError("--list: name at least one list of addresses")
    if "://" in str(settings.out) or ":/" in str(settings.out):
        raise UserError(f"--out {settings.out}: must be a folder of this machine; copy it to a store afterwards")
    if not 0 < settings.rows_per_part <= MOST_ROWS_PER_PART:
        raise UserError(f"--rows-per-part={settings.rows_per_part}: must be from 1 to {MOST_ROWS_PER_PART}")
    how = of_options(settings)
    unit = find_unit(settings.unit, find_meeting())
    columns = Columns(settings.url_column, settings.caption_column, settings.keep_columns, settings.header)
    listed = open_list(settings.list, columns)
    folder.begin(settings.out, folder.Origin.of(listed, settings.rows_per_part), told_settings(settings))
    parts = ListParts(listed, settings.out, settings.rows_per_part, unit)
    return fetch(settings.out, iter(parts), how, unit=unit, rows_left=parts.rows_left(), rows=lambda: parts.rows)
