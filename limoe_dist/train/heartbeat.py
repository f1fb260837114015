"""How long each rank works in a step, and RUN/heartbeat.json, by which others see that a run lives and where it is.

A rank's work is the time of a step without what it waited inside of collectives. Ranks wait for one another there, so
the step takes equally long on all of them, and only this tells which one the others wait for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from limoe_dist.config.errors import warn
from limoe_dist.parallel.collectives import gather_into
from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.place import host_name
from limoe_dist.parallel.traffic import Traffic
from limoe_dist.train.faults import attempt
from limoe_dist.train.stragglers import Stragglers, median_of

NAME = "heartbeat.json"
EVERY_S = 5.0
"""Between two writes, at least, but for a change of phase."""
HOST_BYTES = 256
"""A host's name is shorter (64 bytes on Linux, 253 with its domain)."""

Phase = Literal["start", "train", "evaluate", "save"]


@dataclass(frozen=True)
class Pace:
    figures: dict[str, Any]
    """For the line of metrics.jsonl."""
    told: str | None
    """A line about ranks that are slow, where there is one to say."""


class Heartbeat:
    """Fed by the loop on every rank; rank 0 writes the file. Making one is a collective."""

    def __init__(
        self,
        out: Path,
        *,
        mesh: Mesh,
        device: torch.device,
        step: int,
        steps: int,
        straggler_factor: float,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """step: of `steps`, done already. clock: for intervals; wall: for what people read, and it may jump."""
        self._world, self._device = mesh.world, device
        self._hosts = hosts_of_ranks(host_name(environ), mesh.world, device)
        self._stragglers = Stragglers(self._hosts, straggler_factor)
        self._meter = Meter(mesh.world.traffic, clock)
        self._busy_s: list[float] = []
        self._seconds_per_step: float | None = None
        self._step, self._steps, self._phase = step, steps, "start"
        self._attempt = attempt(environ)
        self._file = _File(out / NAME, clock, writes=mesh.rank == 0)
        self._wall = wall
        self._write(now=True)

    def step(self, step: int) -> None:
        """A step is done; call it when its figures have left the device."""
        self._meter.step()
        self._step = step
        self.beat()

    def went_back(self, step: int) -> None:
        """So many steps are done, fewer than before."""
        self._step = step
        self._write(now=True)

    def phase(self, phase: Phase) -> None:
        """What the run does from now on. What comes between a step and "train" is no part of any step."""
        if phase == "train":
            self._meter.restart()
        if phase != self._phase:
            self._phase = phase
            self._write(now=True)

    def beat(self) -> None:
        """Says that the run lives, where it is time to; for long phases too."""
        self._write(now=False)

    def pace(self) -> Pace:
        """Of the steps since the last call. A collective."""
        busy, seconds = self._meter.take()
        gathered = torch.empty((self._world.size, 1), dtype=torch.float64, device=self._device)
        gather_into(gathered, torch.tensor([busy], dtype=torch.float64, device=self._device), self._world)
        self._busy_s, self._seconds_per_step = gathered.flatten().tolist(), seconds
        slowest = max(range(self._world.size), key=self._busy_s.__getitem__)
        figures = {
            "median": median_of(self._busy_s),
            "max": self._busy_s[slowest],
            "rank": slowest,
            "host": self._hosts[slowest],
        }
        return Pace({"busy_s": figures}, self._stragglers.look(self._busy_s, seconds))

    def _write(self, *, now: bool) -> None:
        if not self._file.due(now=now):
            return
        content = {
            "time": self._wall(),
            "step": self._step,
            "steps": self._steps,
            "phase": self._phase,
            "seconds_per_step": self._seconds_per_step,
            "ranks": self._world.size,
            "hosts": self._hosts,
            "busy_s": self._busy_s,
        }
        self._file.write(json.dumps(content | self._attempt) + "\n")


class Meter:
    """Seconds of steps, and of the work in them, on this rank."""

    def __init__(self, traffic: Traffic, clock: Callable[[], float]) -> None:
        self._traffic, self._clock = traffic, clock
        self._busy_s = self._seconds = 0.0
        self._steps = 0
        self.restart()

    def restart(self) -> None:
        """The next step begins now."""
        self._began = self._clock()
        self._traffic.take_waited()

    def step(self) -> None:
        """A step ends, and the next one begins."""
        seconds = self._clock() - self._began
        # A device's calls can come in a step late; work is never less than nothing.
        self._busy_s += max(0.0, seconds - self._traffic.take_waited())
        self._seconds += seconds
        self._steps += 1
        self._began += seconds

    def take(self) -> tuple[float, float]:
        """Seconds of work, and of all, of a step: the means since the last call; 0 where there was none."""
        steps = max(1, self._steps)
        taken = self._busy_s / steps, self._seconds / steps
        self._busy_s, self._seconds, self._steps = 0.0, 0.0, 0
        return taken


class _File:
    """A small file that is replaced again and again."""

    def __init__(self, path: Path, clock: Callable[[], float], *, writes: bool) -> None:
        self._path, self._clock, self._writes = path, clock, writes
        self._written: float | None = None
        self._warned = False

    def due(self, *, now: bool) -> bool:
        return self._writes and (now or self._written is None or self._clock() - self._written >= EVERY_S)

    def write(self, text: str) -> None:
        """Readers see the old text or the new one. Where it cannot be written, that is said once, and the run goes on.

        Not forced to the disk: all ranks would wait for that while a checkpoint is being written there, and after a
        power cut nobody asks for this file.
        """
        self._written = self._clock()
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self._warned:
                warn(f"{self._path}: cannot be written: {error.strerror}; limoe status will not see that the run lives")
            self._warned = True


def hosts_of_ranks(own: str, world: Axis, device: torch.device) -> list[str]:
    """The host of each rank; own: this rank's. A collective."""
    sent = torch.frombuffer(bytearray(own.encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")), dtype=torch.uint8).to(device)
    gathered = torch.empty((world.size, HOST_BYTES), dtype=torch.uint8, device=device)
    gather_into(gathered, sent, world)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered.cpu().tolist()]
