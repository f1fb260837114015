"""Rows of a WebDataset tar: neighbouring members of one key, KEY.jpg, KEY.txt and KEY.json, are one row."""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from data_prep.sources.columns import key_problem
from data_prep.sources.source import BLOCK_ROWS
from data_prep.sources.tar import BrokenTarError, Bytes, Member, members

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "caption", "text")
BLOCK_BYTES = 32 << 20
"""A block closes at so many bytes: it is read in one go."""
INDEX_VERSION = 1
"""Raised when the same tar gives other blocks."""


@dataclass(slots=True)
class TarRow:
    key: bytes
    start: int
    picture: Member | None = None
    text: Member | None = None
    json: Member | None = None
    other: str = ""
    """Ending of a member that is passed over."""
    problem: str = ""
    """Why the row is refused, the first reason."""

    @property
    def is_row(self) -> bool:
        """Members of other programs alone (a README, class numbers) are none."""
        return bool(self.picture or self.text or self.json or self.problem)


@dataclass(frozen=True)
class TarIndex:
    """Where the rows of one tar are."""

    blocks: tuple[tuple[int, int, int, int], ...]
    """(first row, rows, first byte, byte behind the last)"""
    repeated: frozenset[int]
    """Rows whose key is also elsewhere in the tar: which of them is meant cannot be told, and all are refused."""

    @property
    def rows(self) -> int:
        return self.blocks[-1][0] + self.blocks[-1][1]


def tar_rows(found: Iterable[Member]) -> Iterator[TarRow]:
    """Rows in the order of the tar; memory does not grow with the members of a row."""
    row = None
    for member in found:
        parts = _parts(member)
        if parts is None:
            continue
        key, ending = parts
        if row is None or key != row.key:
            if row is not None and row.is_row:
                yield row
            row = TarRow(key, member.start)
        _add(row, member, ending)
    if row is not None and row.is_row:
        yield row


def _parts(member: Member) -> tuple[bytes, str] | None:
    """(key, ending in lower case): WebDataset cuts a name at the first dot of its last part. None: passed over."""
    name = member.name
    while name.startswith(b"./"):
        name = name[2:]
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    if member.kind == "a directory" or dot == base or base == len(name):
        return None  # ".hidden", and what macOS adds
    if dot < 0:
        return name, ""
    return name[:dot], name[dot + 1 :].decode("ascii", "replace").lower()


def _add(row: TarRow, member: Member, ending: str) -> None:
    slot = "picture" if ending in PICTURES else "text" if ending in TEXTS else "json" if ending == "json" else ""
    if not slot:
        row.other = row.other or ending[:40]
        # "a.v1.jpg" is the picture of no key, but somebody's picture: it is refused rather than passed over.
        if ending.rpartition(".")[2] in PICTURES and "." in ending:
            row.problem = row.problem or f"has a picture with the ending .{ending[:40]}: the key ends at the first dot"
    elif member.kind:
        row.problem = row.problem or f"its member .{ending} is {member.kind}, no plain file"
    elif getattr(row, slot) is not None:
        row.problem = row.problem or f"has two members for its {slot}"
    else:
        setattr(row, slot, member)


def problem_of(row: TarRow) -> str:
    """Why the row is refused by its names alone; empty where it is not."""
    try:
        key = row.key.decode("utf-8")
    except UnicodeDecodeError:
        return "its name is not UTF-8"
    problem = key_problem(key) or row.problem
    if not problem and row.picture is None and row.other:
        problem = f"has no picture ({', '.join(PICTURES)}), but a member .{row.other}"
    return problem


def index_tar(tar: Bytes) -> TarIndex:
    """Where the rows are, in one pass over the headers: 8 bytes a row are kept while it runs.

    Raises BrokenTarError as `members` does, and where no row or hardly a whole one is in the tar.
    """
    import xxhash

    blocks: list[tuple[int, int, int, int]] = []
    hashes = array.array("Q")
    first_row, start, example = 0, 0, b""

    def seen() -> Iterator[Member]:
        nonlocal example
        for member in members(tar):
            example = example or member.name
            yield member

    for number, row in enumerate(tar_rows(seen())):
        if number == 0:
            start = row.start
        elif number - first_row == BLOCK_ROWS or row.start - start >= BLOCK_BYTES:
            blocks.append((first_row, number - first_row, start, row.start))
            first_row, start = number, row.start
        hashes.append(xxhash.xxh3_64_intdigest(row.key))
    if not hashes:
        inside = f", but members such as {example[:80]!r}" if example else ""
        raise BrokenTarError(f"holds no KEY.{'/'.join(PICTURES)}, KEY.txt or KEY.json{inside}")
    blocks.append((first_row, len(hashes) - first_row, start, tar.size))
    repeated = _repeated(hashes)
    if 2 * len(repeated) > len(hashes):
        raise BrokenTarError(
            "most keys are at several places of the tar: the members of a row must be neighbours; "
            "write it anew, as with tar --sort=name"
        )
    return TarIndex(tuple(blocks), repeated)


def _repeated(hashes: array.array[int]) -> frozenset[int]:
    import numpy as np

    values = np.frombuffer(hashes, dtype=np.uint64)
    order = np.argsort(values, kind="stable")
    same = values[order][1:] == values[order][:-1]
    return frozenset(order[1:][same].tolist()) | frozenset(order[:-1][same].tolist())
