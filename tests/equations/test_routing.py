"""G routing groups, S tokens of a group, E experts, K choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limoe_dist.equations.routing import capacity, kept, priorities, service_order, slots, top_k
from tests.equations.orders import in_order
from tests.golden.load import ROUTING_CASES, routing_case

ORDERS = {"bpr": "priority", "fifo": "images_first"}


def one_group(rows):
    """(1, S, E) float64 from a list of rows."""
    return torch.tensor(rows, dtype=torch.float64)[None]


@st.composite
def routings(draw, max_k=1):
    """Gates (G, S, E), k and a capacity that often is too small; few distinct logits, so that ties are frequent."""
    groups, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    k = draw(st.integers(1, min(max_k, experts)))
    logit = st.integers(-3, 3).map(float)
    logits = draw(
        st.lists(logit, min_size=groups * tokens * experts, max_size=groups * tokens * experts).map(torch.tensor)
    )
    gates_GSE = logits.double().view(groups, tokens, experts).softmax(-1)
    return gates_GSE, k, draw(st.integers(1, 6))


def route(gates_GSE, *, k, capacity, order="priority", valid_GS=None):
    choices = top_k(gates_GSE, k)
    order_GS = in_order(choices.weight_GSK, valid_GS, order=order)
    slot_GSK = slots(choices.expert_GSK, order_GS, valid_GS, num_experts=gates_GSE.shape[-1])
    return choices, slot_GSK, kept(slot_GSK, valid_GS, capacity=capacity)


CAPACITY_CASES = [name for name, setup in ROUTING_CASES.items() if setup["cf"] and setup["ceil_or_round"] == "ceil"]
"""The others were given their capacity as a number, or round where V-MoE and this project round up."""


def decisions(name, tag):
    """Ours beside vmoe's, by their name in the golden file."""
    case, setup = routing_case(name), ROUTING_CASES[name]
    choices, slot_GSK, kept_GSK = route(
        case["gates"][None], k=setup["k"], capacity=setup["capacity"], order=ORDERS[tag]
    )
    found = {
        "expert_index": choices.expert_GSK,
        "topk_weights": choices.weight_GSK,
        "buffer_slot": slot_GSK,
        "kept": kept_GSK,
    }
    return {key: (ours[0], case[f"vmoe_{tag}_{key}"]) for key, ours in found.items()}


def success_rates(name, tag):
    """Ours beside the reference's, by modality; one case has no text."""
    case, (kept_SK, _) = routing_case(name), decisions(name, tag)["kept"]
    found = {}
    for modality, wanted in (("img", [0]), ("txt", [1]), ("all", [0, 1])):
        of_modality = torch.isin(case["modality"], torch.tensor(wanted))
        if of_modality.any():
            found[modality] = kept_SK[of_modality].double().mean(), case[f"ref_{tag}_success_rate_{modality}"]
    return found


def orders_of_service(name):
    """(ours, vmoe's), both (S,)."""
    case = routing_case(name)
    return service_order(case["gates"].max(-1).values[None])[0], case["vmoe_bpr_perm"]


def capacities(name):
    """(ours, vmoe's)."""
    setup = ROUTING_CASES[name]
    tokens = setup["n_img"] + setup["n_txt"]
    found = capacity(tokens, num_experts=setup["E"], k=setup["k"], factor=setup["cf"], multiple=setup["multiple_of"])
    return found, setup["capacity"]


@pytest.mark.parametrize("name", ROUTING_CASES)
@pytest.mark.parametrize("tag", ORDERS)
def test_routing_decisions_equal_vmoe(name, tag):
    # Decisions are integers and copied gates: equality is exact.
    for key, (ours, theirs) in decisions(name, tag).items():
        assert torch.equal(ours, theirs), key
    for modality, (ours, theirs) in success_rates(name, tag).items():
        # One rounding apart: the same two whole numbers are divided.
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-15), modality


@pytest.mark.parametrize("name", ROUTING_CASES)
def test_the_order_of_service_equals_vmoe(name):
    assert torch.equal(*orders_of_service(name))


@pytest.mark.parametrize("name", CAPACITY_CASES)
def test_capacities_equal_vmoe(name):
    ours, theirs = capacities(name)
    assert ours == theirs


def test_capacity_rounds_up_to_a_multiple_of_four():
    # 212 * 1 * 1 / 8 = 26.5 -> 27 slots -> 28; with two choices 53 -> 56.
    assert capacity(212, num_experts=8, k=1, factor=1.0) == 28
    assert capacity(212, num_experts=8, k=1, factor=1.0, multiple=1) == 27
    assert capacity(212, num_experts=8, k=2, factor=1.0) == 56
    # B/16, groups of 16 pairs: 3392 * 1.05 / 32 = 111.3 -> 112. H/14: 16 * 272 * 1.05 / 32 = 142.8 -> 144.
    assert capacity(16 * 212, num_experts=32, k=1, factor=1.05) == 112
    assert capacity(16 * 272, num_experts=32, k=1, factor=1.05) == 144


def test_the_last_bit_of_a_product_gives_no_slot_more():
    # 50 * 1.1 is 55.00000000000001 in float64, and means 55; 160 * 1.05 = 168.
    assert capacity(50, num_experts=1, k=1, factor=1.1, multiple=1) == 55
    assert capacity(160, num_experts=1, k=1, factor=1.05, multiple=1) == 168
    # 800 * 1.1 / 4 = 220 is a multiple of 4 already.
    assert capacity(800, num_experts=4, k=1, factor=1.1) == 220


def test_an_expert_has_at_least_one_multiple_of_slots():
    assert capacity(1, num_experts=32, k=1, factor=0.01) == 4
    assert capacity(1, num_experts=32, k=1, factor=0.01, multiple=1) == 1
    # 3e-14 slots are rounded to 0, and still an expert has one.
    assert capacity(1, num_experts=32, k=1, factor=1e-12, multiple=1) == 1


def test_ties_go_to_the_lowest_expert():
    gates_GSE = one_group([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]])
    assert top_k(gates_GSE, 1).expert_GSK.tolist() == [[[0], [1]]]
    assert top_k(gates_GSE, 3).expert_GSK.tolist() == [[[0, 1, 2], [1, 3, 0]]]


def test_the_weights_are_the_gates_themselves():
    # Not divided by 0.5 + 0.3: the paper weights with g(x)_e.
    assert top_k(one_group([[0.2, 0.5, 0.3]]), 2).weight_GSK.tolist() == [[[0.5, 0.3]]]


def test_gradients_reach_the_gates_only_at_the_chosen_experts():
    for k, expected in ((1, [0.0, 1.0, 0.0]), (2, [0.0, 1.0, 1.0])):
        gates_GSE = one_group([[0.2, 0.5, 0.3]]).requires_grad_()
        top_k(gates_GSE, k).weight_GSK.sum().backward()
        assert gates_GSE.grad[0, 0].tolist() == expected


def test_low_priority_tokens_drop_first():
    # All four want expert 0, which has two slots; served by gate: 0.9 (token 1), 0.8 (3), 0.7 (2), 0.6 (0).
    gates_GSE = one_group([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]])
    _, slot_GSK, kept_GSK = route(gates_GSE, k=1, capacity=2)
    assert slot_GSK.flatten().tolist() == [3, 0, 2, 1]
    assert kept_GSK.flatten().tolist() == [False, True, False, True]


def test_images_first_serves_as_the_tokens_stand():
    gates_GSE = one_group([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]])
    _, slot_GSK, kept_GSK = route(gates_GSE, k=1, capacity=2, order="images_first")
    assert slot_GSK.flatten().tolist() == [0, 1, 2, 3]
    assert kept_GSK.flatten().tolist() == [True, True, False, False]


def test_equal_priorities_are_served_as_they_stand():
    assert service_order(torch.full((1, 5), 0.5)).tolist() == [[0, 1, 2, 3, 4]]


def test_masked_padding_is_served_last():
    valid_GS = torch.tensor([[True, False, True]])
    for priority, expected in (([0.5, 0.9, 0.7], [2, 0, 1]), ([0.0, 0.0, 0.0], [0, 2, 1])):
        assert service_order(torch.tensor([priority]), valid_GS).tolist() == [expected]


def test_priority_by_the_sum_asks_what_all_choices_weigh_together():
    # By the largest gate token 0 comes first, 0.5 to 0.45; by the sum of two token 1, 0.6 to 0.9.
    weight_GSK = one_group([[0.5, 0.1], [0.45, 0.45]])
    assert service_order(priorities(weight_GSK, "max")).tolist() == [[0, 1]]
    assert service_order(priorities(weight_GSK, "sum")).tolist() == [[1, 0]]


def test_an_expert_that_is_not_allowed_is_never_chosen():
    gates_GSE = one_group([[0.1, 0.6, 0.3], [0.0, 1.0, 0.0]])
    choices = top_k(gates_GSE, 2, torch.tensor([True, False, True]))
    assert choices.expert_GSK.tolist() == [[[2, 0], [0, 2]]]
    # The weight is the gate as it was: nothing is normalised again.
    assert choices.weight_GSK.tolist() == [[[0.3, 0.1], [0.0, 0.0]]]


def test_first_choices_are_served_before_second_ones():
    # Order of service by best gate: A 0.9, B 0.8, C 0.55.
    # Expert 0: first choices A, C take slots 0, 1; then B's second choice, slot 2, though B comes before C.
    # Expert 1: first choice B takes slot 0; then second choices A, C take slots 1, 2.
    gates_GSE = one_group([[0.9, 0.1], [0.2, 0.8], [0.55, 0.45]])
    choices, slot_GSK, kept_GSK = route(gates_GSE, k=2, capacity=2)
    assert choices.expert_GSK[0].tolist() == [[0, 1], [1, 0], [0, 1]]
    assert slot_GSK[0].tolist() == [[0, 1], [0, 2], [1, 2]]
    assert kept_GSK[0].tolist() == [[True, True], [True, False], [True, False]]


@pytest.mark.parametrize("order", ["priority", "images_first"])
def test_masked_padding_takes_no_slot_even_with_two_choices(order):
    # Token 1 is padding and would be first by its gate. Without it expert 0 serves token 0 in slot 0 and expert 1 its
    # second choice in slot 0; token 2 has slot 1 of each.
    gates_GSE = one_group([[0.7, 0.3], [0.99, 0.01], [0.6, 0.4]])
    valid_GS = torch.tensor([[True, False, True]])
    _, slot_GSK, kept_GSK = route(gates_GSE, k=2, capacity=2, order=order, valid_GS=valid_GS)
    assert slot_GSK[0][[0, 2]].tolist() == [[0, 0], [1, 1]]
    assert kept_GSK[0].tolist() == [[True, True], [False, False], [True, True]]


def test_a_group_of_padding_alone_keeps_nothing():
    _, _, kept_GSK = route(one_group([[0.7, 0.3]] * 3), k=1, capacity=4, valid_GS=torch.zeros(1, 3, dtype=torch.bool))
    assert not kept_GSK.any()


@given(routings(max_k=3))
def test_no_expert_serves_more_than_its_capacity(routing):
    gates_GSE, k, slots_per_expert = routing
    choices, slot_GSK, kept_GSK = route(gates_GSE, k=k, capacity=slots_per_expert)
    for expert_SK, slot_SK, kept_SK in zip(choices.expert_GSK, slot_GSK, kept_GSK, strict=True):
        for expert in range(gates_GSE.shape[-1]):
            asked = expert_SK == expert
            # Slots count the requests: 0, 1, 2, ... without a gap or a double, and the first C are kept.
            assert sorted(slot_SK[asked].tolist()) == list(range(int(asked.sum())))
            assert int(kept_SK[asked].sum()) == min(int(asked.sum()), slots_per_expert)


@given(routings(max_k=1))
def test_the_order_decides_who_is_kept_but_not_how_many(routing):
    gates_GSE, k, slots_per_expert = routing
    counts = [int(route(gates_GSE, k=k, capacity=slots_per_expert, order=order)[2].sum()) for order in ORDERS.values()]
    loads = [torch.bincount(group, minlength=5) for group in top_k(gates_GSE, 1).expert_GSK[..., 0]]
    expected = sum(int(load.clamp(max=slots_per_expert).sum()) for load in loads)
    assert counts == [expected, expected]


@given(routings(max_k=1))
def test_a_dropped_token_has_no_larger_gate_than_a_kept_one_of_its_expert(routing):
    gates_GSE, k, slots_per_expert = routing
    choices, _, kept_GSK = route(gates_GSE, k=k, capacity=slots_per_expert)
    for expert_S, weight_S, kept_S in zip(
        choices.expert_GSK[..., 0], choices.weight_GSK[..., 0], kept_GSK[..., 0], strict=True
    ):
        for expert in range(gates_GSE.shape[-1]):
            kept_weights, dropped = weight_S[(expert_S == expert) & kept_S], weight_S[(expert_S == expert) & ~kept_S]
            if len(dropped):
                assert dropped.max() <= kept_weights.min()


@given(routings(max_k=2), st.data())
def test_masked_padding_changes_nothing_for_the_others(routing, data):
    gates_GSE, k, slots_per_expert = routing
    valid_S = torch.tensor(data.draw(st.lists(st.booleans(), min_size=gates_GSE.shape[1], max_size=gates_GSE.shape[1])))
    valid_GS = valid_S.expand(gates_GSE.shape[0], -1)
    _, slot_GSK, kept_GSK = route(gates_GSE, k=k, capacity=slots_per_expert, valid_GS=valid_GS)
    _, alone_slot_GSK, alone_kept_GSK = route(gates_GSE[:, valid_S], k=k, capacity=slots_per_expert)
    assert torch.equal(slot_GSK[:, valid_S], alone_slot_GSK)
    assert torch.equal(kept_GSK[:, valid_S], alone_kept_GSK)
    assert not kept_GSK[:, ~valid_S].any()


@given(routings(max_k=2))
def test_several_groups_are_routed_like_each_group_alone(routing):
    gates_GSE, k, slots_per_expert = routing
    _, slot_GSK, kept_GSK = route(gates_GSE, k=k, capacity=slots_per_expert)
    for group in range(gates_GSE.shape[0]):
        _, slot_1SK, kept_1SK = route(gates_GSE[group : group + 1], k=k, capacity=slots_per_expert)
        assert torch.equal(slot_GSK[group], slot_1SK[0])
        assert torch.equal(kept_GSK[group], kept_1SK[0])
