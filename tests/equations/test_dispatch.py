"""T tokens, K choices, R rows of all buffers, E experts, C slots, D width."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from limoe_dist.equations.dispatch import combine, dispatch, index_slots
from limoe_dist.equations.routing import kept, slots, top_k
from tests.equations.orders import in_order
from tests.golden.load import ROUTING_CASES, routing_case

ORDERS = {"bpr": "priority", "fifo": "images_first"}


def routed(gates_GSE, *, k, capacity, order="priority", token_GS=None):
    """The weights (T, K) and the index; tokens are numbered as they stand where token_GS is None."""
    groups, tokens, experts = gates_GSE.shape
    choices = top_k(gates_GSE, k)
    order_GS = in_order(choices.weight_GSK, order=order)
    slot_GSK = slots(choices.expert_GSK, order_GS, num_experts=experts)
    kept_GSK = kept(slot_GSK, None, capacity=capacity)
    if token_GS is None:
        token_GS = torch.arange(groups * tokens).view(groups, tokens)
    index = index_slots(choices.expert_GSK, slot_GSK, kept_GSK, token_GS, num_experts=experts, capacity=capacity)
    return choices.weight_GSK.flatten(0, 1), index


def random_gates(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)


MASK_CASES = [name for name in ROUTING_CASES if "vmoe_bpr_dispatch_mask" in routing_case(name)]


def values_and_gradients(name, tag):
    """Ours beside vmoe's, by their name in the golden file; combine_weights where the file has them."""
    case, setup = routing_case(name), ROUTING_CASES[name]
    logits, x, w = (case[key].requires_grad_() for key in ("logits", "x", "W"))
    weight_TK, index = routed(logits.softmax(-1)[None], k=setup["k"], capacity=setup["capacity"], order=ORDERS[tag])
    inputs_ECD = dispatch(x, index).view(setup["E"], setup["capacity"], -1)
    outputs_RD = F.gelu(torch.bmm(inputs_ECD, w), approximate="tanh").flatten(0, 1)
    out = combine(outputs_RD, weight_TK, index)
    gradients = torch.autograd.grad((out * case["R"]).sum(), (logits, x, w))
    found = {"expert_inputs": inputs_ECD.detach(), "output": out.detach()}
    found |= {f"grad_{key}": gradient for key, gradient in zip(("logits", "x", "W"), gradients, strict=True)}
    if name in MASK_CASES:
        # Combining unit vectors, one for each row of the buffers, reads off which weight a row has for a token.
        rows = torch.eye(len(outputs_RD), dtype=torch.float64)
        found["combine_weights"] = combine(rows, weight_TK.detach(), index).unflatten(1, (setup["E"], -1))
    return {key: (ours, case[f"vmoe_{tag}_{key}"]) for key, ours in found.items()}


@pytest.mark.parametrize("name", ROUTING_CASES)
@pytest.mark.parametrize("tag", ORDERS)
def test_values_and_gradients_equal_vmoe(name, tag):
    found = values_and_gradients(name, tag)
    assert torch.equal(*found.pop("expert_inputs"))
    # float64, sums of at most some 200 terms of size 1: 200 * 2.2e-16 = 4e-14, and a margin.
    exactly = {"rtol": 0.0, "atol": 1e-12}
    assert {"output", "grad_logits", "grad_x", "grad_W"} <= found.keys()
    for key, (ours, theirs) in found.items():
        torch.testing.assert_close(ours, theirs, **exactly, msg=lambda text, key=key: f"{key}: {text}")


def masks(name, tag):
    """(T, R) bool: the index read from its tokens, read from its rows, and vmoe's one-hot mask."""
    case, setup = routing_case(name), ROUTING_CASES[name]
    _, index = routed(case["gates"][None], k=setup["k"], capacity=setup["capacity"], order=ORDERS[tag])
    num_tokens, num_rows = len(index.row_TK), len(index.choice_R)
    from_tokens = torch.zeros(num_tokens, num_rows, dtype=torch.bool)
    token_T1 = torch.arange(num_tokens)[:, None].expand_as(index.row_TK)
    from_tokens[token_T1[index.kept_TK], index.row_TK[index.kept_TK]] = True
    from_rows = torch.zeros(num_tokens, num_rows, dtype=torch.bool)
    from_rows[index.token_R[index.used_R], torch.arange(num_rows)[index.used_R]] = True
    return from_tokens, from_rows, case[f"vmoe_{tag}_dispatch_mask"].flatten(1)


@pytest.mark.parametrize("name", MASK_CASES)
@pytest.mark.parametrize("tag", ORDERS)
def test_the_index_is_the_one_hot_mask_of_vmoe(name, tag):
    from_tokens, from_rows, expected = masks(name, tag)
    assert torch.equal(from_tokens, expected)
    assert torch.equal(from_rows, expected)


def test_rows_are_ordered_by_expert_then_group_then_slot():
    # Two groups of two tokens, E = 2, C = 2: row = (expert * 2 + group) * 2 + slot.
    # Group 0: tokens 0, 1 both want expert 0, token 1 first (0.9): rows 1 and 0.
    # Group 1: token 2 wants expert 1, slot 0: (1 * 2 + 1) * 2 = 6; token 3 wants expert 0: (0 * 2 + 1) * 2 = 2.
    gates_GSE = torch.tensor([[[0.8, 0.2], [0.9, 0.1]], [[0.3, 0.7], [0.6, 0.4]]])
    _, index = routed(gates_GSE, k=1, capacity=2)
    assert index.row_TK.tolist() == [[1], [0], [6], [2]]
    x_TD = torch.tensor([[10.0], [11.0], [12.0], [13.0]])
    assert dispatch(x_TD, index).flatten().tolist() == [11.0, 10.0, 13.0, 0.0, 0.0, 0.0, 12.0, 0.0]


def test_tokens_are_found_where_the_model_keeps_them():
    # The group reads tokens 2, 0, 1 of the model; all want expert 0 and are served by gate: 0.9 is token 0.
    gates_GSE = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]]])
    _, index = routed(gates_GSE, k=1, capacity=2, token_GS=torch.tensor([[2, 0, 1]]))
    buffer_RD = dispatch(torch.tensor([[100.0], [101.0], [102.0]]), index)
    assert buffer_RD.flatten().tolist() == [100.0, 101.0, 0.0, 0.0]
    assert combine(buffer_RD, torch.ones(3, 1), index).flatten().tolist() == [100.0, 101.0, 0.0]


def test_a_dropped_token_comes_back_as_zero_without_a_gradient():
    # Three tokens for expert 0 with two slots; token 0 has the smallest gate.
    gates_GSE = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]]], requires_grad=True)
    x_TD = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    weight_TK, index = routed(gates_GSE, k=1, capacity=2)
    # The expert doubles and adds 5, as an expert with a bias does to its empty rows, too.
    out = combine(dispatch(x_TD, index) * 2 + 5, weight_TK, index)
    # 0.9 * (2 * 2 + 5) = 8.1 and 0.8 * (2 * 3 + 5) = 8.8
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 8.1, 8.8]))
    out.sum().backward()
    # By x: gate * 2. By the gate: the expert's output.
    torch.testing.assert_close(x_TD.grad.flatten(), torch.tensor([0.0, 1.8, 1.6]))
    torch.testing.assert_close(gates_GSE.grad[0, :, 0], torch.tensor([0.0, 9.0, 11.0]))
    assert gates_GSE.grad[0, :, 1].tolist() == [0.0, 0.0, 0.0]


def test_empty_rows_give_the_experts_bias_no_gradient():
    _, index = routed(torch.tensor([[[0.9, 0.1]]]), k=1, capacity=4)
    bias = torch.zeros(2, 1, requires_grad=True)
    out = combine(bias.repeat_interleave(4, dim=0), torch.ones(1, 1), index)
    out.sum().backward()
    # One token at expert 0; its three empty rows and expert 1 count nothing.
    assert bias.grad.flatten().tolist() == [1.0, 0.0]


def test_a_surviving_second_choice_still_contributes():
    # First choices: A and B at expert 0, whose one slot goes to A (0.7 > 0.6); the second choices: A 0.3 and B 0.4 at
    # expert 1, whose one slot goes to A again, served first. C's first choice is expert 2, its second choice 0 is full.
    gates_GSE = torch.tensor([[[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.45, 0.0, 0.55]]])
    weight_TK, index = routed(gates_GSE, k=2, capacity=1)
    assert index.kept_TK.tolist() == [[True, True], [False, False], [True, False]]
    buffer_RD = torch.tensor([[1.0], [10.0], [100.0]])
    # A: 0.7 * 1 + 0.3 * 10 = 3.7; B: 0; C: 0.55 * 100 = 55
    torch.testing.assert_close(combine(buffer_RD, weight_TK, index).flatten(), torch.tensor([3.7, 0.0, 55.0]))


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_of_dispatch_and_combine_equal_finite_differences(k):
    # 2 groups of 5 tokens, 3 experts with 2 slots: some drop, some rows stay empty.
    gates_GSE = random_gates(2, 5, 3)
    token_GS = torch.tensor([[9, 1, 5, 0, 3], [2, 8, 4, 7, 6]])
    weight_TK, index = routed(gates_GSE, k=k, capacity=2, token_GS=token_GS)
    assert not index.kept_TK.all()
    random = torch.Generator().manual_seed(1)
    x_TD = torch.randn(10, 2, dtype=torch.float64, generator=random, requires_grad=True)
    buffer_RD = torch.randn(12, 2, dtype=torch.float64, generator=random, requires_grad=True)
    weight_TK = weight_TK.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dispatch(x, index), (x_TD,))
    assert torch.autograd.gradcheck(lambda buffer, weight: combine(buffer, weight, index), (buffer_RD, weight_TK))


def test_an_empty_row_exists_in_the_gradient_check():
    _, index = routed(random_gates(2, 5, 3), k=1, capacity=2)
    assert not index.used_R.all()


def test_bfloat16_buffers_with_float32_gates_keep_both_types():
    gates_GSE = random_gates(1, 6, 2).float().requires_grad_()
    weight_TK, index = routed(gates_GSE, k=2, capacity=4)
    x_TD = torch.ones(6, 3, dtype=torch.bfloat16, requires_grad=True)
    out = combine(dispatch(x_TD, index), weight_TK, index)
    out.sum().backward()
    assert (out.dtype, x_TD.grad.dtype, gates_GSE.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    # All six tokens ask both experts, each with four slots: four kept requests an expert.
    assert index.kept_TK.sum() == 8
    # Every kept choice brings the sum of three ones; bfloat16 holds 3 exactly.
    assert torch.unique(gates_GSE.grad).tolist() == [0.0, 3.0]


@st.composite
def routings(draw):
    groups, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(1, 10)), draw(st.integers(1, 4))
    gates_GSE = random_gates(groups, tokens, experts, seed=draw(st.integers(0, 2**31)))
    token_GS = torch.tensor(draw(st.permutations(range(groups * tokens)))).view(groups, tokens)
    return gates_GSE, draw(st.integers(1, min(3, experts))), token_GS


@given(routings())
def test_everything_comes_back_where_nothing_is_dropped(routing):
    gates_GSE, k, token_GS = routing
    # k * S slots can never be too few.
    _, index = routed(gates_GSE, k=k, capacity=k * gates_GSE.shape[1], token_GS=token_GS)
    x_TD = torch.arange(1.0, 1.0 + token_GS.numel())[:, None]
    # k copies, each with gate 1: whole numbers, exact.
    assert torch.equal(combine(dispatch(x_TD, index), torch.ones(token_GS.numel(), k), index), k * x_TD)


@given(routings(), st.integers(1, 4))
def test_the_index_is_a_matching_of_kept_choices_and_rows(routing, capacity):
    gates_GSE, k, token_GS = routing
    _, index = routed(gates_GSE, k=k, capacity=capacity, token_GS=token_GS)
    rows = index.row_TK[index.kept_TK]
    assert len(rows.unique()) == len(rows) == int(index.used_R.sum())
    # From a choice to its row and back to the choice.
    assert torch.equal(index.choice_R[rows], index.kept_TK.flatten().nonzero().flatten())
    # The experts that serve a token are the ones that it chose.
    expert_GSK = top_k(gates_GSE, k).expert_GSK
    expert_TK = torch.empty_like(index.row_TK)
    expert_TK[token_GS.flatten()] = expert_GSK.flatten(0, 1)
    assert torch.equal(rows // (capacity * gates_GSE.shape[0]), expert_TK[index.kept_TK])


@given(routings(), st.integers(1, 4))
def test_several_groups_give_the_same_as_each_group_alone(routing, capacity):
    gates_GSE, k, _ = routing
    groups, tokens, experts = gates_GSE.shape
    weight_TK, index = routed(gates_GSE, k=k, capacity=capacity)
    x_TD = random_gates(groups * tokens, 3)
    buffer_EGCD = dispatch(x_TD, index).view(experts, groups, capacity, 3)
    together = combine((buffer_EGCD * 2).flatten(0, 2), weight_TK, index)
    for group in range(groups):
        own = slice(group * tokens, (group + 1) * tokens)
        weight_SK, alone = routed(gates_GSE[group : group + 1], k=k, capacity=capacity)
        buffer_RD = dispatch(x_TD[own], alone)
        assert torch.equal(buffer_EGCD[:, group].flatten(0, 1), buffer_RD)
        assert torch.equal(together[own], combine(buffer_RD * 2, weight_SK, alone))


def test_weights_of_bf16_rows_are_not_rounded_before_the_product() -> None:
    # 0.3 * 1.5 = 0.45 is nearest to 0.44921875 in bfloat16; 0.3 rounded first is 0.30078125, and gives 0.451171875.
    index = index_slots(
        torch.tensor([[[0]]]),
        torch.tensor([[[0]]]),
        torch.tensor([[[True]]]),
        torch.tensor([[0]]),
        num_experts=1,
        capacity=1,
    )
    combined = combine(torch.tensor([[1.5]], dtype=torch.bfloat16), torch.tensor([[0.3]]), index)
    assert combined.dtype == torch.bfloat16
    assert combined.item() == 0.44921875
