"""The mean of the weights of several checkpoints of one model (LIMoE, arXiv 2206.02770, section 3.2).

"We average checkpoints towards the end of training": what the last steps' noise moves to and fro, the mean leaves out.
Optimizer moments are not averaged: the result is for evaluation, and for new runs to begin with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from limoe_dist.checkpoint.contents import plain
from limoe_dist.checkpoint.manifest import NAME, Damaged, read_manifest, read_small
from limoe_dist.checkpoint.reader import Reader
from limoe_dist.checkpoint.state import Layout, State, versions
from limoe_dist.checkpoint.weights import Progress, planned, silent, write_weights
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import decisive
from limoe_dist.config.schema import Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard

MODEL_SECTIONS = ("model", "image", "text", "moe")
"""Checkpoints that differ here are of different models."""


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was found."""

    path: Path
    step: int
    xxh3: str
    """The checksum that its manifest has of itself: it covers every file."""
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "step": self.step, "manifest_xxh3": self.xxh3, "bytes": self.num_bytes}


@dataclass(frozen=True)
class Averaged:
    checkpoint: Path
    step: int
    """The largest of the sources'."""
    sources: tuple[Source, ...]
    tensors: int
    parameters: int
    num_bytes: int
    warnings: tuple[str, ...]
    """In what the sources differ without being different models, a sentence each."""

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "sources": [source.to_json() for source in self.sources],
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.num_bytes,
            "summed_in": "float64",
            "warnings": list(self.warnings),
        }


def describe(checkpoint: Path) -> Source:
    """Raises Damaged where it has no manifest, or one that was changed."""
    manifest = read_manifest(checkpoint)
    checksum = json.loads(read_small(checkpoint / NAME))["xxh3"]
    return Source(checkpoint.absolute(), manifest.step, checksum, manifest.num_bytes)


def average(checkpoints: Sequence[Path], out: Path, *, progress: Progress = silent) -> Averaged:
    """Writes one checkpoint of weights alone into the run directory `out`, their mean, whatever layouts wrote them.

    In memory are some rows of one tensor, at float64, and the same rows of one source. The step, the position and the
    settings are those of the source with the largest step. Raises UserError for fewer than two checkpoints, one given
    twice, different models, or values that are not finite; Damaged where a checksum differs.
    """
    if len(checkpoints) < 2:
        raise UserError(f"a mean needs two checkpoints or more: {len(checkpoints)} given")
    sources = tuple(describe(checkpoint) for checkpoint in checkpoints)
    refuse_twice(sources)
    readers = _verified(sources, progress)
    newest = max(readers, key=lambda reader: reader.state.step)
    warnings = _compared(readers)
    tensors = {name: _planned(readers, name) for name in sorted(weights_in(readers[0]))}
    state = weights_state(newest.state, made_by="average")
    folder = write_weights(
        out, state, tensors, lambda name, first, end: _mean(readers, name, first, end), progress=progress
    )
    return Averaged(
        checkpoint=folder,
        step=state.step,
        sources=sources,
        tensors=len(tensors),
        parameters=sum(shard.tensor.numel() for shard in tensors.values()),
        num_bytes=read_manifest(folder).num_bytes,
        warnings=warnings,
    )


def _verified(sources: Sequence[Source], progress: Progress) -> list[Reader]:
    """Raises Damaged with what to do."""
    lock, done, total = Lock(), 0, sum(source.num_bytes for source in sources)

    def advance(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            progress("verified MB", done // 10**6, total // 10**6)

    readers = []
    for source in sources:
        try:
            readers.append(Reader(source.path, Mesh.single(), torch.device("cpu"), progress=advance))
        except Damaged as error:
            raise Damaged(f"{error}: leave the checkpoint of step {source.step} out") from None
    return readers


def refuse_twice(sources: Sequence[Source]) -> None:
    """Raises UserError where a checkpoint, or a copy of it, is given twice: it would count twice in the mean."""
    by_path: dict[Path, Source] = {}
    by_checksum: dict[str, Source] = {}
    for source in sources:
        if source.path.resolve() in by_path:
            raise UserError(f"{source.path} is given twice, and would count twice: give each checkpoint once")
        if other := by_checksum.get(source.xxh3):
            raise UserError(f"{source.path} is a copy of {other.path}, and would count twice: leave one of them out")
        by_path[source.path.resolve()] = by_checksum[source.xxh3] = source


def weights_state(state: State, *, made_by: str, **changes: Any) -> State:
    """The state of a checkpoint of weights alone that one process makes from another; `changes`: other fields."""
    layout = Layout(ranks=1, tp=1, ep=1, engine=made_by, optimizer="weights alone")
    # Without `written`: it is made now.
    before = state.model_dump(exclude={"written"})
    return State.model_validate(before | {"layout": layout, "versions": versions()} | changes)


def weights_in(reader: Reader) -> set[str]:
    """Names of the logical tensors that are weights; the others are the optimizer's."""
    return {name for name in reader.names if name.startswith("model/")}


def _compared(readers: Sequence[Reader]) -> tuple[str, ...]:
    """Warnings. Raises UserError, naming the first difference, where two checkpoints are of different models."""
    first, *others = readers
    warnings = []
    for other in others:
        if problem := _other_model(first, other):
            raise UserError(f"{other.checkpoint} and {first.checkpoint} are of different models: {problem}")
        warnings += _remarks(first, other)
    return tuple(warnings)


def _other_model(first: Reader, other: Reader) -> str | None:
    """The first difference that makes a mean senseless: a setting, the vocabulary, or a tensor."""
    for name, (before, now) in _differences(first.state, other.state).items():
        if name.split(".")[0] in MODEL_SECTIONS:
            return f"{name}={now!r} there, {before!r} here"
    if first.state.tokenizer != other.state.tokenizer:
        return (
            f"the vocabulary has sha256 {other.state.tokenizer[:12]}... there, {first.state.tokenizer[:12]}... here: "
            "the same row of the token embedding is another piece of text"
        )
    here, there = weights_in(first), weights_in(other)
    if apart := sorted(here ^ there):
        return (
            f"{plain(apart[0].removeprefix('model/'))} is in {'the second' if apart[0] in here else 'the first'} only"
        )
    for name in sorted(here):
        if first.shape(name) != other.shape(name):
            return f"{plain(name.removeprefix('model/'))} is {other.shape(name)} there, {first.shape(name)} here"
    return None


def _remarks(first: Reader, other: Reader) -> list[str]:
    pair = f"{other.checkpoint} and {first.checkpoint}"
    found = [
        f"{pair}: {name}={now!r} there, {before!r} here"
        for name, (before, now) in _differences(first.state, other.state).items()
        if name.split(".")[0] not in MODEL_SECTIONS
    ]
    if first.state.data != other.state.data:
        found.append(f"{pair} were trained on other data: a mean of runs apart from one another may be worse than each")
    return found


def _differences(first: State, other: State) -> dict[str, tuple[Any, Any]]:
    """Settings that decide results and differ, by dotted name. What a state lacks came later, and has its default."""
    defaults = decisive(Run())
    names = sorted({*first.settings, *other.settings})
    pairs = {name: tuple(s.settings.get(name, defaults.get(name)) for s in (first, other)) for name in names}
    return {name: (before, now) for name, (before, now) in pairs.items() if before != now}


def _planned(readers: Sequence[Reader], name: str) -> Shard:
    """Of the widest type that a source has."""
    dtype = readers[0].dtype(name)
    for reader in readers[1:]:
        dtype = torch.promote_types(dtype, reader.dtype(name))
    return planned(readers[0].shape(name), dtype)


def _mean(readers: Sequence[Reader], name: str, first: int, end: int) -> Tensor:
    """Rows of the mean, summed in float64: float32 would round at each of the sources."""
    shape = readers[0].shape(name)
    start = (first, *(0 for _ in shape[1:])) if shape else ()
    size = (end - first, *shape[1:]) if shape else ()
    dtype = _planned(readers, name).tensor.dtype
    total, part = torch.zeros(size, dtype=torch.float64), torch.empty(size, dtype=dtype)
    for reader in readers:
        reader.fill(name, part, start)
        total += part
    if not total.isfinite().all():
        bad = next((r for r in readers if not _finite(r, name, part, start)), None)
        place = f"{bad.checkpoint}: " if bad else ""
        raise UserError(
            f"{place}{plain(name.removeprefix('model/'))} has values that are not finite: the weights have diverged; "
            "leave that checkpoint out"
        )
    return (total / len(readers)).to(dtype)


def _finite(reader: Reader, name: str, part: Tensor, start: tuple[int, ...]) -> bool:
    reader.fill(name, part, start)
    return bool(part.isfinite().all())
