"""The options of `limoe prep retry-failed`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from data_prep.commands.download import Network
from limoe_dist.config.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Settings(Network):
    """Ask again for rows of a download that failed, of chosen classes.

    Pictures that come now lie in tars of their own, part-00000-retry-01.tar; their ledgers take the place of the
    earlier rows in all counts. Parts that the download has not finished are left to `limoe prep download`. The same
    command goes on where it was stopped. Exit status as of `limoe prep download`.
    """

    folder: tyro.conf.Positional[Path]
    """Folder that `limoe prep download` filled."""
    classes: str = ""
    """Classes with commas between, as timeout,http_5xx; empty: those that time may heal."""


def run(settings: Settings) -> int:
    from data_prep.fetching import download_folder as folder
    from data_prep.fetching import ledger
    from data_prep.fetching.download_parts import failed_parts
    from data_prep.fetching.download_run import fetch, of_options
    from data_prep.fetching.fetch_errors import CLASSES, RETRY_LATER
    from data_prep.units import find_meeting, find_unit

    classes = {name.strip() for name in settings.classes.split(",") if name.strip()} or {*RETRY_LATER}
    for name in sorted(classes - {*CLASSES}):
        raise UserError(f"--classes {name}: is none of {', '.join(CLASSES)}{nearest(name, CLASSES)}")
    how = of_options(settings)
    if folder.read(settings.folder) is None:
        raise UserError(f"{settings.folder}: has no {folder.FILE}: name a folder that `limoe prep download` filled")
    folder.writable(settings.folder)
    unit = find_unit(settings.unit, find_meeting())
    before = ledger.totals(settings.folder).rows
    left = sum(before[name] for name in classes) if unit.count == 1 else None
    parts = failed_parts(settings.folder, classes, unit)
    return fetch(settings.folder, parts, how, unit=unit, rows_left=left, rows=lambda: None)
