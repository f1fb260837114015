"""Reading a checkpoint of any layout into any layout: files are verified first, then boxes are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from limoe_dist.checkpoint.catalog import (
    checkpoint_folder,
    checkpoints,
    forget_verified,
    no_checkpoint,
    note_verified,
    step_of,
    without_manifest,
)
from limoe_dist.checkpoint.contents import SUFFIX, Part, contents, misplaced, plain
from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.checkpoint.manifest import STATE, Damaged, read_manifest, unreadable, verify
from limoe_dist.checkpoint.state import State, read_state
from limoe_dist.config.errors import UserError, warn
from limoe_dist.parallel.background import patiently
from limoe_dist.parallel.collectives import all_or_none, raise_together, vote
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard


class Reader:
    """A checkpoint whose checksums were verified, and that has every number once. Gives any box of its tensors."""

    def __init__(
        self,
        checkpoint: Path,
        mesh: Mesh,
        device: torch.device,
        *,
        progress: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """A collective: ranks share the verification, a file each in turn.

        progress: called with the bytes that this rank verified since the last call, from any thread.
        Raises Damaged, on all ranks, where one found a fault, and UserError for another version's format.
        """
        self.checkpoint = checkpoint
        self.state: State
        self._parts: dict[str, list[Part]] = {}
        self._files: dict[Path, Any] = {}
        with on_all_ranks(mesh, device):
            manifest = read_manifest(checkpoint)
            # In the layout that wrote it, each rank verifies the file that it reads next.
            tensors = [file for file in manifest.files if file.name.endswith(SUFFIX)]
            others = [file for file in manifest.files if not file.name.endswith(SUFFIX)]
            mine = tensors[mesh.rank :: mesh.world.size] + (others if mesh.rank == 0 else [])
        with on_all_ranks(mesh, device):
            if problems := patiently(lambda: verify(checkpoint, mine, progress=progress), mesh.world, device):
                raise Damaged(problems[0] + (f" (and {len(problems) - 1} more files)" if problems[1:] else ""))
            self.state, self._parts = read_state(checkpoint), contents(checkpoint, manifest)
            if self.state.step != manifest.step:
                raise Damaged(f"{checkpoint / STATE} is of step {self.state.step}, its manifest of {manifest.step}")
            if problems := misplaced(self._parts):
                raise Damaged(problems[0])
        if mesh.rank == 0:
            note_verified(checkpoint)

    @property
    def names(self) -> set[str]:
        return set(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape."""
        return self._parts[name][0].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name, self._parts[name][0]).dtype

    @torch.no_grad()
    def fill(self, name: str, out: Tensor, start: Sequence[int]) -> None:
        """Copies the box of a logical tensor that begins at `start` and has the shape of `out`, whoever wrote it."""
        # Where there are more ranks than rows, the last ones hold nothing of a tensor.
        if not out.numel():
            return
        for part in self._parts[name]:
            low = [max(a, b) for a, b in zip(start, part.start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, out.shape, part.start, part.size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                into = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
                frm = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, part.start, strict=True))
                out[into].copy_(self._stored(name, part)[frm])

    def whole(self, name: str) -> Tensor:
        """A logical tensor, as it was stored."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.fill(name, out, [0] * out.dim())
        return out

    def _stored(self, name: str, part: Part) -> Tensor:
        """A view of the file. Raises Damaged."""
        try:
            if part.file not in self._files:
                self._files[part.file] = safe_open(part.file, framework="pt").__enter__()
            stored: Tensor = self._files[part.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{part.file}: {name} cannot be read: {error}") from None
        return stored


@contextmanager
def on_all_ranks(mesh: Mesh, device: torch.device) -> Iterator[None]:
    """As all_or_none, with Damaged told from what no older checkpoint would mend.

    Its first statement may be a call of `patiently`, which raises when all ranks are done.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    except OSError as error:
        problem = unreadable(Path(error.filename or "a file"), error)
    damaged = isinstance(problem, Damaged)
    raise_together([str(problem)] if problem and not damaged else [], mesh.world, device)
    try:
        raise_together([str(problem)] if damaged else [], mesh.world, device)
    except UserError as told:
        raise Damaged(str(told), told_by=told.told_by) from None


def open_checkpoint(run_dir: Path, mesh: Mesh, device: torch.device, step: int | None = None) -> Reader:
    """The newest whole checkpoint of a run, or that of a step; the same on every rank. A collective.

    Where the newest is damaged, the rank that found it says so and the one before is taken. Raises UserError where none
    is whole, and Damaged where the one of `step` is not.
    """
    if mesh.rank == 0:
        for folder in without_manifest(run_dir):
            warn(f"{folder} has no manifest.json, so it is no checkpoint: a save gives a directory its name at the end")
    damaged = 0
    candidate = _newest(run_dir, mesh, device, step=step)
    while candidate >= 0:
        try:
            return Reader(checkpoint_folder(run_dir, candidate), mesh, device)
        except Damaged as error:
            if mesh.rank == 0:
                forget_verified(checkpoint_folder(run_dir, candidate))
            if step is not None:
                raise
            if mesh.rank == error.told_by:
                warn(f"the checkpoint of step {candidate} is damaged: {error}")
        damaged += 1
        candidate = _newest(run_dir, mesh, device, below=candidate)
        if mesh.rank == 0 and candidate >= 0:
            warn(f"going back to the checkpoint of step {candidate}")
    if damaged:
        raise UserError(
            f"{run_dir}: no checkpoint is whole ({damaged} damaged): limoe checkpoint verify {run_dir} tells more",
            told_by=0,
        )
    raise no_checkpoint(run_dir, step)


def _newest(
    run_dir: Path, mesh: Mesh, device: torch.device, *, step: int | None = None, below: int | None = None
) -> int:
    """The largest step, below another, that any rank sees: another process may save meanwhile. -1: there is none."""
    with all_or_none(mesh.world, device):
        seen = [step_of(folder) for folder in checkpoints(run_dir)]
        seen = [each for each in seen if (step is None or each == step) and (below is None or each < below)]
    return vote(mesh.world, device, max(seen, default=-1))[0]


def load(reader: Reader, shards: dict[str, Shard], mesh: Mesh) -> None:
    """Fills this rank's shards, in place, from a checkpoint of any layout. A collective.

    Raises UserError where the checkpoint belongs to another model, before anything is filled.
    """
    _refuse_weights_alone(reader, shards)
    wanted = {name.split("/")[0] for name in shards}
    stored = {name for name in reader.names if name.split("/")[0] in wanted}
    problems = [f"has no tensor {name}" for name in sorted(set(shards) - stored)]
    problems += [f"has a tensor {plain(name)} that this model lacks" for name in sorted(stored - set(shards))]
    problems += [
        f"has tensor {name} of shape {reader.shape(name)}, but this model wants {shards[name].shape}"
        for name in sorted(stored & set(shards))
        if reader.shape(name) != shards[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(f"{reader.checkpoint} belongs to another model: it {problems[0]}{more}", told_by=0)
    device = next((shard.tensor.device for shard in shards.values()), torch.device("cpu"))

    def fill() -> None:
        for name, shard in shards.items():
            reader.fill(name, shard.tensor, shard.start)

    with on_all_ranks(mesh, device):
        patiently(fill, mesh.world, device)


def _refuse_weights_alone(reader: Reader, shards: dict[str, Shard]) -> None:
    """What `limoe average` and `limoe prune` write holds no moments: training would go on from moments of zero."""
    if all(name.startswith("model/") for name in reader.names) and not all(n.startswith("model/") for n in shards):
        raise UserError(
            f"{reader.checkpoint} holds weights alone, without the optimizer's state, so it cannot be resumed: "
            "begin a new run with its weights, `limoe train PRESET --data ... --out ... --init-from RUN`",
            told_by=0,
        )


def load_weights(reader: Reader, model: nn.Module, mesh: Mesh) -> None:
    """Reads the weights alone, for evaluation. A collective; raises UserError as `load` does."""
    load(reader, model_shards(model, mesh), mesh)
