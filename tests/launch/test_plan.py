"""`limoe plan`: published counts, a case by hand, and the layout that ranks really build and exchange."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch import plan as planning
from launch.counting import count_flops, count_parameters, first_of_mesh, with_twins
from launch.plan_tables import WORDS
from limoe_dist.config.errors import UserError
from limoe_dist.config.presets import AUX_WEIGHTS, as_dense, as_two_tower, preset
from limoe_dist.config.rules import ConfigError
from limoe_dist.config.schema import Parallel, Run
from tests.support.ranks import RanksPool


def _micro(*, tp: int = 1, ep: int = 1, dtype: str = "fp32", optimizer: str = "adamw") -> Run:
    """Two blocks, the second with 4 experts; 16 image tokens and 16 text tokens a pair."""
    run = preset("tiny")
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"width": 8, "depth": 2, "heads": 2, "mlp_dim": 16, "embed_dim": 8}),
            "text": run.text.model_copy(update={"vocab_size": 10}),
            "moe": run.moe.model_copy(
                update={"blocks": (1,), "num_experts": 4, "group_pairs": 2, "min_image_experts": 2.0}
            ),
            "optim": run.optim.model_copy(update={"name": optimizer, "min_factored_dim": 8}),
            "train": run.train.model_copy(update={"batch_pairs": 16, "dtype": dtype}),
            "parallel": Parallel(tp=tp, ep=ep),
        }
    )


def test_h14_has_the_published_parameters() -> None:
    # LIMoE section 3.2: 5.6 B parameters, 675 M applied per token; 12 routers of 1280 x 32.
    count = count_parameters(preset("h14"))
    assert count.total == pytest.approx(5_553.8e6, rel=1e-3)
    # To the last one: 675.02 M of a dense twin, 12 routers, 31 more experts in each of 12 blocks, the temperature.
    assert count.total == count.per_token + 12 * 31 * 13_113_600
    assert count.per_token // 10**6 == 675
    assert count.router == 12 * 1280 * 32 == 491_520


def test_the_parameters_of_a_small_model_agree_with_paper_and_pencil() -> None:
    # patch 12: 8*3*144 + 8 + 16*8 = 3592; text: 10*8 + 16*8 = 208; final norm 16, projections 2*64, scale 1: 145
    # a block: norms 32, attention 4*(64 + 8) = 288, dense MLP 8*16 + 16 + 16*8 + 8 = 280: 600
    # an MoE block: 320, router 8*4 = 32, four experts of 280 = 1120: 1472
    count = count_parameters(_micro())
    assert count.total == 3592 + 208 + 145 + 600 + 1472
    assert count.router == 32
    assert count.experts == 1120
    assert count.total - count.per_token == 3 * 280


def test_with_two_choices_a_token_visits_two_experts() -> None:
    run = _micro()
    two = run.model_copy(update={"moe": run.moe.model_copy(update={"top_k": 2})})
    assert count_parameters(two).per_token - count_parameters(run).per_token == 280


def _with(run: Run, section: str, **changes: Any) -> Run:
    return run.model_copy(update={section: getattr(run, section).model_copy(update=changes)})


def test_pruned_experts_are_not_there_and_a_token_passes_the_router_of_its_modality_alone() -> None:
    # An expert has 280 parameters, the router 8 * 4.
    whole, pruned = count_parameters(_micro()), count_parameters(_with(_micro(), "moe", kept_experts=("0 3",)))
    assert (pruned.experts, pruned.router, pruned.total) == (2 * 280, 32, whole.total - 2 * 280)
    assert pruned.per_token == whole.per_token
    two = count_parameters(_with(_micro(), "moe", routers="per_modality"))
    assert (two.router, two.total, two.per_token) == (64, whole.total + 32, whole.per_token)


def test_a_second_tower_doubles_blocks_and_last_norm_and_a_token_passes_one() -> None:
    # A dense block has 600 parameters and a norm 16, as above.
    found = with_twins(_micro())
    one, two = found["dense one-tower"].parameters, found["dense two-tower"].parameters
    assert one.total == one.per_token == 3592 + 208 + 145 + 2 * 600
    assert two.total == one.total + 2 * 600 + 16
    assert two.per_token == one.per_token


def test_the_flops_of_a_small_model_agree_with_paper_and_pencil() -> None:
    # patches: 2 * 16 * 3*12*12 * 8 = 110592; of 16 tokens in a block: query, key, value, output 8 * 16 * 8*8 = 8192,
    # scores and values 4 * 16*16 * 8 = 8192, an MLP 4 * 16 * 8 * 16 = 8192; router 2 * 16 * 8 * 4 = 1024;
    # projection 2 * 8 * 8 = 128
    text = 2 * (8192 + 8192) + 2 * 8192 + 1024 + 128
    found = count_flops(_micro())
    assert (found.text, found.image) == (text, text + 110592)
    assert found.pair == found.image + found.text
    # Capacity factor 1: 4 experts * 16 slots for the 64 tokens of a group. With 1.2: 19.2, so 20 slots.
    assert found.pair_with_buffers == found.pair
    roomy = count_flops(_with(_micro(), "moe", capacity_factor=1.2))
    assert roomy.pair == found.pair
    assert roomy.pair_with_buffers - found.pair == 4 * 4 * 4 * 8 * 16 // 2


def _counted_by_torch(run: Run, *, image: bool = True, text: bool = True) -> int:
    """FLOPs of a real forward pass over a routing group in training, by torch's own counter of matrix products."""
    from limoe_dist.model.moe_layer import RoutingMode
    from limoe_dist.model.tower import build_model

    model = build_model(run, mesh=first_of_mesh(1, tp=1, ep=1), device=torch.device("cpu"))
    pairs = run.moe.group_pairs
    images = torch.rand(pairs, 3, run.image.size, run.image.size) if image else None
    tokens = torch.ones(pairs, run.text.length, dtype=torch.int64) if text else None
    valid = torch.ones(pairs, run.text.length, dtype=torch.bool) if text else None
    # The fused kernel of a CPU is not in the counter's table.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images, tokens, valid, mode=RoutingMode(training=True, aux=False))
    assert counter.get_total_flops() % pairs == 0
    return int(counter.get_total_flops()) // pairs


VARIANTS = {
    "as it is": {},
    "two choices": {"top_k": 2},
    "roomy": {"capacity_factor": 1.7},
    "cramped": {"capacity_factor": 0.5},
    "two routers": {"routers": "per_modality"},
    "two pools": {"image_experts": 2, "min_text_experts": 1.5},
    "pruned": {"kept_experts": ("0 2 3",)},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
def test_the_formula_counts_what_torch_counts_in_a_real_forward_pass(changes: dict[str, Any]) -> None:
    run = _with(_with(_micro(), "moe", **changes), "text", length=8)
    assert _counted_by_torch(run) == count_flops(run).pair_with_buffers


@pytest.mark.parametrize("twin", [as_dense, as_two_tower])
def test_a_dense_model_costs_what_torch_counts_for_either_modality(twin: Callable[[Run], Run]) -> None:
    run = twin(_with(_micro(), "text", length=8))
    found = count_flops(run)
    assert found.pair == found.pair_with_buffers
    assert _counted_by_torch(run, text=False) == found.image
    assert _counted_by_torch(run, image=False) == found.text
    assert _counted_by_torch(run) == found.pair


def test_limoe_costs_its_router_more_than_its_dense_twins() -> None:
    found = with_twins(preset("b16"))
    limoe, one, two = (found[name].flops for name in ("itself", "dense one-tower", "dense two-tower"))
    # 6 blocks * 212 tokens * 2 * 768 * 32
    assert limoe.pair - one.pair == 6 * 212 * 2 * 768 * 32
    assert two == one


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-two-tower"])
def test_a_twin_has_the_same_twins(name: str) -> None:
    found, whole = with_twins(preset(name)), with_twins(preset("tiny"))
    twins = ("dense one-tower", "dense two-tower")
    assert [found[twin] for twin in twins] == [whole[twin] for twin in twins]
    assert found["itself"] == found[twins[name == "tiny-two-tower"]]


def test_experts_on_other_ranks_count_too() -> None:
    assert with_twins(_micro(ep=4, tp=2)) == with_twins(_micro())


def test_the_presets_know_every_auxiliary_loss() -> None:
    from limoe_dist.model.moe_layer import AUX_LOSSES

    assert set(AUX_WEIGHTS) == set(AUX_LOSSES)


def test_a_dense_model_has_no_router_and_uses_all_its_parameters() -> None:
    found = planning.plan(preset("tiny-dense"), world=2)
    assert found.parameters.router == found.parameters.experts == found.shape.capacity == found.shape.groups == 0
    assert found.parameters.per_token == found.parameters.total
    assert found.layout is not None
    for cost in found.layout.costs.values():
        assert {each.axis for each in cost.exchanges} == {"world", "dp"}


def test_h14_on_a_node_with_8_ranks_has_its_experts_on_4_places_each() -> None:
    run = preset("h14").model_copy(update={"parallel": Parallel(ep=8)})
    found = planning.plan(run, world=64)
    assert found.layout is not None
    # 16 pairs * 272 tokens * 1.05 / 32 = 142.8, so 143 slots, rounded up to 144
    assert (found.shape.group_tokens, found.shape.capacity, found.shape.groups) == (4352, 144, 1344)
    assert (found.layout.pairs_per_rank, found.layout.groups_per_rank, found.layout.experts_per_rank) == (336, 21, 4)
    # Seven eighths of the experts are elsewhere.
    held = found.parameters.total - found.parameters.experts * 7 // 8
    assert found.layout.parameters_per_rank == held
    assert found.layout.costs["fp32"].memory.weights == 4 * held
    # Forward and backward: 12 blocks * 2 exchanges * 32 experts * 21 groups * 144 slots * 1280 numbers of 2 bytes
    exchanged = [each for each in found.layout.costs["bf16"].exchanges if each.axis == "ep"]
    assert [(each.op, each.during, each.calls) for each in exchanged] == [
        ("all_to_all", "forward", 24),
        ("all_to_all", "backward", 24),
    ]
    for each in exchanged:
        assert each.num_bytes == 12 * 2 * 32 * 21 * 144 * 1280 * 2
        assert each.leaving_bytes == each.num_bytes // 8 * 7


def test_the_memory_of_two_ranks_agrees_with_paper_and_pencil() -> None:
    # 6017 parameters; of the experts' 1120 each rank has 560 and nobody else has them. The other 4897 have 2 replicas:
    # the temperature is one number, for which both have room, the other 4896 fall into halves.
    (cost,) = planning.layout_of(_micro(ep=2), 2).costs.values()
    piece = 4896 // 2 + 1
    memory = cost.memory
    assert memory.weights == 4 * (4897 + 560)
    assert memory.gradients == 4 * (2 * piece + 560)
    assert memory.summed_pieces == 4 * piece
    assert memory.masters == 4 * (piece + 560)
    assert memory.optimizer == 8 * (piece + 560)
    assert memory.sum == 4 * (4897 + 560) + 4 * (2 * piece + 560) + 4 * piece + 12 * (piece + 560)


def test_narrow_weights_have_wide_masters_and_what_stays_wide_is_counted_wide() -> None:
    # Two pairs of norms and the last: 5 * 16; the router's 8 * 4 and the temperature.
    wide = 5 * 16 + 32 + 1
    (narrow,) = planning.layout_of(_micro(dtype="bf16"), 1).costs.values()
    assert narrow.memory.weights == 2 * (6017 - wide) + 4 * wide
    assert narrow.memory.masters == 4 * 6017
    (double,) = planning.layout_of(_micro(dtype="fp64"), 1).costs.values()
    assert double.memory.sum == 8 * 5 * 6017


def _tensor_bytes() -> dict[int, int]:
    """Bytes of the storage of every tensor that lives in this process, by its address."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _kept_by_this_rank(run: Run) -> tuple[int, int]:
    """Bytes of all tensors that a model and its engine bring into being and keep; and what of it a save copies."""
    from limoe_dist.model.tower import build_model
    from limoe_dist.optim.native import NativeEngine
    from limoe_dist.parallel.mesh import Mesh

    mesh = Mesh.build(tp=run.parallel.tp, ep=run.parallel.ep)
    before = _tensor_bytes()
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    engine = NativeEngine(model, run, mesh)
    kept = sum(count for address, count in _tensor_bytes().items() if address not in before)
    # torch's AdamW counts steps in a float for each bucket.
    kept -= 4 * len(engine.buckets) if run.optim.name == "adamw" else 0
    return kept, sum(shard.tensor.nbytes for shard in engine.shards().values() if shard.writes)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize(("tp", "ep", "dtype"), [(1, 1, "fp32"), (1, 4, "fp32"), (2, 2, "bf16"), (2, 4, "fp64")])
def test_the_memory_of_the_plan_is_what_model_and_engine_keep(
    ranks4: RanksPool, tp: int, ep: int, dtype: str, optimizer: str
) -> None:
    run = _micro(tp=tp, ep=ep, dtype=dtype, optimizer=optimizer)
    (cost,) = planning.layout_of(run, 4).costs.values()
    (first, saved), *others = ranks4.run(_kept_by_this_rank, run)
    assert first == cost.memory.sum
    # Uneven pieces: the last replicas may have less.
    assert all(0.9 * first < kept <= first for kept, _ in others)
    # Padding is not saved, nor what another rank writes too.
    assert 0.85 * cost.memory.saved < saved <= cost.memory.saved


def _built_by_this_rank(run: Run) -> dict[str, Any]:
    from limoe_dist.model.tower import build_model
    from limoe_dist.parallel.mesh import Mesh

    mesh = Mesh.build(tp=run.parallel.tp, ep=run.parallel.ep)
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    groups = {
        name: dist.get_process_group_ranks(axis.group) if axis.group is not None else [mesh.rank]
        for name in ("dp", "tp", "edp", "ep")
        for axis in [getattr(mesh, name)]
    }
    return {"groups": groups, "parameters": sum(parameter.numel() for parameter in model.parameters())}


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2), (2, 4)])
def test_the_plan_is_what_ranks_build(ranks4: RanksPool, tp: int, ep: int) -> None:
    run = _micro(tp=tp, ep=ep)
    layout = planning.layout_of(run, 4)
    for rank, built in enumerate(ranks4.run(_built_by_this_rank, run)):
        planned = {name: next(g for g in groups if rank in g) for name, groups in layout.axes.items()}
        assert planned == built["groups"]
        assert layout.parameters_per_rank == built["parameters"]


def _exchanged_by_this_rank(run: Run) -> int:
    """Bytes that this rank gives to all-to-alls in one forward and backward pass over its pairs."""
    from limoe_dist.model.moe_layer import RoutingMode
    from limoe_dist.model.tower import build_model
    from limoe_dist.parallel.mesh import Mesh

    mesh = Mesh.build(tp=1, ep=run.parallel.ep)
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    pairs = run.train.batch_pairs // dist.get_world_size()
    exchange, sent = dist.all_to_all_single, []

    def counting(out: torch.Tensor, x: torch.Tensor, **rest: Any) -> Any:
        sent.append(x.numel() * x.element_size())
        return exchange(out, x, **rest)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    try:
        images = torch.rand(pairs, 3, run.image.size, run.image.size)
        tokens = torch.ones(pairs, run.text.length, dtype=torch.int64)
        valid = torch.ones(pairs, run.text.length, dtype=torch.bool)
        output = model(images, tokens, valid, mode=RoutingMode(training=True))
        assert output.image_BP is not None
        assert output.text_BP is not None
        (output.image_BP.sum() + output.text_BP.sum()).backward()
    finally:
        dist.all_to_all_single = exchange
    return sum(sent)


def test_the_bytes_of_the_all_to_all_are_those_that_ranks_exchange(ranks2: RanksPool) -> None:
    run = _micro(ep=2)
    (cost,) = planning.layout_of(run, 2).costs.values()
    planned = sum(each.num_bytes for each in cost.exchanges if each.op == "all_to_all")
    assert planned > 0
    assert ranks2.run(_exchanged_by_this_rank, run) == [planned, planned]


def _moved_by_this_rank(run: Run) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes of each collective over each axis in one training step, as they are counted where they happen."""
    from limoe_dist.model.tower import build_model
    from limoe_dist.optim.native import NativeEngine
    from limoe_dist.parallel.mesh import Mesh
    from limoe_dist.train.step import Examples, training_step

    mesh = Mesh.build(tp=run.parallel.tp, ep=run.parallel.ep)
    model = build_model(run, mesh=mesh, device=torch.device("cpu"))
    engine = NativeEngine(model, run, mesh)
    pairs = run.train.batch_pairs // mesh.world.size
    tokens = torch.ones(pairs, run.text.length, dtype=torch.int64)
    examples = Examples(torch.rand(pairs, 3, run.image.size, run.image.size), tokens, tokens.bool())
    mesh.world.traffic.reset()
    training_step(model, engine, examples, step=0, run=run, mesh=mesh)
    return {kind: (each.calls, each.num_bytes) for kind, each in mesh.world.traffic.counts().items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_two_towers_move_what_the_plan_says(ranks2: RanksPool, recompute: bool) -> None:
    run = _with(as_two_tower(_micro(tp=2)), "train", recompute=recompute)
    planned: dict[tuple[str, str], tuple[int, int]] = {}
    (cost,) = planning.layout_of(run, 2).costs.values()
    for each in cost.exchanges:
        calls, num_bytes = planned.get((each.op, each.axis), (0, 0))
        planned[each.op, each.axis] = (calls + each.calls, num_bytes + each.num_bytes)
    moved = ranks2.run(_moved_by_this_rank, run)[0]
    assert {kind: moved[kind] for kind in planned} == planned


def test_every_broken_rule_of_a_layout_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        planning.main(["h14", "--ranks", "3", "--parallel.ep", "6", "--parallel.tp", "3", "--moe.top-k", "40"])
    text = str(caught.value)
    assert len(caught.value.problems) >= 4
    for part in ("moe.top_k=40", "parallel.ep=6 must divide the number of ranks", "parallel.tp=3 must divide"):
        assert part in text


def test_without_ranks_the_layout_is_not_judged_but_the_batch_is() -> None:
    assert planning.plan(preset("h14").model_copy(update={"parallel": Parallel(ep=5)}), world=None).layout is None
    with pytest.raises(ConfigError, match=r"train\.batch_pairs=10"):
        planning.main(["h14", "--train.batch-pairs", "10"])


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(UserError, match="--ranks=0: must be 1 or more"):
        planning.main(["tiny", "--ranks", "0"])


def test_json_holds_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert planning.main(["tiny", "--ranks", "2", "--parallel.ep", "2", "--json"]) == 0
    run = preset("tiny").model_copy(update={"parallel": Parallel(ep=2)})
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(planning.plan(run, world=2))))


def test_the_table_names_who_sits_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "120")
    assert planning.main(["h14", "--ranks", "64", "--parallel.ep", "8", "--parallel.tp", "2"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "5,553.8 M",
        "dense two-tower  1,304.7 M    675.0 M  353.4 G  1.000       353.4 G  1.000",
        "64 ranks = dp 32 x tp 2 = edp 8 x ep 8",
        "0-7 | 8-15 | ... | 56-63",
        "0,8,...,56 | 1,9,...,57 | ... | 7,15,...,63",
        "0-3 | 4-7 | ... | 28-31",
    ):
        assert part in shown


def test_the_table_tells_what_every_collective_moves_and_what_leaves_the_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "80")
    words = ["h14", "--ranks", "64", "--parallel.ep", "8", "--parallel.tp", "2", "--train.dtype", "bf16"]
    assert planning.main(words) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(word in shown for word in WORDS.values())
    lines = [line.split() for line in shown.splitlines()]
    # 12 * 2 * 32 * 21 * 144 * 1280 * 2 bytes
    assert ["all-to-all", "ep", "tokens", "24", "5.95", "GB", "7/8"] in lines
    assert ["all-reduce", "world", "gradient", "norm", "1", "8", "B", "2x63/64"] in lines
    assert "microbatches" not in shown
    assert "recompute" not in shown


def test_microbatches_and_recompute_are_told_with_what_they_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "COLUMNS", "160")
    words = ["h14", "--ranks", "64", "--parallel.ep", "8", "--train.microbatch-pairs", "48", "--train.dtype", "bf16"]
    assert planning.main(words) == 0
    # 336 pairs a rank; the all-to-all of one forward as above.
    assert "7 of 48 pairs: +1 forward: 1.33x compute, +5.95 GB exchanged in bf16" in capsys.readouterr().out
    assert planning.main([*words, "--train.recompute"]) == 0
    shown = capsys.readouterr().out
    assert "forward 1 + backward 2 + embedding pass 1 + recompute 1: 1.67x of forward and backward alone" in shown


def test_all_pairs_of_a_rank_in_one_microbatch_cost_nothing_more() -> None:
    run = preset("h14").model_copy(update={"parallel": Parallel(ep=8)})
    whole = planning.layout_of(run, 64)
    one = planning.layout_of(
        run.model_copy(update={"train": run.train.model_copy(update={"microbatch_pairs": 336})}), 64
    )
    assert one == whole
    assert (one.microbatches, one.compute.factor) == (1, 1.0)


def test_the_plan_says_whose_engine_its_formulas_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert planning.main(["tiny", "--ranks", "2", "--optim.engine", "deepspeed"]) == 0
    assert "formula of optim.engine=native" in capsys.readouterr().out
    assert planning.main(["tiny", "--ranks", "2"]) == 0
    assert "optim.engine" not in capsys.readouterr().out
