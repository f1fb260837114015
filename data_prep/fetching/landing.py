"""Where answers land: a thread that checks their headers, writes tars and ledgers, and closes parts that are whole."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_prep.fetching.ledger import FETCHED, Entry
from data_prep.fetching.part_file import Landed, PartFile
from data_prep.fetching.picture_header import read_header
from data_prep.sources.url_list import Row

BATCH_ROWS = 256
BATCH_BYTES = 8 << 20


class Arrival(NamedTuple):
    """A row that is not asked for any more in this run."""

    part: str
    row: Row
    key: str
    error: str
    message: str
    http_status: int
    final_url: str
    tries: int
    seconds: float
    body: bytes | bytearray
    held: int


@dataclass(frozen=True)
class Written:
    """What a batch was: told to the event loop when it is on its way to the disk."""

    errors: Sequence[str]
    bytes: int
    held: int
    closed: int
    """Parts that became whole."""


class Landing:
    """Takes arrivals until `close`; `told` and `failed` are called on its thread.

    told: after each batch. failed: once, with what the disk raised; after that arrivals are thrown away.
    """

    def __init__(
        self, *, max_pixels: int, told: Callable[[Written], None], failed: Callable[[Exception], None]
    ) -> None:
        self._max_pixels, self._told, self._failed = max_pixels, told, failed
        self._queue: queue.SimpleQueue[Arrival | tuple[PartFile, int] | None] = queue.SimpleQueue()
        self._parts: dict[str, tuple[PartFile, int]] = {}
        """By name: the part, and how many of its rows have not landed."""
        self._broken = False
        self._thread = threading.Thread(target=self._work, name="landing", daemon=True)
        self._thread.start()

    def open(self, part: PartFile, rows: int) -> None:
        """rows: how many of the part will land. The part is closed by this thread."""
        self._queue.put((part, rows))

    def put(self, arrival: Arrival) -> None:
        self._queue.put(arrival)

    def close(self) -> None:
        """Writes what has landed, gives up the parts that are not whole, and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            batch: list[Arrival] = []
            size, waits = 0, True
            while len(batch) < BATCH_ROWS and size < BATCH_BYTES:
                try:
                    item = self._queue.get(block=waits)
                except queue.Empty:
                    break
                if item is None:
                    going = False
                    break
                if isinstance(item, Arrival):
                    batch.append(item)
                    size += len(item.body)
                    waits = False
                else:
                    self._parts[item[0].stem] = item
                    # All of it may be in the ledger already.
                    waits = bool(item[1]) and not batch
                    if not item[1]:
                        break
            self._guarded(batch)
        for part, _ in self._parts.values():
            part.close()

    def _guarded(self, batch: Sequence[Arrival]) -> None:
        if not self._broken:
            try:
                self._told(self._write(batch))
                return
            except Exception as error:  # told to the loop, which raises it; rows that are fetched meanwhile are dropped
                self._broken = True
                self._failed(error)
        self._told(Written((), 0, sum(one.held for one in batch), 0))

    def _write(self, batch: Sequence[Arrival]) -> Written:
        by_part: defaultdict[str, list[Landed]] = defaultdict(list)
        for arrival in batch:
            by_part[arrival.part].append(self._landed(arrival))
        for stem, landed in by_part.items():
            part, left = self._parts[stem]
            part.write(landed)
            self._parts[stem] = part, left - len(landed)
        closed = [stem for stem, (_, left) in self._parts.items() if not left]
        for stem in closed:
            self._parts[stem][0].finish()
            del self._parts[stem]
        entries = [one.entry for landed in by_part.values() for one in landed]
        return Written(
            [one.error for one in entries],
            sum(one.bytes for one in entries),
            sum(one.held for one in batch),
            len(closed),
        )

    def _landed(self, arrival: Arrival) -> Landed:
        row, body = arrival.row, arrival.body
        entry = Entry(
            key=arrival.key,
            row=row.number,
            url=row.url,
            error=arrival.error,
            message=_printable(arrival.message),
            http_status=arrival.http_status,
            final_url=_printable(arrival.final_url),
            tries=arrival.tries,
            seconds=round(arrival.seconds, 3),
            caption=row.caption,
            carried=json.dumps(row.carried) if row.carried else "",
        )
        if entry.error:
            return Landed(entry, b"")
        try:
            header = read_header(bytes(body))
        except ValueError as error:
            entry.error, entry.message = "not_a_picture", str(error)
            return Landed(entry, b"")
        if header.width * header.height > self._max_pixels:
            entry.error = "too_many_pixels"
            entry.message = f"declares {header.width} x {header.height} pixels, more than {self._max_pixels}"
            return Landed(entry, b"")
        entry.error, entry.bytes, entry.sha256 = FETCHED, len(body), hashlib.sha256(body).hexdigest()
        entry.format, entry.width, entry.height = header.suffix, header.width, header.height
        return Landed(entry, body)


def _printable(text: str) -> str:
    """Headers of strangers hold bytes that no file of text can."""
    return text.encode("utf-8", "replace").decode()
