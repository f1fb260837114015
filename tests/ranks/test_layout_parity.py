"""Any layout trains as one process does: losses, gradients, norm, with dropped tokens and an idle expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from limoe_dist.data.loader import Batch
from limoe_dist.optim.adamw import AdamW
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.gradients import global_grad_norm, reduce_gradients
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import placement_of
from limoe_dist.train.step import share_of_loss, training_step
from tests.support.cases import batch, perturbed_model, small_run
from tests.support.ranks import RanksPool

CPU = torch.device("cpu")
LAYOUTS_2 = [(1, 1), (1, 2), (2, 1), (2, 2)]
LAYOUTS_4 = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)]


def local(mesh: Mesh, step: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    images, tokens, valid = batch(step, dtype)
    pairs = len(images) // mesh.world.size
    mine = slice(mesh.rank * pairs, (mesh.rank + 1) * pairs)
    return images[mine], tokens[mine], valid[mine]


def gradients(name: str, mesh: Mesh) -> tuple[float, float, dict[str, torch.Tensor], list[Any]]:
    """Loss, gradient norm, this rank's gradients by name, and how many choices each expert kept, block by block."""
    run, dtype = small_run(name), torch.float64 if name == "fp64" else torch.float32
    model = perturbed_model(run, mesh)
    images, tokens, valid = local(mesh, 0, dtype)
    contrastive, aux, _, records = share_of_loss(model, images, tokens, valid, run=run, mesh=mesh, step=3)
    (contrastive + aux).backward()
    parameters = list(model.parameters())
    reduce_gradients(parameters, mesh, dtype=dtype)
    norm = global_grad_norm(parameters, mesh)
    loss = sum_over((contrastive + aux).detach().clone(), mesh.world)
    kept = [sum_over(record.kept_E2.clone(), mesh.world).tolist() for record in records.values()]
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), norm.item(), found, kept


def compare_gradients(name: str, tp: int, ep: int) -> dict[str, float]:
    """On a rank: this layout's error against one process, relative to each parameter's largest gradient."""
    mesh = Mesh.build(tp=tp, ep=ep)
    loss, norm, found, kept = gradients(name, mesh)
    want_loss, want_norm, want, want_kept = gradients(name, Mesh.single())
    model = perturbed_model(small_run(name), Mesh.single())
    scale = max(grad.abs().max().item() for grad in want.values())
    errors = {"loss": abs(loss - want_loss), "norm": abs(norm - want_norm) / want_norm}
    for key, parameter in model.named_parameters():
        placement = placement_of(parameter)
        whole = want[key]
        if whole.dim():
            mine = placement.local_slice(mesh)
            whole = whole.narrow(placement.dim, mine.start, mine.stop - mine.start)
        # A key bias has the true gradient zero: softmax does not see it. There only the absolute error has a meaning.
        largest = scale if key.endswith("qkv_bias") else want[key].abs().max().item()
        errors[key] = (found[key] - whole).abs().max().item() / max(largest, 1e-30)
    assert kept == want_kept
    return errors


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-5)])
@pytest.mark.parametrize(("tp", "ep"), LAYOUTS_4)
def test_gradients_of_4_ranks_equal_those_of_one_process(
    ranks4: RanksPool, tp: int, ep: int, dtype: str, tolerance: float
) -> None:
    for errors in ranks4.run(compare_gradients, dtype, tp, ep):
        assert max(errors.values()) < tolerance, max(errors, key=errors.__getitem__)


def test_the_case_drops_tokens_and_leaves_an_expert_idle() -> None:
    _, _, grads, kept = gradients("fp64", Mesh.single())
    asked = 16 * 16 + int(batch(0, torch.float64)[2].sum())
    served = [sum(image + text for image, text in block) for block in kept]
    assert all(share < 0.95 * asked for share in served)
    assert kept[0][5] == [0.0, 0.0]
    assert grads["blocks.1.moe.experts.up_weight"][5].abs().max() == 0
    assert grads["blocks.1.moe.experts.up_weight"][4].abs().max() > 0


def losses_of_training(dtype: str, tp: int, ep: int, steps: int) -> list[float]:
    mesh = Mesh.build(tp=tp, ep=ep) if tp else Mesh.single()
    run = small_run(dtype, steps=steps)
    model = perturbed_model(run, mesh)
    optimizer = AdamW(model, run.optim)
    losses = []
    for step in range(steps):
        images, tokens, valid = local(mesh, step, torch.float64 if dtype == "fp64" else torch.float32)
        piece = Batch(step, 0, None, images, tokens, valid, (), 0, 0)  # type: ignore[arg-type]
        result = training_step(model, optimizer, piece, run=run, mesh=mesh, device=CPU)
        losses.append(sum_over((result.contrastive + result.aux).clone(), mesh.world).item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-5)])
@pytest.mark.parametrize(("tp", "ep"), LAYOUTS_2)
def test_20_steps_on_2_ranks_lose_what_one_process_loses(
    ranks2: RanksPool, tp: int, ep: int, dtype: str, tolerance: float
) -> None:
    alone = losses_of_training(dtype, 0, 0, 20)
    for losses in ranks2.run(losses_of_training, dtype, tp, ep, 20):
        assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) < tolerance
    assert alone[-1] < alone[0]


def gradient_is_missing_on_one_rank() -> list[float]:
    mesh = Mesh.build(tp=1, ep=2)
    model = perturbed_model(small_run("fp32"), mesh)
    for number, parameter in enumerate(model.parameters()):
        if mesh.rank == 0 or number % 2:
            parameter.grad = torch.ones_like(parameter)
    reduce_gradients(list(model.parameters()), mesh, dtype=torch.float32)
    dense = [p for p in model.parameters() if placement_of(p).axis != "ep"]
    assert all(parameter.grad is not None for parameter in dense)
    return [float(parameter.grad.mean()) for parameter in dense if parameter.grad is not None]


def test_a_missing_gradient_counts_as_zeros_and_nobody_waits(ranks2: RanksPool) -> None:
    first, second = ranks2.run(gradient_is_missing_on_one_rank)
    assert first == second
    assert set(first) == {1.0, 2.0}
