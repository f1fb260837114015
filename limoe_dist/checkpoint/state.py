"""What a run needs besides tensors to go on: state.json. Needs no torch."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from limoe_dist.checkpoint.manifest import STATE, Damaged, read_small
from limoe_dist.config.parse import sentences

_Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class Layout(BaseModel):
    """What wrote a checkpoint; any other layout reads it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ranks: int = Field(ge=1)
    tp: int = Field(ge=1)
    ep: int = Field(ge=1)
    engine: str
    optimizer: str


class Watched(BaseModel):
    """What the guard has seen; see limoe_dist/train/guard.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    losses: tuple[float, ...] = Field(default=(), max_length=4096)
    """Those that the next step's loss is compared with, oldest first."""
    bad_lines: _Count = 0
    """Lines of metrics in a row that tell of a collapse."""


class State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    step: _Count
    """Optimizer steps that were done."""
    position: _Count
    """The next position of the data order: with `quarantined` the whole state of the input pipeline."""
    quarantined: tuple[tuple[_Count, _Count], ...] = ()
    """Positions that the run jumps over, as rising ranges (first, end); see limoe_dist/data/order.py."""
    watched: Watched = Watched()
    settings: dict[str, Any]
    """Those that decide results, by dotted name; see config.parse.decisive."""
    fingerprint: str
    """sha256 of the settings; see config.parse.fingerprint."""
    data: str
    """Hash of the training shards' checksums."""
    tokenizer: str
    """sha256 of the vocabulary."""
    layout: Layout
    written: float = Field(default_factory=time.time, ge=0, lt=253402300800, allow_inf_nan=False)
    """Unix time at which the save began."""
    versions: dict[str, str] = {}

    @field_validator("quarantined")
    @classmethod
    def _rising(cls, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        ends = [0, *(place for span in ranges for place in span)]
        if any(a > b for a, b in pairwise(ends)) or any(a == b for a, b in ranges):
            raise ValueError("must be ranges (first, end) that rise and do not overlap")
        return ranges


def read_state(checkpoint: Path) -> State:
    """Raises Damaged where state.json is not what was written."""
    path = checkpoint / STATE
    try:
        return State.model_validate_json(read_small(path))
    except ValidationError as error:
        raise Damaged(f"{path}: {sentences(error, State)[0]}") from None


def versions() -> dict[str, str]:
    """What writes a checkpoint."""
    from importlib.metadata import version

    return {name: version(name) for name in ("limoe-dist", "torch", "safetensors")}
