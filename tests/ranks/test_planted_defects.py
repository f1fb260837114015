"""`limoe verify` can fail: classic defects of parallel training, planted one at a time on the ranks, are each named."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limoe_dist.config.schema import Run
from limoe_dist.model import tower
from limoe_dist.model.moe_layer import Experts, MoeLayer, RoutingMode
from limoe_dist.model.tower import aux_loss
from limoe_dist.parallel.gradients import Gradients, norm_over
from limoe_dist.parallel.linear import RowParallelLinear, scatter_tokens
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import placement_of
from limoe_dist.train import step
from limoe_dist.train.parity.checks import CHECKS, DECISIONS, TOLERANCES
from limoe_dist.train.parity.compare import Blame, Comparison, blame, compare, prepare
from tests.support.cases import small_run
from tests.support.ranks import RanksPool

# The case begins where the warm-up of small_run ends, at step 2.
SECOND_STEP = 3
OUT_BIAS = "blocks.0.attention.out.bias"
Defect = Callable[[Mesh], AbstractContextManager[object]]


def compared(run: Run, defect: Defect | None) -> tuple[Comparison, Blame | None]:
    """On a rank: the run in its layout, with the defect planted in it, against one process, without."""
    mesh, device = Mesh.build(tp=run.parallel.tp, ep=run.parallel.ep), torch.device("cpu")
    # A collection after each trial then looks at the trials alone.
    gc.collect()
    gc.freeze()
    try:
        case = prepare(run, mesh=mesh, device=device)
        planted = nullcontext if defect is None else partial(defect, mesh)
        found = compare(case, mesh=mesh, device=device, planted=planted)
    finally:
        gc.unfreeze()
    return found, blame([found])


def run_on_4_ranks(tp: int, ep: int, dtype: str = "fp64") -> Run:
    run = small_run(dtype)
    return run.model_copy(
        update={
            "parallel": run.parallel.model_copy(update={"tp": tp, "ep": ep}),
            "train": run.train.model_copy(update={"batch_pairs": 8}),
        }
    )


@contextmanager
def changed_gradients(change: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Lets `change` work on each parameter's gradient before it is summed over the ranks."""
    take = Gradients.take

    def changed(self: Gradients, place: int, number: int, parameter: nn.Parameter) -> None:
        change(parameter)
        take(self, place, number, parameter)

    with mock.patch.object(Gradients, "take", changed):
        yield


def expert_gradients_divided_by_ep(mesh: Mesh) -> AbstractContextManager[object]:
    def divide(parameter: nn.Parameter) -> None:
        if placement_of(parameter).axis == "ep":
            parameter.grad /= mesh.ep.size

    return changed_gradients(divide)


def temperature_gradient_times_world(mesh: Mesh) -> AbstractContextManager[object]:
    def multiply(parameter: nn.Parameter) -> None:
        if parameter.dim() == 0:
            parameter.grad *= mesh.world.size

    return changed_gradients(multiply)


def norm_without_experts(mesh: Mesh) -> AbstractContextManager[object]:
    def norm(self: Gradients, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dense = [
            sum_L
            for bucket, sum_L in zip(self.buckets, self.sums, strict=True)
            if bucket.pieces[0].placement.axis != "ep"
        ]
        return norm_over(sum(sum_L.double().square().sum() for sum_L in dense), beside, mesh)

    return mock.patch.object(Gradients, "norm", norm)


def lost_router_gradient(mesh: Mesh) -> AbstractContextManager[object]:
    logits = MoeLayer.logits

    def detached(self: MoeLayer, *arguments: Any) -> tuple[Tensor, Tensor]:
        router = self._parameters["router"]
        self._parameters["router"] = router.detach()
        try:
            return logits(self, *arguments)
        finally:
            self._parameters["router"] = router

    return mock.patch.object(MoeLayer, "logits", detached)


def two_experts_swapped_in_the_exchange(mesh: Mesh) -> AbstractContextManager[object]:
    forward = Experts.forward

    def swapped(self: Experts, buffer_RD: Tensor) -> Tensor:
        experts = self.up_weight.shape[0] * mesh.ep.size
        order = torch.tensor([0, 2, 1, *range(3, experts)])
        there = buffer_RD.view(experts, -1, buffer_RD.shape[-1])[order].flatten(0, 1)
        return forward(self, there).view(experts, -1, buffer_RD.shape[-1])[order].flatten(0, 1)

    return mock.patch.object(Experts, "forward", swapped)


def two_experts_swapped_in_memory(mesh: Mesh) -> AbstractContextManager[object]:
    initialise = tower.initialise

    @torch.no_grad()
    def swapped(module: nn.Module, **settings: Any) -> None:
        initialise(module, **settings)
        if mesh.ep.index == 1:
            weight = module.blocks[1].moe.experts.down_weight
            weight.copy_(weight.flip(0))

    return mock.patch.object(tower, "initialise", swapped)


def row_parallel_bias_counted_tp_times(mesh: Mesh) -> AbstractContextManager[object]:
    def forward(self: RowParallelLinear, x: Tensor) -> Tensor:
        return scatter_tokens(F.linear(x, self.weight.flatten(1), self.bias), self.tp)

    return mock.patch.object(RowParallelLinear, "forward", forward)


def auxiliary_losses_normalised_per_rank(mesh: Mesh) -> AbstractContextManager[object]:
    def local(records: Any, run: Run, *, global_groups: int) -> Tensor | None:
        return aux_loss(records, run, global_groups=global_groups // mesh.world.size)

    return mock.patch.object(step, "aux_loss", local)


def changed(run: Run, **sections: dict[str, object]) -> Run:
    return run.model_copy(
        update={name: getattr(run, name).model_copy(update=update) for name, update in sections.items()}
    )


def test_healthy_layouts_pass_every_check(ranks4: RanksPool) -> None:
    # Adafactor, and microbatches that are recomputed against a reference that takes the whole batch at once.
    in_parts = {"batch_pairs": 16, "microbatch_pairs": 2, "recompute": True, "contrastive_chunk": 5}
    for run in (
        run_on_4_ranks(2, 2),
        changed(run_on_4_ranks(2, 4), optim={"name": "adafactor"}, train=in_parts),
        run_on_4_ranks(1, 2, "fp32"),
    ):
        for found, blamed in ranks4.run(compared, run, None):
            assert found.passed, found
            assert blamed is None
            assert {check.what for check in found.checks} == set(CHECKS)


def test_healthy_twins_and_routers_pass_too(ranks4: RanksPool) -> None:
    for run in (
        changed(run_on_4_ranks(2, 1), model={"towers": "two"}, moe={"blocks": ()}),
        changed(run_on_4_ranks(2, 2), moe={"routers": "per_modality", "top_k": 2, "priority": "sum"}),
    ):
        for found, _ in ranks4.run(compared, run, None):
            assert found.passed, found


@pytest.mark.parametrize(
    ("defect", "tp", "ep", "check", "place", "parameter"),
    [
        (expert_gradients_divided_by_ep, 2, 2, "gradients", "blocks.3.moe.experts.", "blocks.3.moe.experts."),
        (norm_without_experts, 2, 4, "gradient norm", "gradient norm", ""),
        (lost_router_gradient, 2, 2, "gradients", "blocks.3.moe.router", "blocks.3.moe.router"),
        (two_experts_swapped_in_the_exchange, 2, 4, "outputs of modules", "blocks.1.moe", "blocks.1.moe.experts."),
        (two_experts_swapped_in_memory, 2, 4, "weights at the start", "blocks.1.moe.experts.down_weight", "blocks."),
        (temperature_gradient_times_world, 2, 2, "gradients", "log_scale", "log_scale"),
        (row_parallel_bias_counted_tp_times, 2, 2, "outputs of modules", "blocks.0.attention", OUT_BIAS),
        (auxiliary_losses_normalised_per_rank, 2, 4, "auxiliary losses", "weighted sum", "blocks."),
    ],
)  # fmt: skip
def test_a_planted_defect_is_caught_and_named(
    ranks4: RanksPool, defect: Defect, tp: int, ep: int, check: str, place: str, parameter: str
) -> None:
    answers = ranks4.run(compared, run_on_4_ranks(tp, ep), defect)
    found, blamed = answers[0]
    assert [other for _, other in answers] == [blamed] * 4
    assert not found.passed
    assert blamed is not None
    assert blamed.check.what == check
    assert blamed.place.startswith(place)
    assert blamed.parameter.startswith(parameter)


@contextmanager
def a_token_sent_to_its_second_expert(mesh: Mesh) -> Iterator[None]:
    """On the last rank, the first token of the first group in block 1, in the second step."""
    decide = MoeLayer._decide

    def decided(self: MoeLayer, gates_GSE: Tensor, layout: Any, mode: RoutingMode) -> Any:
        if self.index == 1 and mesh.rank == 3 and mode.step == SECOND_STEP:
            gates_GSE = gates_GSE.clone()
            gates_GSE[0, 0, gates_GSE[0, 0].argmax()] = 0
        return decide(self, gates_GSE, layout, mode)

    with mock.patch.object(MoeLayer, "_decide", decided):
        yield


def compared_with_margin(run: Run, margin: float) -> Comparison:
    wide = replace(TOLERANCES["fp64"], margin=margin)
    with mock.patch.dict(TOLERANCES, {"fp64": wide}):
        return compared(run, a_token_sent_to_its_second_expert)[0]


def test_a_flip_fails_by_its_margin_alone_and_the_rest_is_compared_on_equal_routes(ranks4: RanksPool) -> None:
    run = run_on_4_ranks(2, 4)
    strict = ranks4.run(compared_with_margin, run, 1e-6)[0]
    assert [(check.what, check.step, check.failed) for check in strict.checks if not check.passed] == [
        (DECISIONS, "step 2: images", ("blocks.1.moe",))
    ]
    # Where rounding may explain a flip of any margin everything passes, and the certificate tells of it.
    lenient = ranks4.run(compared_with_margin, run, 1.0)[0]
    assert lenient.passed
    notes = [check.note for check in lenient.checks if check.what == DECISIONS]
    assert [note[:20] for note in notes] == ["", "flips: 1 of choices,", "", ""]
