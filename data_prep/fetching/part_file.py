"""One part that is being written: pictures into a tar, rows into the ledger, so that a kill at any moment loses no row
that is in the ledger and leaves none in it twice.

The tar is written by hand, in plain ustar: a member's header is a template with four fields.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_prep.fetching import ledger
from data_prep.fetching.ledger import Entry
from data_prep.lock import Lock

BLOCK = 512
TAR_END = bytes(2 * BLOCK)


@dataclass(slots=True)
class Landed:
    """A row whose fetching has ended. `entry` is complete but for its place in the tar."""

    entry: Entry
    encoded: bytes | bytearray


class PartFile:
    """replaced: by key, the class of an earlier ledger's row whose place one of these takes.

    Raises UserError where another process works on the part; OSError where the disk is full or cannot be written."""

    def __init__(self, out: Path, stem: str, *, replaced: Mapping[str, str] | None = None) -> None:
        self.stem = stem
        self._replaced = replaced or {}
        self._tar_path, self._final_tar = out / f"{stem}.tar.partial", out / f"{stem}.tar"
        self._lines_path, self._table_path = out / f"{stem}.jsonl", out / f"{stem}.parquet"
        self._lock = Lock(out / f"{stem}.lock", f"{stem} of {out}")
        self._files: list[IO[bytes]] = []
        try:
            self.done: set[str] = set()
            """Keys of the rows that are in the ledger."""
            self.whole = self._table_path.exists()
            if self.whole:
                # Ended between the renaming of the table and the removing of the lines.
                self._remove_lines()
            else:
                self._open(out)
        except BaseException:
            self.close()
            raise

    def _open(self, out: Path) -> None:
        ledger.remove_temporaries(out, self.stem)
        if self._final_tar.exists():
            # Ended between the renaming of the tar and the writing of the table.
            os.replace(self._final_tar, self._tar_path)
        self._tar, self._lines = self._tar_path.open("ab"), self._lines_path.open("ab")
        self._files = [self._tar, self._lines]
        entries, length = ledger.read_lines(self._lines_path)
        kept = self._trusted(entries)
        if len(kept) < len(entries):
            length = sum(len(ledger.line_of(entry)) for entry in kept)
        self._end = kept[-1].end if kept else 0
        os.ftruncate(self._lines.fileno(), length)
        os.ftruncate(self._tar.fileno(), self._end)
        self.done = {entry.key for entry in kept}

    def _trusted(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The rows up to the first whose picture is not in the tar: after a power cut lines may outlive pictures."""
        with self._tar_path.open("rb") as tar:
            size = os.fstat(tar.fileno()).st_size
            for index, entry in enumerate(entries):
                if entry.end > size:
                    return entries[:index]
                if entry.at:
                    tar.seek(entry.at)
                    if hashlib.sha256(tar.read(entry.bytes)).hexdigest() != entry.sha256:
                        return entries[:index]
        return entries

    def write(self, landed: Sequence[Landed]) -> None:
        """Appends rows: first all pictures, then the lines that tell of them."""
        pieces: list[bytes | bytearray] = []
        for one in landed:
            if one.entry.error == ledger.FETCHED:
                one.entry.at = self._end + BLOCK
                self._end += _add_members(pieces, one)
            one.entry.end = self._end
        _write_all(self._tar, pieces)
        _write_all(self._lines, [ledger.line_of(one.entry) for one in landed])

    def finish(self) -> list[Entry]:
        """Closes the part: the tar under its name, then the table, then no lines. Returns all its rows."""
        entries, _ = ledger.read_lines(self._lines_path)
        if any(entry.error == ledger.FETCHED for entry in entries):
            _write_all(self._tar, [TAR_END])
            os.fsync(self._tar.fileno())
            os.replace(self._tar_path, self._final_tar)
        else:
            self._tar_path.unlink()
        replaced = Counter(self._replaced[entry.key] for entry in entries if entry.key in self._replaced)
        ledger.write_table(self._table_path, entries, replaced)
        self._remove_lines()
        self.close()
        return entries

    def _remove_lines(self) -> None:
        with suppress(FileNotFoundError):
            self._lines_path.unlink()

    def close(self) -> None:
        """Gives the part up as it is; to open it again goes on with it."""
        for file in self._files:
            with suppress(OSError):
                file.close()
        self._lock.close()


def _write_all(file: IO[bytes], pieces: Sequence[bytes | bytearray]) -> None:
    file.writelines(pieces)
    file.flush()


def _add_members(pieces: list[bytes | bytearray], landed: Landed) -> int:
    """Adds a row's members, the picture first; returns their bytes."""
    entry = landed.entry
    told = {
        "key": entry.key,
        "url": entry.url,
        "caption": entry.caption,
        "sha256": entry.sha256,
        "width": entry.width,
        "height": entry.height,
    }
    carried = json.loads(entry.carried) if entry.carried else {}
    # A list may have such columns too (DataComp: sha256): what it says of the picture is not what came.
    told |= {name if name not in told else f"list_{name}": value for name, value in carried.items()}
    members = (
        (entry.format, landed.encoded),
        ("txt", entry.caption.encode("utf-8", "replace")),
        ("json", json.dumps(told).encode()),
    )
    size = 0
    for suffix, content in members:
        padding = -len(content) % BLOCK
        pieces += [member_header(f"{entry.key}.{suffix}", len(content)), content, bytes(padding)]
        size += BLOCK + len(content) + padding
    return size


def member_header(name: str, size: int) -> bytes:
    """A ustar header of a plain file: name below 100 bytes, size below 8 GiB; no owner, no time."""
    header = b"%-100b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00        0" % (b"", size)
    header = name.encode().ljust(100, b"\0") + header[100:]
    header = header.ljust(257, b"\0") + b"ustar\x0000"
    header = header.ljust(BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]
