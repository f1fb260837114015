"""Saving and loading 1 GB of state against what memory and the disk allow, and against peers.

python -m tests.benchmarks.checkpoint --out docs/measured/checkpoint.json

The state is that of a run: weights and AdamW's moments of the preset s32 with 8 experts, filled with random numbers;
in one process, and as ZeRO-1 cuts it over two gloo ranks. One thread a rank beside the saver's own. All contenders take
turns in the same processes, each round from another one on, so that a slow moment of the machine meets all. A turn
saves to new files, lets the disk settle, drops the files from the host's memory (mincore says that they are gone),
overwrites the state, loads it, compares every number with what was saved, and removes the files. Seconds are those of
the slowest rank; the first round warms up and does not count. Ratios are of medians.

blocking      until training may change the tensors; a plain save blocks until its end
save          until the checkpoint is on the disk and counts, file and directory fsynced
read back     until it was also read again and compared with its checksums
load          from files that the host's memory does not hold, into tensors that exist, checksums verified by limoe-dist
alone
The limit     blocking: a copy of each tensor into memory that was used before; save: the same bytes written from there
in blocks and fsynced; load: the same bytes read into there in blocks
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from limoe_dist.checkpoint import catalog
from limoe_dist.checkpoint.disk import sync_folder
from limoe_dist.checkpoint.reader import Reader, load
from limoe_dist.checkpoint.saver import Saver
from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Checkpoint, Run
from limoe_dist.model.tower import build_model
from limoe_dist.optim.engine import make_engine
from limoe_dist.parallel.collectives import vote
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from tests.benchmarks.machine import origin
from tests.support.checkpoints import CPU, a_state
from tests.support.ranks import RanksPool

MODULE = "tests.benchmarks.checkpoint"
WANTED = {"blocking": 1.5, "save": 1.3, "load": 1.3}
LIMIT = "limit"
BLOCK = 1 << 24
STEP = 1
SETTLE_S = 0.3
PATIENCE_S = 3600.0


def state_run() -> Run:
    """85 million parameters."""
    run = preset("s32")
    changes = {"moe": {"num_experts": 8}, "optim": {"name": "adamw"}}
    return run.model_copy(update={name: getattr(run, name).model_copy(update=new) for name, new in changes.items()})


def state_of(mesh: Mesh) -> dict[str, Shard]:
    """A run's state on this rank, each tensor with memory of its own: some peers write all that it is a view of."""
    run = state_run()
    engine = make_engine(build_model(run, mesh=mesh, device=CPU), run, mesh)
    source = torch.Generator().manual_seed(mesh.rank)
    return {
        name: Shard(torch.randn(shard.tensor.shape, generator=source), shard.shape, shard.start, shard.writes)
        for name, shard in engine.shards().items()
    }


class Clock:
    """Seconds of what all ranks do at once, by name."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self._laps = mesh, dict[str, int]()
        self.start()

    def start(self) -> None:
        """A barrier."""
        vote(self.mesh.world, CPU, 0)
        self._began = time.perf_counter_ns()

    def note(self, name: str) -> None:
        """Seconds since `start`."""
        self._laps[name] = time.perf_counter_ns() - self._began

    def slowest(self) -> dict[str, float]:
        """Of all ranks, which noted the same names in the same order. A collective."""
        return dict(zip(self._laps, [ns / 1e9 for ns in vote(self.mesh.world, CPU, *self._laps.values())], strict=True))


class Contender(ABC):
    """One way to keep `tensors` in files of a folder, with what it reuses from one save to the next."""

    def __init__(self, tensors: dict[str, Tensor], rank: int) -> None:
        self.tensors, self.rank = tensors, rank

    @abstractmethod
    def save(self, folder: Path, clock: Clock) -> None:
        """Notes `save`, and `blocking` where it is shorter; the clock runs."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Fills the tensors, in place."""

    def take(self, loaded: dict[str, Tensor]) -> None:
        for name, tensor in loaded.items():
            self.tensors[name].copy_(tensor)


class Limit(Contender):
    """What memory and the disk allow. Its copy is what every load is compared with."""

    def __init__(self, tensors: dict[str, Tensor], rank: int) -> None:
        super().__init__(tensors, rank)
        self._memory = torch.zeros(sum(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8).fill_(0)
        parts = self._memory.split([tensor.nbytes for tensor in tensors.values()])
        self.places = {
            name: part.view(tensor.dtype).view(tensor.shape)
            for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
        }

    def _blocks(self) -> list[memoryview]:
        content = memoryview(self._memory.numpy())  # type: ignore[arg-type]
        return [content[begin : begin + BLOCK] for begin in range(0, len(content), BLOCK)]

    def save(self, folder: Path, clock: Clock) -> None:
        for name, place in self.places.items():
            place.copy_(self.tensors[name])
        clock.note("blocking")
        clock.start()
        with open(folder / f"{self.rank}.bin", "wb", buffering=0) as file:
            for block in self._blocks():
                assert file.write(block) == len(block)
            os.fsync(file.fileno())
        sync_folder(folder)
        clock.note("save")

    def load(self, folder: Path) -> None:
        with open(folder / f"{self.rank}.bin", "rb", buffering=0) as file:
            for block in self._blocks():
                assert file.readinto(block) == len(block)

    def check(self, name: str) -> None:
        """Raises RuntimeError where a load did not bring back what was saved."""
        for key, place in self.places.items():
            if not torch.equal(place, self.tensors[key]):
                raise RuntimeError(f"{name} loaded another {key} than it saved")


class Limoe(Contender):
    def __init__(self, shards: dict[str, Shard], tensors: dict[str, Tensor], mesh: Mesh, folder: Path) -> None:
        super().__init__(tensors, mesh.rank)
        self.shards, self.mesh, self._clock = shards, mesh, Clock(mesh)
        settings = Checkpoint(keep=1, read_back=True)
        self._saver = Saver(folder, shards, settings, mesh, CPU, tell=lambda text: self._clock.note("save"))

    def save(self, folder: Path, clock: Clock) -> None:
        self._clock = clock
        self._saver.begin(a_state(STEP), self.shards)
        clock.note("blocking")
        self._saver.finish()  # it tells when the checkpoint counts, then reads it back
        clock.note("read back")
        assert not self._saver.failure, self._saver.failure

    def load(self, folder: Path) -> None:
        reader = Reader(catalog.checkpoint_folder(folder, STEP), self.mesh, CPU)
        load(reader, self.shards, self.mesh)


class Safetensors(Contender):
    def save(self, folder: Path, clock: Clock) -> None:
        path = folder / f"{self.rank}.safetensors"
        save_file(self.tensors, path)
        sync(path)
        clock.note("save")

    def load(self, folder: Path) -> None:
        self.take(load_file(folder / f"{self.rank}.safetensors"))


class TorchSave(Contender):
    def save(self, folder: Path, clock: Clock) -> None:
        path = folder / f"{self.rank}.pt"
        torch.save(self.tensors, path)
        sync(path)
        clock.note("save")

    def load(self, folder: Path) -> None:
        self.take(torch.load(folder / f"{self.rank}.pt", weights_only=True, mmap=False))


class Dcp(Contender):
    """Fsyncs its files by itself."""

    def save(self, folder: Path, clock: Clock) -> None:
        dcp.save(self.tensors, checkpoint_id=folder)
        sync_folder(folder)
        clock.note("save")

    def load(self, folder: Path) -> None:
        dcp.load(self.tensors, checkpoint_id=folder)


class DcpAsync(Dcp):
    stager: DefaultStager | None = None

    def save(self, folder: Path, clock: Clock) -> None:
        done = dcp.async_save(self.tensors, checkpoint_id=folder, async_stager=self.stager)
        clock.note("blocking")
        assert isinstance(done, Future)
        done.result()
        sync_folder(folder)
        clock.note("save")


class DcpAsyncKept(DcpAsync):
    """With memory for the copy that is kept from save to save."""

    def __init__(self, tensors: dict[str, Tensor], rank: int) -> None:
        super().__init__(tensors, rank)
        self.stager = DefaultStager(StagingOptions(False, False, False, False))


def sync(path: Path) -> None:
    """File and directory."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    sync_folder(path.parent)


def settle() -> None:
    """What one contender left to be written must not slow the next."""
    os.sync()
    time.sleep(SETTLE_S)


def take_memory(path: Path, num_bytes: int) -> None:
    """A virtual machine gives memory that nobody uses back to its host, and waits long for its return at the next use.

    Here a file that is gone before it reaches the disk gets it back, so that every contender finds the same.
    """
    block = bytes(BLOCK)
    with open(path, "wb", buffering=0) as file:
        for _ in range(0, num_bytes, BLOCK):
            file.write(block)
    path.unlink()


def make_cold(folder: Path) -> None:
    """Raises RuntimeError where the host's memory still holds a hundredth of a file."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            resident = resident_frac(descriptor)
            os.close(descriptor)
            if resident > 0.01:
                raise RuntimeError(f"{path.name}: {resident:.0%} of it stay in memory: its figures would not be cold")


def resident_frac(descriptor: int) -> float:
    """Of a file's pages, those that the host's memory holds."""
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as content:
        numbers = np.frombuffer(content, np.uint8)
        pages = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        begin, answer = (ctypes.c_void_p(each.ctypes.data) for each in (numbers, pages))
        failed = ctypes.CDLL(None).mincore(begin, ctypes.c_size_t(len(content)), answer)
        del numbers  # it holds the mapping open
        assert not failed
    return float((pages & 1).mean())


@dataclass
class Field:
    """All contenders on this rank, and where they write."""

    mesh: Mesh
    folder: Path
    limit: Limit
    others: dict[str, Contender]
    found: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Seconds by contender and figure."""

    def round(self, number: int) -> None:
        names = [LIMIT, *self.others]
        for name in random.Random(number).sample(names, len(names)):
            for figure, seconds in self._turn(name).items():
                self.found.setdefault(name, {}).setdefault(figure, []).append(seconds)

    def _turn(self, name: str) -> dict[str, float]:
        contender = self.others.get(name, self.limit)
        self._on_first(self.folder.mkdir)
        self._on_first(settle)
        self._on_first(self._take_memory)
        clock = Clock(self.mesh)
        contender.save(self.folder, clock)
        self._on_first(settle)
        self._on_first(lambda: make_cold(self.folder))
        if contender is not self.limit:
            for tensor in contender.tensors.values():
                tensor.zero_()
        self._on_first(self._take_memory)
        clock.start()
        contender.load(self.folder)
        clock.note("load")
        self.limit.check(name)
        self._on_first(lambda: shutil.rmtree(self.folder))
        return clock.slowest()

    def _take_memory(self) -> None:
        """Half as much again as the state: at the double the system would begin to write the file."""
        mine = sum(tensor.nbytes for tensor in self.limit.tensors.values())
        take_memory(self.folder.with_name("spare"), 3 * mine * self.mesh.world.size // 2)

    def _on_first(self, action: Callable[[], object]) -> None:
        vote(self.mesh.world, CPU, 0)
        if self.mesh.rank == 0:
            action()
        vote(self.mesh.world, CPU, 0)


def field_of(mesh: Mesh, folder: Path) -> Field:
    """A collective."""
    shards = state_of(mesh)
    mine = {name: shard for name, shard in shards.items() if shard.tensor.numel()}
    assert all(shard.writes for shard in mine.values())
    # Peers have no boxes of a tensor: to them, each rank's are tensors of their own.
    alone = mesh.world.size == 1
    tensors = {name if alone else f"{name}/{mesh.rank}": shard.tensor for name, shard in mine.items()}
    peers: dict[str, type[Contender]] = {
        "safetensors save_file, load_file": Safetensors,
        "torch.save, torch.load(weights_only=True)": TorchSave,
        "dcp.save, dcp.load": Dcp,
        "dcp.async_save, dcp.load": DcpAsync,
        "dcp.async_save with a stager that is kept, dcp.load": DcpAsyncKept,
    }
    limit = Limit(tensors, mesh.rank)
    others: dict[str, Contender] = {"limoe-dist": Limoe(shards, tensors, mesh, folder)}
    others |= {name: make(tensors, mesh.rank) for name, make in peers.items()}
    for name, place in limit.places.items():
        place.copy_(tensors[name])
    return Field(mesh, folder, limit, others)


def measure(folder: Path, rounds: int, ranks: int) -> dict[str, Any]:
    """On a rank: bytes and tensors of its state, and the seconds of every round but the first."""
    warnings.filterwarnings("ignore", module="torch.distributed")
    mesh = Mesh.single() if ranks == 1 else Mesh.build(tp=1, ep=1)
    every = field_of(mesh, folder)
    for number in range(1 + rounds):
        every.round(number)
    sizes = [tensor.nbytes for tensor in every.limit.tensors.values()]
    seconds = {name: {figure: each[1:] for figure, each in figures.items()} for name, figures in every.found.items()}
    return {"bytes": sum(sizes), "tensors": len(sizes), "seconds": seconds}


def table(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """From what the ranks of a run measured."""
    seconds = answers[0]["seconds"]
    limits = {figure: statistics.median(each) for figure, each in seconds[LIMIT].items()}
    limits["read back"] = limits["save"]
    contenders: dict[str, Any] = {}
    for name in (LIMIT, *sorted(set(seconds) - {LIMIT})):
        figures = {"blocking": seconds[name]["save"]} | seconds[name]
        contenders[name] = {figure: _figure(each, limits[figure]) for figure, each in figures.items()}
    ours = contenders["limoe-dist"]
    return {
        "ranks": len(answers),
        "bytes": sum(answer["bytes"] for answer in answers),
        "tensors": sum(answer["tensors"] for answer in answers),
        "within": {figure: ours[figure]["over_limit"] <= wanted for figure, wanted in WANTED.items()},
        "contenders": contenders,
    }


def _figure(seconds: list[float], limit: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "median_s": round(median, 3),
        "quartiles_s": [round(part, 3) for part in statistics.quantiles(seconds)[::2]],
        "over_limit": round(median / limit, 3),
    }


def tables(folder: Path, rounds: int) -> dict[str, Any]:
    found = {}
    for ranks in (1, 2):
        pool = RanksPool(ranks)
        try:
            found[f"{ranks} rank{'s' if ranks > 1 else ''}"] = table(
                pool.run(measure, folder / "turn", rounds, ranks, timeout_s=PATIENCE_S)
            )
        finally:
            pool.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is measured; without it, where temporary files go"
    )
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds={options.rounds}: quartiles need 2 or more")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = tables(Path(folder), options.rounds)
    within = found["1 rank"]["within"]
    report = origin(MODULE) | {
        "safetensors": version("safetensors"),
        "rounds": options.rounds,
        "threads": 1,
        "wanted_over_limit": WANTED,
        "within": within,
        "tables": found,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for ranks, each in found.items():
        for name, figures in each["contenders"].items():
            line = ", ".join(f"{what} {one['median_s']} s ({one['over_limit']})" for what, one in figures.items())
            print(f"{ranks}: {name}: {line}")
    return 0 if all(within.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
