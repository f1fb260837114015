"""What any layout saves any other has after loading it, number by number: weights, and the optimizer's state.

A number counts as equal where it has the same bits. What was saved is put together from what the ranks held, not read
from the files; what is loaded goes over NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from limoe_dist.checkpoint.logical import model_shards
from limoe_dist.checkpoint.reader import load, open_checkpoint
from limoe_dist.config.rules import check
from limoe_dist.config.schema import Parallel, Run
from limoe_dist.model.tower import Limoe
from limoe_dist.optim.engine import Engine, make_engine
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.step import Examples, training_step
from tests.support.cases import batch, perturbed_model, slice_of, small_run
from tests.support.checkpoints import CPU, a_state, save
from tests.support.ranks import RanksPool

STEPS = 2


@dataclass(frozen=True)
class Layout:
    ranks: int
    tp: int
    ep: int
    optimizer: str
    """adamw and adafactor of the native engine, or deepspeed: its adamw."""

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} tp={self.tp} ep={self.ep} {self.optimizer}"

    @property
    def run(self) -> Run:
        small = small_run("fp32")
        engine = "deepspeed" if self.optimizer == "deepspeed" else "native"
        optim = {"engine": engine, "name": "adafactor" if self.optimizer == "adafactor" else "adamw"}
        run = small.model_copy(
            update={
                "optim": small.optim.model_copy(update=optim),
                "parallel": Parallel(tp=self.tp, ep=self.ep),
            }
        )
        check(run, world=self.ranks)
        return run

    def mesh(self) -> Mesh:
        return Mesh.single() if self.ranks == 1 else Mesh.build(tp=self.tp, ep=self.ep)


def layouts(optimizer: str) -> list[Layout]:
    """(dp2, ep2), (tp2, ep2), (dp4), (tp2, dp2, ep4); without tp for DeepSpeed, whose ZeRO has none."""
    cuts = [(2, 1, 2), (2, 2, 2), (4, 1, 1), (4, 2, 4)]
    return [Layout(*cut, optimizer) for cut in cuts if optimizer != "deepspeed" or cut[1] == 1]


def alone(optimizer: str) -> Layout:
    return Layout(1, 1, 1, optimizer)


@dataclass(frozen=True)
class Box:
    """A part of a logical tensor, as an array: those cross processes quickly."""

    values: np.ndarray
    shape: tuple[int, ...]
    start: tuple[int, ...]
    writes: bool

    @staticmethod
    def of(shard: Shard) -> Box:
        # A copy: a view would take all of its memory along.
        return Box(shard.tensor.numpy().copy(), shard.shape, shard.start, shard.writes)

    @property
    def window(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.values.shape, strict=True))


@dataclass(frozen=True)
class Held:
    """What one rank has."""

    state: dict[str, Box]
    """Weights and optimizer, as a checkpoint has them."""
    parameters: dict[str, Box]
    """Those of the model, by the same names."""

    @staticmethod
    def of(model: Limoe, engine: Engine, mesh: Mesh) -> Held:
        state, parameters = engine.shards(), model_shards(model, mesh)
        return Held(*({name: Box.of(shard) for name, shard in each.items()} for each in (state, parameters)))


def train_and_save(folder: str, all_layouts: Sequence[Layout]) -> list[Held]:
    """On a rank: two steps of training in each layout, and a checkpoint of it."""
    found = []
    for layout in all_layouts:
        run, mesh = layout.run, layout.mesh()
        model = perturbed_model(run, mesh)
        engine = make_engine(model, run, mesh)
        for step in range(STEPS):
            examples = Examples(*slice_of(batch(step, torch.float32), mesh))
            training_step(model, engine, examples, step=step, run=run, mesh=mesh)
        save(Path(folder) / str(layout), a_state(STEPS), engine.shards(), mesh)
        found.append(Held.of(model, engine, mesh))
    return found


def load_each(folder: str, saves: Sequence[Layout], loads: Sequence[Layout]) -> list[Held]:
    """On a rank: what it has after loading each of the checkpoints into each layout; those of a layout in a row."""
    found = []
    for layout in loads:
        run, mesh = layout.run, layout.mesh()
        model = perturbed_model(run, mesh)
        engine = make_engine(model, run, mesh)
        for saved in saves:
            shards = engine.shards()
            for tensor in (*(shard.tensor for shard in shards.values()), *model.parameters()):
                tensor.detach().fill_(torch.nan)
            load(open_checkpoint(Path(folder) / str(saved), mesh, CPU), shards, mesh)
            engine.adopt(shards)
            found.append(Held.of(model, engine, mesh))
    return found


def put_together(ranks: Iterable[Held]) -> dict[str, np.ndarray]:
    """The logical tensors, each number from the one rank that would write it."""
    wholes: dict[str, np.ndarray] = {}
    times: dict[str, np.ndarray] = {}
    for held in ranks:
        for name, box in held.state.items():
            whole = wholes.setdefault(name, np.full(box.shape, np.nan, dtype=np.float32))
            count = times.setdefault(name, np.zeros(box.shape, dtype=int))
            if box.writes:
                whole[box.window] = box.values
                count[box.window] += 1
    assert all((count == 1).all() for count in times.values())
    return wholes


@dataclass(frozen=True)
class Compared:
    saved: Layout
    loaded: Layout
    tensors: int
    """Logical tensors, weights and optimizer."""
    numbers: int
    """Of those tensors; each is compared on every rank that holds it."""
    unequal: int
    """Numbers that are not equal, over all ranks, and those of the model's parameters."""
    largest_difference: float


def compare(saved: Layout, loaded: Layout, wanted: Mapping[str, np.ndarray], after: Sequence[Held]) -> Compared:
    """wanted: the logical tensors that were saved; after: what the ranks have that loaded them."""
    assert wanted.keys() == put_together(after).keys()
    unequal, largest = 0, 0.0
    for held in after:
        for name, box in (*held.state.items(), *held.parameters.items()):
            # A scalar that another rank keeps is an empty vector here.
            if box.values.size:
                want = wanted[name][box.window]
                assert box.values.dtype == want.dtype == np.float32
                unequal += int((bits(box.values) != bits(want)).sum())
                largest = max(largest, float(np.nan_to_num(np.abs(box.values - want), nan=np.inf).max()))
    numbers = sum(whole.size for whole in wanted.values())
    return Compared(saved, loaded, len(wanted), numbers, unequal, largest)


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.int32)


def matrix(
    folder: Path, pools: dict[int, RanksPool], saves: Sequence[Layout], loads: Sequence[Layout]
) -> list[Compared]:
    """Every layout of `saves` loaded in every one of `loads`; layouts of one process run here."""

    def on_ranks(world: int, function, *given: object) -> list[list[Held]]:
        """What `function` found: for each thing it was given, by rank."""
        answers = pools[world].run(function, str(folder), *given) if world > 1 else [function(str(folder), *given)]
        return [list(ranks) for ranks in zip(*answers, strict=True)]

    wanted: dict[Layout, dict[str, np.ndarray]] = {}
    for world in sorted({layout.ranks for layout in saves}):
        here = [layout for layout in saves if layout.ranks == world]
        wanted |= zip(here, map(put_together, on_ranks(world, train_and_save, here)), strict=True)
    found = []
    for world in sorted({layout.ranks for layout in loads}):
        here = [layout for layout in loads if layout.ranks == world]
        pairs = [(saved, loaded) for loaded in here for saved in saves]
        for (saved, loaded), after in zip(pairs, on_ranks(world, load_each, saves, here), strict=True):
            found.append(compare(saved, loaded, wanted[saved], after))
    return found


# DeepSpeed on 4 ranks takes its time: it is in the measured matrix, and in one process it has a group of its own.
CUTS = {
    "adamw": [*layouts("adamw"), layouts("deepspeed")[0]],
    "adafactor": layouts("adafactor"),
}


@pytest.mark.parametrize("optimizer", CUTS)
def test_every_layout_loads_what_every_other_saved(
    ranks2: RanksPool, ranks4: RanksPool, tmp_path: Path, optimizer: str
) -> None:
    cuts = CUTS[optimizer]
    found = matrix(tmp_path, {2: ranks2, 4: ranks4}, cuts, [alone(optimizer), *cuts])
    assert len(found) == len(cuts) * (len(cuts) + 1)
    assert [(str(each.saved), str(each.loaded)) for each in found if each.unequal] == []
    # A weight, and with adamw two moments; adafactor has a momentum, and for matrices two averages in place of one.
    names = [name for name, _ in perturbed_model(small_run("fp32"), Mesh.single()).named_parameters()]
    ((tensors, numbers),) = {(each.tensors, each.numbers) for each in found}
    if optimizer == "adamw":
        assert tensors == 3 * len(names)
    else:
        assert 3 * len(names) < tensors < 4 * len(names)
    assert numbers > 100_000


def test_a_number_that_differs_on_one_rank_is_seen() -> None:
    layout = alone("adamw")
    whole = np.arange(6, dtype=np.float32).reshape(2, 3)

    def held(row: int, column: int) -> list[Held]:
        ranks = []
        for rank in range(2):
            values = whole[rank : rank + 1].copy()
            if rank == row:
                values[0, column] = -0.0 if column == 0 else 9.0
            box = Box(values, (2, 3), (rank, 0), writes=True)
            ranks.append(Held({"model/w": box}, {"model/w": replace(box, writes=False)}))
        return ranks

    wanted = {"model/w": whole}
    same = compare(layout, layout, wanted, held(2, 0))
    assert (same.tensors, same.numbers, same.unequal, same.largest_difference) == (1, 6, 0, 0.0)
    # Of the state, and of the parameters.
    other = compare(layout, layout, wanted, held(1, 2))
    assert (other.unequal, other.largest_difference) == (2, 4.0)
    assert compare(layout, layout, wanted, held(0, 0)).unequal == 2
