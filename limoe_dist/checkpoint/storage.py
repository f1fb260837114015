"""Writing and reading a checkpoint: safetensors and JSON, no pickle, from any layout to any layout.

step-00000900/
  rank-00000.safetensors    the parts of logical tensors that rank 0 writes
  rank-00000.json           what they are: logical name, logical shape, where each part begins
  ...
  state.json                step, position in the data, fingerprint, versions
  manifest.json             every file with its checksum, written last
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from limoe_dist.checkpoint.logical import Shard, model_shards
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
from limoe_dist.parallel.collectives import raise_together
from limoe_dist.parallel.mesh import Mesh


class State(BaseModel):
    """What a run needs besides tensors to go on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = Field(ge=0)
    """Optimizer steps that were done."""
    position: int = Field(ge=0)
    """Pairs of the data order that were consumed: the whole state of the input pipeline."""
    fingerprint: str
    """Of the settings that decide results; see config.parse.fingerprint."""
    data: str
    """Hash of the training shards' checksums."""
    tokenizer: str
    """sha256 of the vocabulary."""
    versions: dict[str, str] = {}


class Part(BaseModel):
    """One entry of rank-NNNNN.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]


_PARTS = TypeAdapter(tuple[Part, ...])


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def save(run_dir: Path, state: State, shards: dict[str, Shard], mesh: Mesh, *, keep: int) -> Path:
    """Writes a checkpoint and then removes whole ones older than the last `keep`. A collective.

    Every rank writes its own parts; the manifest comes after all of them. A directory that a killed save left behind is
    not a checkpoint and is replaced. Returns the directory.
    """
    folder = checkpoint_folder(run_dir, state.step)
    if mesh.rank == 0:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    _barrier(mesh)
    mine = {name: shard for name, shard in shards.items() if shard.writes}
    tensors = folder / f"rank-{mesh.rank:05d}.safetensors"
    save_file({name: shard.tensor.contiguous().cpu() for name, shard in mine.items()}, tensors)
    parts = [
        Part(name=name, shape=shard.shape, start=shard.start, size=tuple(shard.tensor.shape))
        for name, shard in mine.items()
    ]
    index = tensors.with_suffix(".json")
    index.write_bytes(_PARTS.dump_json(tuple(parts)))
    sync(tensors)
    sync(index)
    _barrier(mesh)
    if mesh.rank == 0:
        (folder / "state.json").write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")
        sync(folder / "state.json")
        files = tuple(describe(path) for path in sorted(folder.iterdir()))
        write_manifest(folder, CheckpointManifest(step=state.step, files=files))
        _remove_old(run_dir, keep)
    _barrier(mesh)
    return folder


def _barrier(mesh: Mesh) -> None:
    if mesh.world.group is not None:
        dist.barrier(group=mesh.world.group)


def _remove_old(run_dir: Path, keep: int) -> None:
    for old in checkpoints(run_dir)[:-keep]:
        # Without its manifest it is no checkpoint any more, should we be killed between the files.
        (old / NAME).unlink()
        shutil.rmtree(old)


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
        manifest = read_manifest(checkpoint)
        problems = verify(checkpoint, manifest.files[mesh.rank :: mesh.world.size])
        raise_together([f"{checkpoint} is damaged: {problem}" for problem in problems], mesh.world, device)
        self._stored: dict[str, list[_Stored]] = {}
        for file in manifest.files:
            if file.name.startswith("rank-") and file.name.endswith(".json"):
                self._add(checkpoint / file.name)

    def _add(self, index: Path) -> None:
        try:
            parts = _PARTS.validate_json(index.read_bytes())
        except ValidationError as error:
            raise UserError(f"{index}: not the index of a checkpoint: {error.errors()[0]['msg']}") from None
        for part in parts:
            self._stored.setdefault(part.name, []).append(_Stored(index.with_suffix(".safetensors"), part))

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

    Raises UserError where a file was changed, or the checkpoint belongs to another model: then nothing was filled.
    """
    device = next((shard.tensor.device for shard in shards.values()), torch.device("cpu"))
    reader = Reader(checkpoint, mesh, device)
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
            shard.tensor.copy_(reader.read(name, shard.start, tuple(shard.tensor.shape)))


def load_weights(checkpoint: Path, model: nn.Module, mesh: Mesh) -> None:
    """Reads the weights alone, for evaluation. A collective; raises UserError as `load` does."""
    load(checkpoint, model_shards(model, mesh), mesh)


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    from importlib.metadata import version

    return {name: version(name) for name in ("limoe-dist", "torch", "safetensors")}
