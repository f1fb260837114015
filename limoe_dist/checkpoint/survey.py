"""All that lies in RUN/checkpoints, as a glance at it shows. Needs no torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limoe_dist.checkpoint import catalog
from limoe_dist.checkpoint.manifest import STATE, Damaged, read_manifest, verify
from limoe_dist.checkpoint.state import Layout, read_state
from limoe_dist.config.errors import UserError

Kind = Literal["verified", "looks whole", "damaged", "other format", "no manifest", "put aside", "saving", "removing"]
CHECKPOINTS = ("verified", "looks whole", "damaged", "other format")
LEFTOVERS = ("saving", "removing")
BROKEN = ("damaged", "no manifest", "put aside")


@dataclass(frozen=True)
class Entry:
    """A directory in RUN/checkpoints, as a glance at it shows."""

    path: Path
    kind: Kind
    step: int
    num_bytes: int
    written: float
    """Unix time: of a checkpoint when its save began, of others when they were last changed."""
    layout: Layout | None = None
    """What wrote it, where that can be read."""
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        content = {"path": str(self.path), "state": self.kind, "step": self.step, "bytes": self.num_bytes}
        layout = None if self.layout is None else self.layout.model_dump()
        return content | {"written": self.written, "layout": layout, "problem": self.problem or None}


def survey(run_dir: Path) -> list[Entry]:
    """All that lies in RUN/checkpoints: checkpoints by step, then the rest; not what a run removes meanwhile."""
    found = [glance(folder) for folder in catalog.checkpoints(run_dir)]
    for folder in catalog.without_manifest(run_dir):
        found.append(_aside(folder, "no manifest"))
    for folder in catalog.put_aside(run_dir):
        found.append(_aside(folder, "put aside"))
    for folder in catalog.leftovers(run_dir):
        found.append(_aside(folder, "saving" if folder.name.startswith(".saving-") else "removing"))
    return [entry for entry in found if entry.path.exists()]


def glance(folder: Path) -> Entry:
    """A checkpoint by its manifest, the sizes of all files and the checksum of state.json."""
    kind: Kind = "verified" if catalog.is_verified(folder) else "looks whole"
    problem, layout, written = "", None, _changed(folder)
    try:
        files = read_manifest(folder).files
        # Those of another size are told without being read.
        doubtful = [file for file in files if file.name == STATE or _size_of(folder / file.name) != file.bytes]
        if problems := verify(folder, doubtful, threads=1):
            raise Damaged("\n".join(problems))
        state = read_state(folder)
        layout, written = state.layout, state.written
    except Damaged as error:
        kind, problem = "damaged", str(error)
    except UserError as error:
        kind, problem = "other format", str(error)
    return Entry(folder, kind, catalog.step_of(folder), _bytes_in(folder), written, layout, problem)


def _aside(folder: Path, kind: Kind) -> Entry:
    step = int(next((part for part in folder.name.split("-")[1:] if part.isdecimal()), "0"))
    return Entry(folder, kind, step, _bytes_in(folder), _changed(folder))


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _changed(folder: Path) -> float:
    """When a file in it, or itself, was last changed; Unix time."""
    times = [0.0]
    for path in (folder, *folder.glob("*")):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def _bytes_in(folder: Path) -> int:
    return sum(_size_of(path) or 0 for path in folder.glob("*"))
