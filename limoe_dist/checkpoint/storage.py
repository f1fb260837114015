"""Writing and reading a checkpoint: safetensors and JSON, no pickle, from any layout to any layout.

step-00000900/
  rank-00000.safetensors    the parts of logical tensors that rank 0 writes
  rank-00000.json           what they are: logical name, logical shape, where each part begins
  ...
  state.json                step, position in the data, settings, versions
  manifest.json             every file with its checksum, written last
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.checkpoint.manifest import (
    NAME,
    CheckpointManifest,
    describe,
    read_manifest,
    sync,
    verify,
    write_manifest,
)
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import parse_model
from limoe_dist.parallel.collectives import all_or_none, max_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard


class State(BaseModel):
    """What a run needs besides tensors to go on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = Field(ge=0)
    """Optimizer steps that were done."""
    position: int = Field(ge=0)
    """Pairs of the data order that were consumed: the whole state of the input pipeline."""
    settings: dict[str, Any]
    """Those that decide results, by dotted name; see config.parse.decisive."""
    data: str
    """Hash of the training shards' checksums."""
    tokenizer: str
    """sha256 of the vocabulary."""
    versions: dict[str, str] = {}


class Part(BaseModel):
    """One entry of rank-NNNNN.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[NonNegativeInt, ...]
    start: tuple[NonNegativeInt, ...]
    size: tuple[NonNegativeInt, ...]


_PARTS = TypeAdapter(tuple[Part, ...])


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save(run_dir: Path, state: State, shards: dict[str, Shard], mesh: Mesh, *, keep: int) -> Path:
    """Writes a checkpoint and then removes whole ones older than the last `keep`. A collective.

    Every rank writes its own parts; the manifest comes after all of them. A directory that a killed save left behind is
    not a checkpoint and is replaced. Returns the directory.
    """
    folder, device = checkpoint_folder(run_dir, state.step), _device_of(shards)
    with all_or_none(mesh.world, device):
        if mesh.rank == 0:
            _remove(folder)
            folder.mkdir(parents=True)
    with all_or_none(mesh.world, device):
        _write_parts(folder / f"rank-{mesh.rank:05d}.safetensors", shards)
    with all_or_none(mesh.world, device):
        if mesh.rank == 0:
            (folder / "state.json").write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")
            sync(folder / "state.json")
            files = tuple(describe(path) for path in sorted(folder.iterdir()))
            write_manifest(folder, CheckpointManifest(step=state.step, files=files))
            _remove_old(run_dir, keep)
    return folder


def _device_of(shards: dict[str, Shard]) -> torch.device:
    return next((shard.tensor.device for shard in shards.values()), torch.device("cpu"))


def _write_parts(tensors: Path, shards: dict[str, Shard]) -> None:
    """The parts that this rank writes, and beside them what they are."""
    mine = {name: shard for name, shard in shards.items() if shard.writes}
    try:
        save_file({name: shard.tensor.contiguous().cpu() for name, shard in mine.items()}, tensors)
    except SafetensorError as error:
        raise UserError(f"{tensors}: cannot be written: {error}") from None
    parts = tuple(
        Part(name=name, shape=shard.shape, start=shard.start, size=tuple(shard.tensor.shape))
        for name, shard in mine.items()
    )
    index = tensors.with_suffix(".json")
    index.write_bytes(_PARTS.dump_json(parts))
    sync(tensors)
    sync(index)


def _remove(folder: Path) -> None:
    """Without its manifest it is no checkpoint any more, should we be killed between the files."""
    (folder / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_old(run_dir: Path, keep: int) -> None:
    """Whole checkpoints before the last `keep`, and what killed saves left behind."""
    kept = checkpoints(run_dir)[-keep:]
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if folder not in kept:
            _remove(folder)


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first: directories that have a manifest."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob(f"step-*/{NAME}"))


def latest_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The newest whole checkpoint of a run, or the one of a step. Raises UserError where there is none."""
    whole = checkpoints(run_dir)
    if step is not None:
        whole = [path for path in whole if path == checkpoint_folder(run_dir, step)]
    if not whole:
        have = ", ".join(str(int(path.name.removeprefix("step-"))) for path in checkpoints(run_dir)) or "none"
        which = "no whole checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{run_dir}: {which} (steps there: {have})")
    return whole[-1]


def agreed_checkpoint(run_dir: Path, mesh: Mesh, device: torch.device, step: int | None = None) -> Path:
    """The same on every rank, also where another process saves a new one at this moment. A collective."""
    with all_or_none(mesh.world, device):
        mine = int(latest_checkpoint(run_dir, step).name.removeprefix("step-"))
    return latest_checkpoint(run_dir, int(max_over(torch.tensor(mine, device=device), mesh.world).item()))


def read_state(checkpoint: Path) -> State:
    return parse_model(State, checkpoint / "state.json")


@dataclass(frozen=True)
class _Stored:
    file: Path
    part: Part


class Reader:
    """Reads logical tensors, or any box of them, out of a checkpoint whose checksums it verified.

    Ranks share the verification, a file each in turn; all raise UserError where one found a fault.
    """

    def __init__(self, checkpoint: Path, mesh: Mesh, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self._stored: dict[str, list[_Stored]] = {}
        with all_or_none(mesh.world, device):
            manifest = read_manifest(checkpoint)
            problems = verify(checkpoint, manifest.files[mesh.rank :: mesh.world.size])
            if problems:
                raise UserError(
                    f"{checkpoint} is damaged: {problems[0]}; remove that directory to go on from an older checkpoint"
                )
            verified = {file.name for file in manifest.files}
            for name in sorted(verified):
                if name.startswith("rank-") and name.endswith(".json"):
                    self._add(checkpoint / name, verified)

    def _add(self, index: Path, verified: set[str]) -> None:
        tensors = index.with_suffix(".safetensors")
        if tensors.name not in verified:
            raise UserError(f"{tensors}: is not in the manifest, so its checksum is not known")
        try:
            parts = _PARTS.validate_json(index.read_bytes())
        except ValidationError as error:
            raise UserError(f"{index}: not the index of a checkpoint: {error.errors()[0]['msg']}") from None
        for part in parts:
            self._stored.setdefault(part.name, []).append(_Stored(tensors, part))

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name][0].part.shape

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The box of a logical tensor that begins at `start`, put together from all parts that touch it."""
        result: Tensor | None = None
        filled = 0
        for stored in self._stored[name]:
            part = stored.part
            low = [max(a, b) for a, b in zip(start, part.start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, part.start, part.size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            piece = _slice(stored, low, high)
            result = torch.empty(size, dtype=piece.dtype) if result is None else result
            result[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))] = piece
            filled += piece.numel()
        if result is None or filled != result.numel():
            raise UserError(f"{self.checkpoint}: tensor {name} is not whole")
        return result


def _slice(stored: _Stored, low: list[int], high: list[int]) -> Tensor:
    part = stored.part
    try:
        with safe_open(stored.file, framework="pt") as file:
            if not low:
                return file.get_tensor(part.name)
            window = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, part.start, strict=True))
            piece: Tensor = file.get_slice(part.name)[window]
            return piece
    except (SafetensorError, OSError, IndexError) as error:
        raise UserError(f"{stored.file}: cannot be read: {error}") from None


def load(checkpoint: Path, shards: dict[str, Shard], mesh: Mesh) -> None:
    """Fills this rank's shards, in place, from a checkpoint of any layout. A collective.

    Raises UserError where a file was changed, or the checkpoint belongs to another model, before anything is filled.
    """
    reader = Reader(checkpoint, mesh, _device_of(shards))
    wanted = {name.split("/")[0] for name in shards}
    stored = {name for name in reader.names if name.split("/")[0] in wanted}
    problems = [f"has no tensor {name}" for name in sorted(set(shards) - stored)]
    problems += [f"has a tensor {name} that this model lacks" for name in sorted(stored - set(shards))]
    problems += [
        f"tensor {name} has shape {reader.shape(name)}, but this model wants {shards[name].shape}"
        for name in sorted(stored & set(shards))
        if reader.shape(name) != shards[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(f"{checkpoint} belongs to another model: it {problems[0]}{more}")
    with torch.no_grad():
        for name, shard in shards.items():
            # Where there are more ranks than rows, the last ones hold nothing of a tensor.
            if shard.tensor.numel():
                shard.tensor.copy_(reader.read(name, shard.start, tuple(shard.tensor.shape)))


def load_weights(checkpoint: Path, model: nn.Module, mesh: Mesh) -> None:
    """Reads the weights alone, for evaluation. A collective; raises UserError as `load` does."""
    load(checkpoint, model_shards(model, mesh), mesh)


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    from importlib.metadata import version

    return {name: version(name) for name in ("limoe-dist", "torch", "safetensors")}
