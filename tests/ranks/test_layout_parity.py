"""Any layout trains as one process does: losses, gradients, norm and state, with dropped tokens and an idle expert."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch

from limoe_dist.config.schema import Run
from limoe_dist.equations import aux_losses
from limoe_dist.model.moe_layer import Routes
from limoe_dist.optim.native import NativeEngine
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.step import Examples, backward, training_step
from tests.support.cases import batch, perturbed_model, slice_of, small_run
from tests.support.ranks import RanksPool

LAYOUTS = {
    2: [(1, 1), (1, 2), (2, 1), (2, 2)],
    4: [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)],
    8: [(1, 8), (2, 1), (2, 4), (2, 8), (4, 2), (4, 8)],
}
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5}


def examples_of(mesh: Mesh, run: Run, *, step: int, given: str = "pairs") -> Examples:
    """This rank's slice of the step's batch; `given` may leave a modality out."""
    images, tokens, valid = slice_of(batch(step, torch.float64 if run.train.dtype == "fp64" else torch.float32), mesh)
    if given == "images":
        return Examples(images, None, None)
    return Examples(None, tokens, valid) if given == "texts" else Examples(images, tokens, valid)


def gradients(run: Run, mesh: Mesh, given: str) -> dict[str, Any]:
    """Losses, norm, this rank's pieces of the gradient, and how many choices each expert kept, block by block."""
    model = perturbed_model(run, mesh)
    engine = NativeEngine(model, run, mesh)
    losses = backward(model, engine, examples_of(mesh, run, step=0, given=given), step=3, run=run, mesh=mesh)
    boxes = engine.gradients()
    figures = {"contrastive": losses.contrastive, "aux": losses.aux}
    figures |= {f"block {block} {name}": loss for block, r in losses.records.items() for name, loss in r.losses.items()}
    kept = [sum_over(record.kept_E2.clone(), mesh.world).tolist() for record in losses.records.values()]
    return {
        "losses": {name: sum_over(value.clone(), mesh.world).item() for name, value in figures.items()},
        "norm": engine.sums.norm()[0].item(),
        "gradients": boxes,
        "kept": kept,
    }


@functools.cache
def whole_gradients(run: Run, given: str) -> dict[str, Any]:
    return gradients(run, Mesh.single(), given)


def box_of(whole: Shard, part: Shard) -> torch.Tensor:
    """The part of a whole logical tensor that another layout's rank holds."""
    if not part.shape:
        return whole.tensor.reshape(-1)[: part.tensor.numel()].view(part.tensor.shape)
    places = zip(part.start, part.tensor.shape, strict=True)
    return whole.tensor[tuple(slice(start, start + size) for start, size in places)]


def compare(run: Run, tp: int, ep: int, given: str) -> dict[str, float]:
    """On a rank: this layout's error against one process, relative to each parameter's largest gradient."""
    mesh = Mesh.build(tp=tp, ep=ep)
    found, wanted = (
        gradients(run, mesh, given),
        whole_gradients(run.model_copy(update={"parallel": Run().parallel}), given),
    )
    errors = {name: abs(found["losses"][name] - value) for name, value in wanted["losses"].items()}
    errors["norm"] = abs(found["norm"] - wanted["norm"]) / max(wanted["norm"], 1e-30)
    everywhere = max(shard.tensor.abs().max().item() for shard in wanted["gradients"].values())
    counted = 0
    for name, part in found["gradients"].items():
        whole = wanted["gradients"][name]
        # A key bias has the true gradient zero, and so has all of a modality that is absent: only an absolute error
        # has a meaning there.
        largest = whole.tensor.abs().max().item()
        largest = (everywhere or 1.0) if name.endswith("qkv_bias") or largest == 0 else largest
        if part.tensor.numel():
            errors[name] = (part.tensor - box_of(whole, part)).abs().max().item() / largest
        counted += part.tensor.numel()
    # Every logical number is on exactly one rank.
    total = sum_over(torch.tensor(counted), mesh.world).item()
    assert total == sum(shard.tensor.numel() for shard in wanted["gradients"].values())
    assert found["kept"] == wanted["kept"]
    return errors


def largest(answers: list[dict[str, float]]) -> tuple[str, float]:
    return max(((name, error) for errors in answers for name, error in errors.items()), key=lambda item: item[1])


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize(("tp", "ep"), LAYOUTS[4])
def test_gradients_of_4_ranks_equal_those_of_one_process(ranks4: RanksPool, tp: int, ep: int, dtype: str) -> None:
    name, error = largest(ranks4.run(compare, small_run(dtype), tp, ep, "pairs"))
    assert error < TOLERANCE[dtype], name


def compare_all(runs: list[Run], layouts: list[tuple[int, int]], given: str) -> list[tuple[float, str, float]]:
    return [
        (TOLERANCE[run.train.dtype], f"{run.train.dtype} tp={tp} ep={ep} {name}", error)
        for run in runs
        for tp, ep in layouts
        for name, error in compare(run, tp, ep, given).items()
    ]


def test_gradients_of_8_ranks_equal_those_of_one_process(ranks_pool: Any) -> None:
    # 16 pairs in groups of 2: one routing group a rank. 8 heads, so that tp could be 8.
    runs = [small_run("fp64"), small_run("fp32")]
    for answers in ranks_pool(8).run(compare_all, runs, LAYOUTS[8], "pairs"):
        assert not [name for tolerance, name, error in answers if error >= tolerance]


def varied(**moe: Any) -> Run:
    run = small_run("fp64")
    return run.model_copy(update={"moe": run.moe.model_copy(update=moe)})


def two_towers() -> Run:
    run = varied(blocks=())
    return run.model_copy(update={"model": run.model.model_copy(update={"towers": "two"})})


VARIANTS = [
    (varied(routers="per_modality", order="text_first"), (2, 2)),
    # Expert 5, which no token chooses, is one of three that serve texts.
    (varied(image_experts=5, min_image_experts=5.0, min_text_experts=3.0), (1, 4)),
    (varied(order="random"), (2, 2)),
    (varied(top_k=3, priority="sum", local_form="merged", mutual_information=1.0, capacity_factor=0.5), (1, 4)),
    (varied(top_k=2, local_form="above_log_k", mutual_information=1.0, modality_prior="uniform"), (2, 2)),
]


def compare_variants(variants: list[tuple[Run, tuple[int, int]]]) -> list[tuple[float, str, float]]:
    return [answer for run, layout in variants for answer in compare_all([run], [layout], "pairs")]


def test_every_router_order_and_loss_has_the_gradient_of_one_process(ranks4: RanksPool) -> None:
    for answers in ranks4.run(compare_variants, VARIANTS):
        assert not [name for tolerance, name, error in answers if error >= tolerance]
    for run, _ in VARIANTS:
        found = whole_gradients(run, "pairs")
        asked = run.moe.top_k * (16 * 16 + int(batch(0, torch.float64)[2].sum()))
        assert all(sum(image + text for image, text in block) < 0.97 * asked for block in found["kept"])


def test_two_towers_have_the_gradient_of_one_process(ranks4: RanksPool) -> None:
    for given in ("pairs", "images", "texts"):
        for answers in ranks4.run(compare_all, [two_towers()], [(1, 1), (2, 1)], given):
            assert not [name for tolerance, name, error in answers if error >= tolerance]
    images, texts = (whole_gradients(two_towers(), given)["gradients"] for given in ("images", "texts"))
    # Without a pair there is no contrastive loss, and a dense model has no other.
    assert all(box.tensor.abs().max() == 0 for found in (images, texts) for box in found.values())


@pytest.mark.parametrize("given", ["images", "texts"])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_batch_without_a_modality_has_zeros_for_it_and_nobody_waits(
    ranks4: RanksPool, given: str, overlap: bool
) -> None:
    # Buckets of 4 kB: many of them, so that full and empty ones leave in turn.
    small = small_run("fp64")
    run = small.model_copy(
        update={"parallel": small.parallel.model_copy(update={"overlap": overlap, "bucket_mb": 0.004})}
    )
    for answers in ranks4.run(compare_all, [run], [(1, 1), (2, 2), (1, 4)], given):
        assert not [name for tolerance, name, error in answers if error >= tolerance]
    absent = whole_gradients(small, given)["gradients"][
        "text_embed.table" if given == "images" else "image_embed.weight"
    ]
    assert absent.tensor.abs().max() == 0
    assert whole_gradients(small, given)["norm"] > 0


def test_the_case_drops_tokens_and_leaves_an_expert_idle() -> None:
    found = whole_gradients(small_run("fp64"), "pairs")
    asked = 16 * 16 + int(batch(0, torch.float64)[2].sum())
    served = [sum(image + text for image, text in block) for block in found["kept"]]
    assert all(share < 0.95 * asked for share in served)
    assert found["kept"][0][5] == [0.0, 0.0]
    up = found["gradients"]["blocks.1.moe.experts.up_weight"].tensor
    assert up[5].abs().max() == 0
    assert up[4].abs().max() > 0


def microbatched(run: Run, pairs: int, *, recompute: bool = False, chunk: int = 0) -> Run:
    changes = {"microbatch_pairs": pairs, "recompute": recompute, "contrastive_chunk": chunk}
    return run.model_copy(update={"train": run.train.model_copy(update=changes)})


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-5)])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (1, 2), (2, 2)])
def test_microbatches_and_recompute_have_the_gradient_of_the_whole_batch(
    ranks2: RanksPool, tp: int, ep: int, dtype: str, tolerance: float
) -> None:
    # 8 pairs a rank: 4 microbatches of one routing group, or 2 of two.
    small = small_run(dtype)
    runs = [
        microbatched(small, 2),
        microbatched(small, 4, recompute=True, chunk=5),
        microbatched(small, 0, recompute=True),
    ]
    for answers in zip(*ranks2.run(compare_with_whole_batch, runs, tp, ep), strict=True):
        name, error = largest(list(answers))
        assert error < tolerance, name


def compare_with_whole_batch(runs: list[Run], tp: int, ep: int) -> list[dict[str, float]]:
    """On a rank: the errors of each run; the undivided gradient of the first in the same layout is the reference."""
    mesh = Mesh.build(tp=tp, ep=ep)
    wanted = gradients(microbatched(runs[0], 0), mesh, "pairs")
    return [errors_of(gradients(run, mesh, "pairs"), wanted) for run in runs]


def errors_of(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    assert found["kept"] == wanted["kept"]
    errors = {name: abs(found["losses"][name] - value) for name, value in wanted["losses"].items()}
    everywhere = max(part.tensor.abs().max().item() for part in wanted["gradients"].values() if part.tensor.numel())
    for name, part in wanted["gradients"].items():
        if part.tensor.numel():
            largest_one = everywhere if name.endswith("qkv_bias") else part.tensor.abs().max().item()
            difference = (found["gradients"][name].tensor - part.tensor).abs().max().item()
            errors[name] = difference / max(largest_one, 1e-6 * everywhere)
    return errors


def test_auxiliary_losses_are_computed_where_their_gradient_is_and_not_where_a_pass_only_embeds() -> None:
    run, mesh = microbatched(small_run("fp64"), 4), Mesh.single()
    model = perturbed_model(run, mesh)
    engine = NativeEngine(model, run, mesh)
    with mock.patch.object(aux_losses, "z_loss", wraps=aux_losses.z_loss) as z_loss:
        backward(model, engine, examples_of(mesh, run, step=0), step=0, run=run, mesh=mesh)
    # 4 microbatches of 2 MoE blocks.
    assert z_loss.call_count == 8


def test_a_replay_follows_the_stored_routes_whatever_the_router_says_now() -> None:
    run, mesh = small_run("fp64"), Mesh.single()
    model = perturbed_model(run, mesh)
    engine = NativeEngine(model, run, mesh)
    examples = examples_of(mesh, run, step=0)
    routes: Routes = {}
    first = backward(model, engine, examples, step=0, run=run, mesh=mesh, routes=[routes])
    with torch.no_grad():
        model.blocks[1].moe.router.neg_()
    again = backward(model, engine, examples, step=0, run=run, mesh=mesh, routes=[routes])
    free = backward(model, engine, examples, step=0, run=run, mesh=mesh)
    assert torch.equal(again.records[1].kept_E2, first.records[1].kept_E2)
    assert not torch.equal(free.records[1].kept_E2, first.records[1].kept_E2)


def losses_of_training(run: Run, tp: int, ep: int) -> list[float]:
    return losses_on(Mesh.build(tp=tp, ep=ep), run)


@functools.cache
def losses_of_one_process(run: Run) -> list[float]:
    return losses_on(Mesh.single(), run)


def losses_on(mesh: Mesh, run: Run) -> list[float]:
    model = perturbed_model(run, mesh)
    engine = NativeEngine(model, run, mesh)
    losses = []
    for step in range(run.train.steps):
        result = training_step(model, engine, examples_of(mesh, run, step=step), step=step, run=run, mesh=mesh)
        losses.append(sum_over(result.losses.contrastive + result.losses.aux, mesh.world).item())
    return losses


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize(("tp", "ep"), LAYOUTS[2])
def test_20_steps_on_2_ranks_lose_what_one_process_loses(
    ranks2: RanksPool, tp: int, ep: int, dtype: str, optimizer: str
) -> None:
    run = small_run(dtype, steps=20)
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"name": optimizer})})
    alone = losses_of_one_process(run)
    for losses in ranks2.run(losses_of_training, run, tp, ep):
        assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) < TOLERANCE[dtype]
    assert alone[-1] < alone[0]
