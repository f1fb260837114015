"""OUT/download.json: which list a folder is from, how it was fetched last, and what has come of it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.fetching import ledger
from data_prep.lock import Lock
from data_prep.sources.url_list import UrlList
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically

FILE = "download.json"
FORMAT, VERSION = "limoe-download", 1
LOCK_WAIT_S = 20.0
"""Units that were started together write the file one behind the other."""


@dataclass(frozen=True)
class Origin:
    """What decides which row is in which part: it may not change while a folder is filled."""

    files: list[list[str]]
    """Places with their identities."""
    columns: dict[str, Any]
    rows_per_part: int

    @classmethod
    def of(cls, listed: UrlList, rows_per_part: int) -> Origin:
        columns = json.loads(json.dumps(asdict(listed.columns)))
        return cls(listed.identity(), columns, rows_per_part)


def begin(out: Path, origin: Origin, settings: dict[str, Any]) -> None:
    """Makes the folder, or checks that it is of the same list. Raises UserError where it is not, or is read-only."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with Lock(out / "download.lock", str(out / FILE), wait_s=LOCK_WAIT_S):
            told = read(out)
            if told is None:
                if any(out.glob("part-*")):
                    raise UserError(f"--out {out}: holds parts, but no {FILE}: choose an empty folder")
                told = {"format": FORMAT, "version": VERSION, **asdict(origin)}
            elif changed := _changed(told, asdict(origin)):
                raise UserError(
                    f"--out {out}: was begun with {changed}: a folder is filled from one list, in parts of one size; "
                    "choose another --out, or give the list as it was"
                )
            _write(out, told | {"settings": settings})
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _changed(told: dict[str, Any], origin: dict[str, Any]) -> str:
    """What differs, in words; empty: nothing."""
    if told.get("rows_per_part") != origin["rows_per_part"]:
        return f"--rows-per-part {told.get('rows_per_part')}, now {origin['rows_per_part']}"
    if told.get("columns") != origin["columns"]:
        return f"other columns ({json.dumps(told.get('columns'))})"
    before, now = told.get("files", []), origin["files"]
    if [name for name, _ in before] != [name for name, _ in now]:
        return f"another list ({', '.join(name for name, _ in before[:3])}, {len(before)} files)"
    return next(
        (f"another {one[0]}: it has changed since" for one, two in zip(before, now, strict=True) if one != two), ""
    )


def read(out: Path) -> dict[str, Any] | None:
    """None: there is none. Raises UserError where it is not ours."""
    path = out / FILE
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT or told["version"] != VERSION:
            raise ValueError(f"{told['format']} {told['version']}")
        [(str(name), str(mark)) for name, mark in told["files"]]
        return dict(told)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not of this version of `limoe prep download`: {error!r}") from None


def end(out: Path, *, rows: int | None, run: dict[str, Any]) -> ledger.Totals:
    """Adds up the ledgers and writes them down. rows: of the whole list; None: not known yet. run: of this process."""
    with Lock(out / "download.lock", str(out / FILE), wait_s=LOCK_WAIT_S):
        told = read(out) or {}
        found = ledger.totals(out)
        rows = rows if rows is not None else told.get("rows")
        told |= {
            "rows": rows,
            "complete": rows is not None and found.all == rows,
            "totals": {"rows": found.all, "parts": found.parts, "bytes": found.bytes, "by_class": dict(found.rows)},
            "last_run": run,
        }
        _write(out, told)
    return found


def _write(out: Path, told: dict[str, Any]) -> None:
    write_atomically(out / FILE, json.dumps(told, indent=2) + "\n")


def no_room(error: OSError, out: Path) -> UserError:
    """What the disk said, with what to do: rows in the ledger stay."""
    return UserError(
        f"--out {out}: cannot be written: {error.strerror or error}; what is in the ledger is whole and stays: "
        "make room or mend the disk, and run the same command again"
    )


def writable(out: Path) -> None:
    """Raises UserError where files cannot be made there."""
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"{out}: files cannot be made there: check its rights")
