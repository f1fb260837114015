"""What a run saves, and how it goes on: weights and moments by logical name, and the few numbers beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limoe_dist.checkpoint import catalog
from limoe_dist.checkpoint.initial import Taken, take_weights
from limoe_dist.checkpoint.reader import Reader, load, open_checkpoint
from limoe_dist.checkpoint.saver import Saver
from limoe_dist.checkpoint.state import Layout, State, Watched, versions
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import changed_settings, decisive, fingerprint
from limoe_dist.config.schema import Run
from limoe_dist.data.mixture import orders_of
from limoe_dist.data.order import Ranges, joined, pairs_before, position_of
from limoe_dist.optim.engine import Engine
from limoe_dist.parallel.collectives import all_or_none, raise_together, sum_over, vote
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train import ledger
from limoe_dist.train.folder import Claim
from limoe_dist.train.inputs import Inputs
from limoe_dist.train.preemption import StopFlag


class Restart:
    """Reads a run's newest checkpoint at its start, and saves new ones while it goes on."""

    def __init__(self, run: Run, out: Path, engine: Engine, inputs: Inputs, mesh: Mesh, device: torch.device) -> None:
        self.run, self.out, self.engine, self.inputs = run, out, engine, inputs
        self.mesh, self.device = mesh, device
        self.quarantined: Ranges = ()
        """Positions of the data order that this run jumps over."""
        self.first_step, self.first_pair = 0, 0
        """Where this start goes on: so many steps were done, and so many pairs read, perhaps in other batches."""
        self.step = 0
        """Steps that are done now."""
        self.saved = 0
        """Those of the newest checkpoint."""
        self.watched = Watched()
        """What the guard goes on from, as the checkpoint has it."""
        self._batch_before: int | None = None
        self._seen: list[Path] = []
        self._passed: list[Path] = []
        self._saved_at = time.monotonic()
        self._read = 0
        """Checksum of the rows that this rank has read since the last save."""
        self._saved_position = self._told = 0
        """The position of the checkpoint that was read, and where the last line about positions ended."""

    def restore(self) -> int:
        """Fills weights and optimizer from the newest whole checkpoint; returns the number of steps that are done.

        A run that was killed before its first checkpoint begins again at step 0: everything is a function of the seed
        and of train.init_from. What the guard passed over since the checkpoint is passed over again. A collective;
        raises UserError where what decides the results is not what it was.
        """
        self._seen = there = catalog.checkpoints(self.out)
        cut = catalog.without_manifest(self.out)
        any_there, any_cut = vote(self.mesh.world, self.device, len(there), len(cut))
        if not any_there:
            problem = (
                f"{self.out} has no whole checkpoint, but {cut[0] if cut else 'a directory'} lacks its manifest.json: "
                "put that back, or remove the directory to begin at step 0, and resume again"
            )
            raise_together([problem] if any_cut else [], self.mesh.world, self.device)
            self.quarantined = joined(self._told_since(0))
            return 0
        reader = open_checkpoint(self.out, self.mesh, self.device)
        raise_together(self._differences(reader), self.mesh.world, self.device)
        shards = self.engine.shards()
        load(reader, shards, self.mesh)
        self.engine.adopt(shards)
        state = reader.state
        self.engine.steps = self.first_step = self.step = self.saved = state.step
        self._batch_before = state.settings.get("train.batch_pairs")
        self.first_pair = pairs_before(state.position, state.quarantined)
        self.quarantined = joined([*state.quarantined, *self._told_since(state.position)])
        self.watched = state.watched
        self._saved_position = self._told = state.position
        self._read = 0
        self._passed = [*cut, *(path for path in there if catalog.step_of(path) > state.step)]
        return state.step

    def _told_since(self, position: int) -> list[tuple[int, int]]:
        """What the ledger passes over from a position on, as rank 0 reads it: hosts may see a shared file differently.

        A collective.
        """
        told = ledger.passed_over(self.out, position=position) if self.mesh.rank == 0 else ()
        ranges = torch.zeros(vote(self.mesh.world, self.device, len(told))[0], 2, dtype=torch.int64, device=self.device)
        if told:
            ranges += torch.tensor(told, device=self.device)
        return [(first, end) for first, end in sum_over(ranges, self.mesh.world).tolist()] if len(ranges) else []

    def leave_out(self) -> tuple[int, int]:
        """The batch that was read now counts as if it had not been there; returns its positions, first and end.

        The next batch is of the same step.
        """
        span = self._position(self.step), self._position(self.step + 1)
        self.quarantined = joined([*self.quarantined, span])
        return span

    def go_back(self, batches: int, *, behind: int) -> tuple[int, int] | None:
        """Goes back to the newest checkpoint; `batches` of the steps before `behind`, from 0, are passed over.

        Returns their positions, first and end: only those that come after the checkpoint. None where there is no
        checkpoint, and nothing has changed. A collective.
        """
        first, end = self._position(max(self.first_step, behind - batches)), self._position(behind)
        self.saver.finish()
        if not any(vote(self.mesh.world, self.device, len(catalog.checkpoints(self.out)))):
            return None
        self.restore()
        self._put_aside()
        first = min(max(first, self._saved_position), end)
        if first < end:
            self.quarantined = joined([*self.quarantined, (first, end)])
        return first, end

    def initialise(self) -> Taken | None:
        """The weights of train.init_from, for a run that begins; None where it has none. A collective."""
        if not self.run.train.init_from:
            return None
        source = Path(self.run.train.init_from)
        gone = f"train.init_from={source} is gone, and the run has no checkpoint of its own: begin a new run"
        raise_together([] if source.is_dir() else [gone], self.mesh.world, self.device)
        shards = self.engine.shards()
        weights = {name: shard for name, shard in shards.items() if name.startswith("model/")}
        taken = take_weights(source, weights, self.mesh, self.device)
        self.engine.adopt(shards)
        return taken

    def batch_note(self) -> str:
        """What to tell where the run goes on with another batch; empty where it does not."""
        before, now = self._batch_before, self.run.train.batch_pairs
        if before in (None, now):
            return ""
        return (
            f"train.batch_pairs={now}, where the checkpoint has {before}: the data goes on at its pair "
            f"{self.first_pair:,}; steps, and the learning rate by steps, count on as they are"
        )

    def check_nothing_new(self) -> None:
        """Raises UserError where another process saved between `restore` and our claim: its steps would be lost."""
        new = [path for path in catalog.checkpoints(self.out) if path not in self._seen]
        if new:
            raise UserError(f"{new[-1]} was saved by another process while this one started: resume again")

    def open_saver(self, claim: Claim | None, stop: StopFlag, tell: Callable[[str], None]) -> None:
        """From here on the directory is this run's: `save` may be called.

        What the run goes on without is put aside, so that its own saves of those steps find their place free.
        """
        self._tell = tell
        self._put_aside()
        shards = self.engine.shards()
        self.saver = Saver(
            self.out,
            shards,
            self.run.checkpoint,
            self.mesh,
            self.device,
            check_owner=_nobody_asks if claim is None else claim.check,
            stopped=lambda: stop.received != 0,
            tell=tell,
        )

    def _put_aside(self) -> None:
        """Damaged checkpoints that were passed by, so that saves of those steps find their place free. A collective."""
        with all_or_none(self.mesh.world, self.device):
            for folder in self._passed if self.mesh.rank == 0 else []:
                self._tell(f"put aside: {catalog.set_aside(folder)}")

    def due_by_the_clock(self) -> bool:
        """Whether checkpoint.every_minutes have passed since the last save began; by the clock of rank 0."""
        minutes = self.run.checkpoint.every_minutes
        return self.mesh.rank == 0 and minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, *, watched: Watched, hurry: bool = False) -> dict[str, Any]:
        """Begins to save the state as it is now. A collective; raises UserError on all ranks.

        watched: what the guard goes on from. hurry: the time that is left is short, so that a former save
        is not read back. Returns the line for positions.jsonl about the steps since the last save.
        """
        step = self.step
        self._saved_at = time.monotonic()
        parallel, optim = self.run.parallel, self.run.optim
        state = State(
            step=step,
            position=self._position(step),
            quarantined=tuple(self.quarantined),
            watched=watched,
            settings=decisive(self.run),
            fingerprint=fingerprint(self.run),
            data=self.inputs.data_hash,
            tokenizer=self.inputs.tokenizer_hash,
            layout=Layout(
                ranks=self.mesh.world.size, tp=parallel.tp, ep=parallel.ep, engine=optim.engine, optimizer=optim.name
            ),
            versions=versions(),
        )
        self.saver.begin(state, self.engine.shards(), hurry=hurry)
        line = self._consumed(self.saved, step)
        self.saved = step
        return line

    def finish(self, *, hurry: bool) -> None:
        """Waits for the last save. A collective. Raises UserError, on all ranks, where it failed."""
        self.saver.finish(read_back=not hurry)
        if self.saver.failure:
            raise UserError(
                f"{self.saver.failure}; older checkpoints stand (limoe checkpoint ls {self.out}): "
                f"mend that, and go on with limoe train --resume {self.out}",
                told_by=self.saver.failed_by,
            )

    def count_rows(self, checksum: int) -> None:
        """Adds what a step of this rank has read; see `Batch.checksum`."""
        self._read += checksum

    def _consumed(self, from_step: int, step: int) -> dict[str, Any]:
        """Steps from_step + 1 to `step` read the positions `first` to `end` - 1, but for those `quarantined`.

        `rows` is the checksum of the rows that all ranks used there. A collective.
        """
        # int64 is what all back ends add, and as 2**64 it wraps around.
        read = torch.tensor(np.uint64(self._read % 2**64).astype(np.int64), device=self.device)
        rows, self._read = int(sum_over(read, self.mesh.world).item()) % 2**64, 0
        return self._line(from_step, step, self._position(step)) | {"rows": f"{rows:016x}"}

    def missed(self, newest: dict[str, Any] | None) -> dict[str, Any] | None:
        """The line of steps that were saved by a run that was killed before it wrote their line; None where none is.

        newest: the last line that was written. What the checkpoint says was read has no checksum of its rows.
        """
        from_step, self._told = (newest["step"], newest["end"]) if newest else (0, 0)
        if from_step >= self.first_step:
            return None
        return self._line(from_step, self.first_step, self._saved_position)

    def _line(self, from_step: int, step: int, end: int) -> dict[str, Any]:
        first, self._told = self._told, end
        line: dict[str, Any] = {"step": step, "from_step": from_step, "first": first, "end": end}
        inside = [(max(a, first), min(b, end)) for a, b in self.quarantined if a < end and first < b]
        return line | ({"quarantined": inside} if inside else {})

    @property
    def pairs(self) -> int:
        """Pairs that the run has read and counted."""
        return self._pairs(self.step)

    @property
    def position(self) -> int:
        """Where the next batch begins."""
        return self._position(self.step)

    def _pairs(self, step: int) -> int:
        return self.first_pair + (step - self.first_step) * self.run.train.batch_pairs

    def _position(self, step: int) -> int:
        """The position at which a step of this start begins to read."""
        return position_of(self._pairs(step), self.quarantined)

    def _differences(self, reader: Reader) -> list[str]:
        state, checkpoint = reader.state, reader.checkpoint
        problems = changed_settings(self._settings_of(state), self.run, checkpoint)
        read = "training shards, weights of data.mixture or version of the data order"
        for name, before, now in (
            (read, state.data, self.inputs.data_hash),
            ("vocabulary", state.tokenizer, self.inputs.tokenizer_hash),
        ):
            if before != now:
                problems.append(
                    f"{checkpoint} was made with other {name} (sha256 {before[:12]}... there, {now[:12]}... now): "
                    "a resumed run keeps what decides its results"
                )
        try:
            pairs_before(state.position, state.quarantined)
        except ValueError as error:
            problems.append(f"{checkpoint}: {error}, and no run reads on there: the file was changed")
        return problems

    def _settings_of(self, state: State) -> dict[str, Any]:
        """Those of a checkpoint. One that is older than data.window_rows mixed each source as a whole."""
        manifests = [part.manifest for part in self.inputs.train.parts]
        orders = orders_of(self.run.data, manifests, seed=self.run.train.seed)
        as_before = 0 if any(order.windowed for order in orders) else self.run.data.window_rows
        return {"data.window_rows": as_before} | state.settings


def _nobody_asks() -> None:
    """On ranks that hold no claim."""
