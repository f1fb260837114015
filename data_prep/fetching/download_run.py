"""From a command's options to a run of data_prep/fetching/download.py, its display and its end."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.commands.download import Network
from data_prep.console import console, say
from data_prep.fetching import download_folder as folder
from data_prep.fetching.addresses import AddressPolicy, parse_allowed
from data_prep.fetching.download import Download
from data_prep.fetching.download_progress import Watch, duration, table
from data_prep.fetching.download_state import Part, Settings
from data_prep.fetching.fetch import Limits
from data_prep.fetching.ledger import FETCHED, Totals
from data_prep.units import Unit
from limoe_dist.config.errors import UserError


def of_options(options: Network) -> Settings:
    """Raises UserError for a value that is out of its range."""
    for name, low, high in _RANGES:
        value = getattr(options, name)
        # Written so that nan fails.
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')}={value:g}: must be from {low:g} to {high:g}")
    if options.memory_mb < options.max_mb:
        raise UserError(
            f"--memory-mb={options.memory_mb:g}: must be at least --max-mb={options.max_mb:g}, or its largest picture "
            "could not be fetched"
        )
    if not options.user_agent.isprintable() or not options.user_agent.isascii():
        raise UserError(f"--user-agent {options.user_agent!r}: must be plain ASCII")
    limits = Limits(
        deadline_s=options.timeout,
        connect_s=options.connect_timeout,
        max_bytes=int(options.max_mb * 1e6),
        max_redirects=options.redirects,
        user_agent=options.user_agent,
        obey_robots=not options.ignore_robots_tag,
        verify_tls=not options.ignore_tls,
    )
    return Settings(
        connections=options.connections,
        per_host=options.per_host,
        retries=options.retries,
        patience_s=options.patience,
        memory_bytes=int(options.memory_mb * 1e6),
        max_pixels=int(options.max_megapixels * 1e6),
        limits=limits,
        policy=AddressPolicy(parse_allowed(options.allow_private)),
    )


_RANGES = (
    ("connections", 1, 10_000),
    ("per_host", 1, 10_000),
    ("timeout", 0.1, 3_600),
    ("connect_timeout", 0.1, 3_600),
    ("retries", 0, 20),
    ("patience", 0, 86_400),
    ("redirects", 0, 20),
    ("max_mb", 0.001, 1_000),
    ("max_megapixels", 0.001, 1_000),
    ("memory_mb", 1, 1_000_000),
)


def told_settings(options: Any) -> dict[str, Any]:
    """The options as download.json tells them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def fetch(
    out: Path,
    parts: Iterator[Part],
    settings: Settings,
    *,
    unit: Unit,
    rows_left: int | None,
    rows: Callable[[], int | None],
) -> int:
    """Runs until all parts are whole or a signal comes, tells about it, and writes download.json. Returns the status.

    rows: the length of the whole list, asked for at the end. Raises UserError where the list, the folder or another
    process forbids to go on; what has come by then is in the ledger, and told.
    """
    _allow_files(settings.connections)
    download = Download(out, parts, settings)
    problem: UserError | None = None
    try:
        asyncio.run(_watched(download, rows_left))
    except UserError as error:
        problem = error
    done = download.progress
    whole = problem is None and not download.stopped_by
    run = {
        "rows": done.rows,
        "bytes": done.bytes,
        "seconds": round(done.seconds, 2),
        "by_class": dict(done.errors),
        "unit": str(unit),
        "stopped_by_signal": download.stopped_by,
    }
    try:
        totals = folder.end(out, rows=rows() if whole else None, run=run)
    except OSError as error:
        raise problem or folder.no_room(error, out) from None
    _summary(out, download, totals, unit)
    if problem is not None:
        raise problem
    if download.stopped_by:
        return 128 + download.stopped_by
    return 1 if totals.all and not totals.rows[FETCHED] else 0


def _allow_files(connections: int) -> None:
    """Raises the limit of open files, which many systems begin at 1,024; beyond it connections would fail row by row.

    Raises UserError where the system does not allow enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed, wanted = connections + FILES_BESIDE, SOCKETS_PER_CONNECTION * connections + FILES_BESIDE
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed < needed:
        raise UserError(
            f"--connections={connections}: needs {needed} open files, and this system allows {hard} (ulimit -Hn): "
            "give fewer connections, or raise the limit"
        )
    with suppress(ValueError, OSError):  # a limit of the kernel's own, as macOS has
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


SOCKETS_PER_CONNECTION = 16
"""Those in use and those that are kept for a host's next row."""
FILES_BESIDE = 200


async def _watched(download: Download, rows_left: int | None) -> None:
    watch = asyncio.create_task(Watch(download.progress, console(), rows_left).show())
    try:
        await download.run()
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


def _summary(out: Path, download: Download, totals: Totals, unit: Unit) -> None:
    done = download.progress
    seconds = max(done.seconds, 1e-9)
    rate = f"{done.rows / seconds:,.0f} rows/s, {done.bytes / seconds / 1e6:.1f} MB/s"
    which = "" if unit.count == 1 else f" by {unit}"
    say([f"{out}: {done.rows:,} rows{which}, {done.errors[FETCHED]:,} pictures in {duration(seconds)} ({rate})"])
    if done.errors:
        console().print(table(done.errors))
    say([f"in the folder: {totals.all:,} rows in {totals.parts:,} parts, {totals.bytes / 1e6:,.1f} MB of pictures"])
    if download.stopped_by:
        say(["stopped: the same command goes on from here"])
