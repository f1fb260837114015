"""Decisions that `limoe verify` forces on a layout: tokens that count, slots given out anew, one modality alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from limoe_dist.config.schema import Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.parity import compare
from limoe_dist.train.parity.routes import UNEXPLAINED, Decision, Flips, follow, judge, valid_tokens
from limoe_dist.train.step import Examples
from tests.support.cases import small_run

RUN = small_run("fp64")
PAIRS, GROUPS = 8, 4
VALID = torch.arange(RUN.text.length) < torch.arange(PAIRS)[:, None] % RUN.text.length + 1
"""Caption i has i % N + 1 tokens."""


def examples(given: str) -> Examples:
    images = torch.zeros(PAIRS, 3, 1, 1) if "images" in given else None
    captions = "texts" in given
    return Examples(
        images,
        torch.zeros(PAIRS, RUN.text.length, dtype=torch.int64) if captions else None,
        VALID if captions else None,
    )


def masked(run: Run) -> Run:
    return run.model_copy(update={"text": run.text.model_copy(update={"pad": "masked"})})


@pytest.mark.parametrize("given", ["images texts", "texts", "images"])
def test_tokens_that_count_are_all_of_the_pictures_and_the_valid_ones_of_the_captions(given: str) -> None:
    assert RUN.moe.group_pairs == PAIRS // GROUPS
    found_GS = valid_tokens(examples(given), masked(RUN))
    if given == "images":
        # Masks belong to captions: without one every token counts.
        assert found_GS is None
        return
    assert found_GS is not None
    images = RUN.image_tokens * RUN.moe.group_pairs if "images" in given else 0
    assert found_GS.shape == (GROUPS, images + RUN.text.length * RUN.moe.group_pairs)
    assert bool(found_GS[:, :images].all())
    assert torch.equal(found_GS[:, images:], VALID.view(GROUPS, -1))


def test_where_padding_is_an_ordinary_token_all_tokens_count() -> None:
    run = RUN.model_copy(update={"text": RUN.text.model_copy(update={"pad": "token"})})
    assert valid_tokens(examples("images texts"), run) is None


@pytest.mark.parametrize("given", ["images texts", "texts", "images"])
@pytest.mark.parametrize("microbatch_pairs", [0, 2, 4])
def test_forced_routes_serve_exactly_the_kept_choices_of_each_microbatch(given: str, microbatch_pairs: int) -> None:
    run = masked(RUN).model_copy(update={"train": RUN.train.model_copy(update={"microbatch_pairs": microbatch_pairs})})
    tokens = (RUN.image_tokens * ("images" in given) + RUN.text.length * ("texts" in given)) * RUN.moe.group_pairs
    # Token s of group g asks for expert (s + g) % E; every sixth choice from token g on is kept.
    token_S, group_G = torch.arange(tokens), torch.arange(GROUPS)[:, None]
    expert_GS1 = ((token_S + group_G) % RUN.moe.num_experts)[..., None]
    kept_GS1 = ((token_S + group_G) % 6 == 0)[..., None]
    parts = follow({1: Decision(expert_GS1, kept_GS1)}, examples(given), run)
    groups = (microbatch_pairs or PAIRS) // RUN.moe.group_pairs
    assert len(parts) == GROUPS // groups
    for number, part in enumerate(parts):
        route = part[1]
        here = slice(number * groups, (number + 1) * groups)
        assert torch.equal(route.expert_GSK, expert_GS1[here])
        assert torch.equal(route.kept_GSK, kept_GS1[here])
        assert torch.equal(route.order_GS, torch.arange(tokens).expand(groups, tokens))
        # Rows are ordered by expert, group and slot: how many are used of each is how many were kept.
        used_EG = route.index.used_R.view(RUN.moe.num_experts, groups, -1).sum(-1)
        wanted = [
            [int((kept_GS1[g] & (expert_GS1[g] == e)).sum()) for g in range(here.start, here.stop)]
            for e in range(RUN.moe.num_experts)
        ]
        assert used_EG.tolist() == wanted
        assert int(route.index.kept_TK.sum()) == int(kept_GS1[here].sum())


@pytest.mark.parametrize("flipped", [False, True])
def test_a_choice_that_moves_pushes_only_in_the_queue_of_its_own_group(flipped: bool) -> None:
    # In the second group token 2 moves from expert 1 to expert 0, across 1e-8, and token 1 loses its slot there.
    # In the first group token 0 loses its slot at expert 0 or 3, and nobody moves.
    wanted = torch.tensor([[3, 3, 3], [0, 0, 1]]), torch.tensor([[1, 1, 1], [1, 1, 1]], dtype=torch.bool)
    found = torch.tensor([[3, 3, 3], [0, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 1]], dtype=torch.bool)
    gates_GSE = torch.full((2, 3, 4), 0.05, dtype=torch.float64)
    gates_GSE[1, :2, 0] = torch.tensor([0.9, 0.6])
    gates_GSE[1, 2, :2] = torch.tensor([0.4 - 1e-8, 0.4], dtype=torch.float64)

    def judged(first_expert: int, *, lost: bool) -> Flips:
        sides = []
        for (expert_GS, kept_GS), loses in ((found, lost), (wanted, False)):
            expert_GS, kept_GS = expert_GS.clone(), kept_GS.clone()
            expert_GS[0], kept_GS[0, 0] = first_expert, not loses
            order = [1, 0] if flipped else [0, 1]
            sides.append(Decision(expert_GS[order][..., None], kept_GS[order][..., None]))
        gates = gates_GSE.flip(0) if flipped else gates_GSE
        return judge(sides[0], sides[1], gates, None, by="max", limit=1e-6)

    for first_expert in (0, 3):
        pushed = judged(first_expert, lost=False)
        assert (pushed.choices, pushed.slots) == (1, 1)
        assert pushed.margin == pytest.approx(1e-8)
        assert judged(first_expert, lost=True) == Flips(choices=1, slots=2, margin=UNEXPLAINED)


@pytest.mark.parametrize(("blocks", "skews"), [((), [0.0]), ((1,), [0.0, 0.5, 1.0, 2.0, 4.0, 8.0])])
def test_a_router_is_skewed_until_tokens_are_dropped_and_a_dense_model_has_none(
    blocks: tuple[int, ...], skews: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def one_process(case: Any, *_: Any) -> Any:
        tried.append(case.skew)
        return SimpleNamespace(passes=[None])

    monkeypatch.setattr(compare, "_one_process", one_process)
    monkeypatch.setattr(compare, "dropped_frac", lambda one, mesh: 0.0 if blocks else pytest.fail("no MoE block"))
    run = RUN.model_copy(update={"moe": RUN.moe.model_copy(update={"blocks": blocks})})
    skew, _ = compare._skewed_enough(run, Mesh.single(), torch.device("cpu"))
    assert tried == skews
    assert skew == tried[-1]
