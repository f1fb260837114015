"""What a run saves, and how it goes on: weights and moments by logical name, and the few numbers beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from limoe_dist.checkpoint.storage import State, agreed_checkpoint, checkpoints, load, read_state, save, versions
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import changed_settings, decisive
from limoe_dist.config.schema import Run
from limoe_dist.optim.engine import Engine
from limoe_dist.parallel.collectives import all_or_none, max_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.inputs import Inputs


@dataclass(frozen=True)
class Restart:
    run: Run
    out: Path
    engine: Engine
    inputs: Inputs
    mesh: Mesh
    device: torch.device

    def save(self, step: int) -> Path:
        """Writes a checkpoint of the state after `step` steps. A collective; raises UserError on all ranks."""
        state = State(
            step=step,
            position=step * self.run.train.batch_pairs,
            settings=decisive(self.run),
            data=self.inputs.data_hash,
            tokenizer=self.inputs.tokenizer_hash,
            versions=versions(),
        )
        return save(self.out, state, self.engine.shards(), self.mesh, keep=self.run.checkpoint.keep)

    def restore(self) -> int:
        """Fills weights and optimizer from the newest whole checkpoint; returns the number of steps that are done.

        A run that was killed before its first checkpoint begins again at step 0: everything is a function of the seed.
        A collective; raises UserError where what decides the results is not what it was.
        """
        found = torch.tensor(len(checkpoints(self.out)), device=self.device)
        if not max_over(found, self.mesh.world).item():
            return 0
        checkpoint = agreed_checkpoint(self.out, self.mesh, self.device)
        with all_or_none(self.mesh.world, self.device):
            state = read_state(checkpoint)
            if problems := self._differences(state, checkpoint):
                raise UserError("\n".join(problems))
        shards = self.engine.shards()
        load(checkpoint, shards, self.mesh)
        self.engine.adopt(shards)
        self.engine.steps = state.step
        return state.step

    def _differences(self, state: State, checkpoint: Path) -> list[str]:
        problems = changed_settings(state.settings, self.run, checkpoint)
        for name, before, now in (
            ("training shards", state.data, self.inputs.data_hash),
            ("vocabulary", state.tokenizer, self.inputs.tokenizer_hash),
        ):
            if before != now:
                problems.append(
                    f"{checkpoint} was made with other {name} (sha256 {before[:12]}... there, {now[:12]}... now): "
                    "a resumed run keeps what decides its results"
                )
        if state.position != state.step * self.run.train.batch_pairs:
            problems.append(f"{checkpoint}: position {state.position} is not that of step {state.step}")
        return problems
