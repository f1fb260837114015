"""Ctrl-C and SIGTERM only set a flag; all ranks look at it together after each step, save, and end."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from limoe_dist.parallel.collectives import max_over
from limoe_dist.parallel.mesh import Mesh


class StopFlag:
    """Catches the signals while it is open. A second signal changes nothing: launchers repeat them."""

    def __init__(self) -> None:
        self._received = 0
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def vote(self, mesh: Mesh, device: torch.device) -> int:
        """The signal that any rank received, or 0; the same on all ranks. A collective."""
        return int(max_over(torch.tensor(self._received, dtype=torch.int64, device=device), mesh.world).item())

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
