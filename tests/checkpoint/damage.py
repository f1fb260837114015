"""What may become of the files of a checkpoint after they were written, case by case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

Kind = Literal["flip", "cut", "append", "remove", "swap", "exchange"]


@dataclass(frozen=True)
class Case:
    kind: Kind
    text: str
    files: Mapping[str, bytes | None]
    """What the files that changed hold; None: nothing, they are gone."""


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint by name; the note that it was verified is none of them."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "verified"}


def cases(content: Mapping[str, bytes], older: Mapping[str, bytes], *, flips: int) -> Iterator[Case]:
    """One byte flipped, files cut, grown, gone, swapped, and exchanged with those of an older checkpoint.

    flips: at how many places of each file; odd, so that the first, the middle and the last byte are among them.
    """
    for name, data in content.items():
        for number in range(flips):
            place = number * (len(data) - 1) // (flips - 1)
            flipped = bytearray(data)
            flipped[place] ^= 1 << number % 8
            yield Case("flip", f"bit {number % 8} of byte {place} of {len(data)} of {name}", {name: bytes(flipped)})
        for length in (0, len(data) // 2, len(data) - 1):
            yield Case("cut", f"{name} cut to {length} of {len(data)} bytes", {name: data[:length]})
        yield Case("append", f"a byte behind {name}", {name: data + b"\0"})
        yield Case("remove", f"{name} removed", {name: None})
        if name in older:
            yield Case("exchange", f"{name} of the older checkpoint", {name: older[name]})
    for one, two in combinations(content, 2):
        yield Case("swap", f"{one} and {two} swapped", {one: content[two], two: content[one]})


def write_files(folder: Path, files: Mapping[str, bytes | None]) -> None:
    for name, data in files.items():
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
