"""What a run that nobody disturbed leaves behind, to hold against one that was killed: bits, not tolerances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from limoe_dist.checkpoint.catalog import checkpoint_folder, checkpoints, step_of, without_manifest
from limoe_dist.checkpoint.manifest import File, read_manifest, verify
from limoe_dist.checkpoint.rank_file import SUFFIX
from limoe_dist.checkpoint.reader import Reader
from limoe_dist.config.errors import UserError
from limoe_dist.parallel.mesh import Mesh

CLOCKS = ("time", "pairs_per_s", "seconds_per_step", "memory_bytes", "busy_s")
"""Figures of metrics.jsonl that no two runs share."""


def newest_whole(run_dir: Path) -> int:
    """The step of the newest checkpoint whose every file is what was written; 0 where there is none."""
    return next((step_of(folder) for folder in reversed(checkpoints(run_dir)) if not _fault(folder)), 0)


def _fault(checkpoint: Path) -> str:
    """Why a checkpoint is not whole; empty where it is. Unlike a Reader's it leaves no mark."""
    try:
        return "".join(verify(checkpoint, read_manifest(checkpoint).files, threads=1)[:1])
    except UserError as error:
        return str(error)


class Undisturbed:
    """The run in `out`, which kept a checkpoint of every step."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._files = {step_of(folder): _tensor_files(folder) for folder in checkpoints(out)}
        self._lines = {name: _lines(out / name) for name in ("metrics.jsonl", "positions.jsonl")}

    def differences(self, out: Path, *, at_least: int) -> list[str]:
        """One sentence for each way in which what stands in `out` is not what stood here at that step.

        at_least: the newest step of which the run had said that its checkpoint is there.
        """
        newest = newest_whole(out)
        found = [f"{folder} has no manifest" for folder in without_manifest(out)]
        for folder in checkpoints(out):
            if fault := _fault(folder):
                found.append(fault)
            elif _tensor_files(folder) != self._files.get(step_of(folder)):
                found.append(f"{folder} has other bits")
        if newest < at_least:
            found.append(f"{out}: the newest whole checkpoint is of step {newest}, but that of {at_least} was told")
        for name, lines in self._lines.items():
            if _until(newest, _lines(out / name)) != _until(newest, lines):
                found.append(f"{out / name}: lines up to step {newest} differ")
        return found

    def differences_at_the_end(self, out: Path, step: int) -> list[str]:
        """Those of a run that has ended after a step: of its weights and its optimizer, tensor by tensor, too."""
        found = self.differences(out, at_least=step)
        if newest_whole(out) == step:
            found += _unequal_tensors(checkpoint_folder(self.out, step), checkpoint_folder(out, step))
        return found


def _tensor_files(checkpoint: Path) -> list[File]:
    """The entries of the ranks' files: one layout writes the same bytes for the same tensors."""
    return [file for file in read_manifest(checkpoint).files if file.name.endswith(SUFFIX)]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Without figures of the clock. A line that a kill cut is left out, as at a restart."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines.append({name: value for name, value in line.items() if name not in CLOCKS})
    return lines


def _until(step: int, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["step"] <= step]


def _unequal_tensors(wanted: Path, given: Path) -> list[str]:
    theirs, ours = (Reader(place, Mesh.single(), torch.device("cpu")) for place in (wanted, given))
    if theirs.names != ours.names:
        return [f"{given}: other tensors than in {wanted}: {sorted(theirs.names ^ ours.names)}"]
    names = sorted(theirs.names)
    return [f"{given}: {name} differs" for name in names if not _same_bits(theirs.whole(name), ours.whole(name))]


def _same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8))
