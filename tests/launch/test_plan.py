"""`limoe plan`: published counts, a case by hand, and the layout that ranks really build and exchange."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import plan as planning
from limoe_dist.config.errors import UserError
from limoe_dist.config.presets import preset
from limoe_dist.config.rules import ConfigError
from limoe_dist.config.schema import Parallel, Run
from tests.support.ranks import RanksPool


def _micro(*, tp: int = 1, ep: int = 1) -> Run:
    """Two blocks, the second with 4 experts; 16 image tokens and 16 text tokens a pair."""
    run = preset("tiny")
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"width": 8, "depth": 2, "heads": 2, "mlp_dim": 16, "embed_dim": 8}),
            "text": run.text.model_copy(update={"vocab_size": 10}),
            "moe": run.moe.model_copy(
                update={"blocks": (1,), "num_experts": 4, "group_pairs": 2, "min_image_experts": 2.0}
            ),
            "train": run.train.model_copy(update={"batch_pairs": 16}),
            "parallel": Parallel(tp=tp, ep=ep),
        }
    )


def test_h14_has_the_published_parameters() -> None:
    # LIMoE section 3.2: 5.6 B parameters, 675 M applied per token; 12 routers of 1280 x 32.
    count = planning.count_parameters(preset("h14"))
    assert round(count.total / 1e9, 2) == 5.55
    assert count.per_token // 10**6 == 675
    assert count.router == 12 * 1280 * 32 == 491_520


def test_the_parameters_of_a_small_model_agree_with_paper_and_pencil() -> None:
    # patch 12: 8*3*144 + 8 + 16*8 = 3592; text: 10*8 + 16*8 = 208; final norm 16, projections 2*64, scale 1: 145
    # a block: norms 32, attention 4*(64 + 8) = 288, dense MLP 8*16 + 16 + 16*8 + 8 = 280: 600
    # an MoE block: 320, router 8*4 = 32, four experts of 280 = 1120: 1472
    count = planning.count_parameters(_micro())
    assert count.total == 3592 + 208 + 145 + 600 + 1472
    assert count.router == 32
    assert count.experts == 1120
    assert count.total - count.per_token == 3 * 280


def test_with_two_choices_a_token_visits_two_experts() -> None:
    run = _micro()
    two = run.model_copy(update={"moe": run.moe.model_copy(update={"top_k": 2})})
    assert planning.count_parameters(two).per_token - planning.count_parameters(run).per_token == 280


def test_a_dense_model_has_no_router_and_uses_all_its_parameters() -> None:
    found = planning.plan(preset("tiny-dense"), world=2)
    assert found.parameters.router == found.parameters.experts == found.shape.capacity == found.shape.groups == 0
    assert found.parameters.per_token == found.parameters.total
    assert found.layout is not None
    assert set(found.layout.all_to_all_bytes.values()) == {0}


def test_h14_on_a_node_with_8_ranks_has_its_experts_on_4_places_each() -> None:
    run = preset("h14").model_copy(update={"parallel": Parallel(ep=8)})
    found = planning.plan(run, world=64)
    assert found.layout is not None
    # 16 pairs * 272 tokens * 1.05 / 32 = 142.8, so 143 slots, rounded up to 144
    assert (found.shape.group_tokens, found.shape.capacity, found.shape.groups) == (4352, 144, 1344)
    assert (found.layout.pairs_per_rank, found.layout.groups_per_rank, found.layout.experts_per_rank) == (336, 21, 4)
    # 12 blocks * 4 exchanges * 32 experts * 21 groups * 144 slots * 1280 numbers of 2 bytes
    assert found.layout.all_to_all_bytes["bf16"] == 12 * 4 * 32 * 21 * 144 * 1280 * 2
    # Seven eighths of the experts are elsewhere; weight, gradient and two moments of 4 bytes each
    held = found.parameters.total - found.parameters.experts * 7 // 8
    assert found.layout.parameters_per_rank == held
    assert found.layout.bytes_per_rank["sum"] == 16 * held


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
    planned = planning.layout_of(run, 2).all_to_all_bytes["fp32"]
    assert planned > 0
    assert ranks2.run(_exchanged_by_this_rank, run) == [planned, planned]


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
        "64 ranks = dp 32 x tp 2 = edp 8 x ep 8",
        "0-7 | 8-15 | ... | 56-63",
        "0,8,...,56 | 1,9,...,57 | ... | 7,15,...,63",
        "0-3 | 4-7 | ... | 28-31",
    ):
        assert part in shown
