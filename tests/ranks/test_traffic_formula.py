"""What crosses ranks in a training step, call by call and byte by byte, is what `limoe plan` tells."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from launch.plan import layout_of
from launch.traffic import Exchange
from limoe_dist.config.schema import Run
from limoe_dist.model.tower import build_model
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.step import Examples, training_step
from tests.support.cases import batch, slice_of, small_run
from tests.support.ranks import RanksPool

Counts = dict[tuple[str, str], tuple[int, int]]
"""Calls and bytes by (operation, axis)."""


@dataclass(frozen=True)
class Measured:
    counts: Counts
    served: float
    """Choices that got a slot, over all ranks and blocks."""


def variant(run: Run, **changes: dict[str, Any]) -> Run:
    """small_run with other settings: `train={"recompute": True}`."""
    sections = {name: getattr(run, name).model_copy(update=values) for name, values in changes.items()}
    return run.model_copy(update=sections)


def variants(dtype: str) -> dict[str, Run]:
    """16 pairs on 2 or 4 ranks: microbatches of one routing group of 2 pairs."""
    small = small_run(dtype)
    return {
        "plain": small,
        "microbatches": variant(small, train={"microbatch_pairs": 2}),
        "recompute": variant(small, train={"recompute": True}),
        "both": variant(small, train={"microbatch_pairs": 2, "recompute": True}),
        "larger microbatches, two choices": variant(small, train={"microbatch_pairs": 4}, moe={"top_k": 2}),
        "padding as a token": variant(small, text={"pad": "token"}, train={"recompute": True}),
        "small buckets": variant(small, parallel={"bucket_mb": 0.004}),
        "sums in float64": variant(small, parallel={"reduce_dtype": "fp64"}),
        # 24 < 32: matrices of the width are factored, the patch embedding and the bias of q, k and v are not.
        "adafactor": variant(small, optim={"name": "adafactor", "min_factored_dim": 24}),
        "adafactor, all factored": variant(small, optim={"name": "adafactor", "min_factored_dim": 2}),
    }


def measure(runs: list[Run]) -> list[Measured]:
    """On a rank: one step of each run; all have the same layout."""
    mesh = Mesh.build(tp=runs[0].parallel.tp, ep=runs[0].parallel.ep)
    return [_measure_one(run, mesh) for run in runs]


def _measure_one(run: Run, mesh: Mesh) -> Measured:
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    engine = NativeEngine(model, run, mesh)
    examples = Examples(*slice_of(batch(0, torch.float64 if run.train.dtype == "fp64" else torch.float32), mesh))
    mesh.world.traffic.reset()
    losses = training_step(model, engine, examples, step=0, run=run, mesh=mesh).losses
    counts = {key: (volume.calls, volume.num_bytes) for key, volume in mesh.world.traffic.counts().items()}
    served = sum((record.kept_E2.sum() for record in losses.records.values()), torch.zeros(()))
    return Measured(counts, sum_over(served, mesh.world).item())


def told(run: Run, world: int) -> Counts:
    (cost,) = layout_of(run, world).costs.values()
    return totals(cost.exchanges)


def totals(exchanges: tuple[Exchange, ...]) -> Counts:
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for exchange in exchanges:
        sums = found[exchange.op, exchange.axis]
        sums[0] += exchange.calls
        sums[1] += exchange.num_bytes
    return {key: (calls, num_bytes) for key, (calls, num_bytes) in found.items()}


def compare(pool: RanksPool, runs: dict[str, Run], *, tp: int = 1, ep: int = 1) -> list[Measured]:
    """What rank 0 measured of each run; every rank's counts have to be those of the formula."""
    laid_out = {name: variant(run, parallel={"tp": tp, "ep": ep}) for name, run in runs.items()}
    answers = pool.run(measure, list(laid_out.values()))
    for measured in answers:
        for (name, run), found in zip(laid_out.items(), measured, strict=True):
            assert found.counts == told(run, pool.world), name
    return answers[0]


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2), (4, 4)])
def test_every_collective_of_4_ranks_moves_what_the_plan_tells(ranks4: RanksPool, tp: int, ep: int) -> None:
    runs = variants("fp32")
    # 16 pairs of 16 image tokens and their real text tokens, in 2 MoE blocks: some choices were dropped.
    asked = 2 * (16 * 16 + int(batch(0, torch.float32)[2].sum()))
    plain = dict(zip(runs, compare(ranks4, runs, tp=tp, ep=ep), strict=True))["plain"]
    assert 0 < plain.served < 0.95 * asked


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (2, 1), (2, 2)])
def test_every_collective_of_2_ranks_moves_what_the_plan_tells(ranks2: RanksPool, tp: int, ep: int) -> None:
    compare(ranks2, variants("fp32"), tp=tp, ep=ep)


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_the_plan_knows_which_numbers_are_narrow_and_which_stay_wide(ranks4: RanksPool, dtype: str) -> None:
    runs = variants(dtype)
    compare(ranks4, {name: runs[name] for name in ("plain", "both", "adafactor")}, tp=2, ep=2)


def test_a_dense_model_exchanges_no_experts(ranks2: RanksPool) -> None:
    dense = {name: variant(run, moe={"blocks": ()}) for name, run in variants("fp32").items()}
    for measured in compare(ranks2, dense, tp=2):
        assert not [axis for _, axis in measured.counts if axis in ("ep", "edp")]


def test_what_microbatches_and_recompute_add_is_told_apart_from_the_rest() -> None:
    # Around attention, in 4 blocks, an all-gather and a reduce-scatter, around the MLP of the 2 dense blocks the same;
    # in the 2 MoE blocks 2 all-to-all; in each block an all-gather of the text masks.
    runs = variants("fp32")
    (cost,) = layout_of(variant(runs["both"], parallel={"tp": 2, "ep": 2}), 4).costs.values()
    calls = {(each.during, each.op): 0 for each in cost.exchanges}
    for each in cost.exchanges:
        calls[each.during, each.op] += each.calls
    # 4 pairs a rank are 2 microbatches.
    assert calls["embedding pass", "all_gather"] == 2 * (6 + 4)
    assert calls["embedding pass", "reduce_scatter"] == 2 * 6
    assert calls["embedding pass", "all_to_all"] == calls["recompute", "all_to_all"] == 2 * 4
    assert calls["recompute", "all_gather"] == 2 * (6 + 4)
    # Not the one after a dense MLP.
    assert calls["recompute", "reduce_scatter"] == 2 * 4
