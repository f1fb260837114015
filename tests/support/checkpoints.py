"""Checkpoints for tests, through the saver that training uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from limoe_dist.checkpoint.saver import Saver
from limoe_dist.checkpoint.state import Layout, State
from limoe_dist.config.schema import Checkpoint
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard

CPU = torch.device("cpu")


def a_state(step: int = 3, **changes: Any) -> State:
    """Of a run on one rank; `changes`: other fields."""
    layout = Layout(ranks=1, tp=1, ep=1, engine="native", optimizer="adamw")
    given = {"position": 16 * step, "settings": {}, "fingerprint": "f", "data": "d", "tokenizer": "t"}
    return State.model_validate({"step": step, "layout": layout, "written": 0.0} | given | changes)


def save(run_dir: Path, state: State, shards: dict[str, Shard], mesh: Mesh, **settings: Any) -> Path:
    """Begins a save and waits for it; the checkpoint's directory. A collective. settings: of `checkpoint`."""
    saver = Saver(run_dir, shards, Checkpoint(**settings), mesh, CPU, tell=_silent)
    saver.begin(state, shards)
    saver.finish()
    assert not saver.failure, saver.failure
    assert saver.last is not None
    return saver.last.folder


def _silent(text: str) -> None:
    pass
