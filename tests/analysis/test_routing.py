"""Tallies of routes that are written by hand; the arithmetic is in the comments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limoe_dist.analysis.routing import PADDING, BlockTally, Sent, effective_experts, ranks_of, success_of
from limoe_dist.analysis.routing_record import RANK_BINS, BlockRouting
from limoe_dist.config.schema import Moe
from limoe_dist.equations.dispatch import SlotIndex
from limoe_dist.model.moe_layer import Route

MOE = Moe(num_experts=3, min_image_experts=2.0, min_text_experts=1.5, global_text=0.0)
NOWHERE = torch.zeros(0, dtype=torch.int64)
NO_INDEX = SlotIndex(NOWHERE, NOWHERE.bool(), NOWHERE, NOWHERE.bool())

# Two groups of 3 image tokens and 2 text tokens; -1 is the padding, which the vocabulary of 4 calls 4.
EXPERTS = [[0, 0, 1, 2, 2], [0, 1, 1, 2, 0]]
KEPT = [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
ORDER = [[3, 0, 4, 1, 2], [0, 1, 2, 3, 4]]
PIECES = [[0, 1], [0, 4]]


def route(experts: list[list[int]], kept: list[list[int]], order: list[list[int]]) -> Route:
    return Route(torch.tensor(experts)[..., None], torch.tensor(kept).bool()[..., None], torch.tensor(order), NO_INDEX)


def tallied(*, counted: list[list[int]] | None = None, moe: Moe = MOE) -> BlockRouting:
    tally = BlockTally(num_experts=3, vocab_size=4)
    counted_GS = torch.ones(2, 5, dtype=torch.bool) if counted is None else torch.tensor(counted).bool()
    tally.add(route(EXPERTS, KEPT, ORDER), Sent(3, torch.tensor(PIECES), counted_GS))
    return tally.result(moe, ("image", "text"), padding_is_routed=True, name_of=lambda piece: f"piece {piece}")


def test_success_is_kept_by_requested() -> None:
    block = tallied()
    assert block.image is not None
    assert block.text is not None
    # The first image token of group 1 and the second text token of group 0 found no slot.
    assert (block.image.requested, block.image.kept, block.image.success_rate) == (6, 5, 5 / 6)
    assert (block.text.requested, block.text.kept, block.text.success_rate) == (4, 3, 3 / 4)
    # Without the padding, which was kept: 2 of 3.
    assert block.text.without_padding == success_of(3, 2)
    assert block.image.without_padding is None


def test_experts_are_counted_by_entropy_and_by_half_an_even_share() -> None:
    block = tallied()
    assert block.image is not None
    assert block.text is not None
    # Images ask experts 0 and 1 three times each; half of an even share is 6 / 3 / 2 = 1.
    assert block.image.effective_experts == pytest.approx(2.0)
    assert block.image.used_experts == 2
    # Texts ask expert 2 three times and expert 0 once: at least 4 / 3 / 2 each.
    assert block.text.effective_experts == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    assert block.text.used_experts == 2
    assert (block.image.soft_minimum, block.image.soft_minimum_trained) == (2.0, True)
    assert (block.text.soft_minimum, block.text.soft_minimum_trained) == (1.5, False)


def test_shares_are_of_processed_tokens() -> None:
    experts = tallied().experts
    # Processed: expert 0 two images and a text (the padding), expert 1 three images, expert 2 two texts.
    assert [(expert.image_tokens, expert.text_tokens) for expert in experts] == [(2, 1), (3, 0), (0, 2)]
    assert [expert.image_frac for expert in experts] == [2 / 3, 1.0, 0.0]
    assert [expert.of_images_frac for expert in experts] == [2 / 5, 3 / 5, 0.0]
    assert [expert.of_texts_frac for expert in experts] == [1 / 3, 0.0, 2 / 3]
    assert [expert.kind for expert in experts] == ["mixed", "image", "text"]


def test_ranks_are_places_in_the_order_of_service() -> None:
    block = tallied()
    assert block.image is not None
    assert block.text is not None
    assert block.image.ranks is not None
    assert block.text.ranks is not None
    # Group 0 serves text, image, text, image, image; of five tokens the n-th stands at (n + 1/2) / 5.
    # Images: 0.3, 0.7, 0.9 there and 0.1, 0.3, 0.5 in group 1; texts: 0.1, 0.5 and 0.7, 0.9.
    assert block.image.ranks.median == pytest.approx(0.4)
    assert block.text.ranks.median == pytest.approx(0.6)
    assert sum(block.image.ranks.histogram) == pytest.approx(1.0)


def test_a_histogram_has_even_bins() -> None:
    ranks = ranks_of(torch.tensor([0.01, 0.02, 0.52, 0.99]))
    assert ranks is not None
    assert len(ranks.histogram) == RANK_BINS == 20
    assert (ranks.histogram[0], ranks.histogram[10], ranks.histogram[19]) == (0.5, 0.25, 0.25)
    assert ranks_of(torch.empty(0)) is None


def test_pieces_have_counts_and_lift() -> None:
    experts = tallied().experts
    # Three text tokens were processed: piece 0 twice by expert 2, the padding once by expert 0.
    (of_two,) = experts[2].pieces
    assert (of_two.piece, of_two.count, of_two.of_piece_frac) == ("piece 0", 2, 1.0)
    # All of expert 2's text is piece 0, but 2 / 3 of the block's.
    assert of_two.lift == pytest.approx(1.5)
    (of_zero,) = experts[0].pieces
    assert (of_zero.piece, of_zero.count) == (PADDING, 1)
    assert of_zero.lift == pytest.approx(3.0)
    assert experts[1].pieces == ()


def test_masked_padding_is_not_counted_and_takes_no_place() -> None:
    block = tallied(counted=[[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    assert block.text is not None
    assert (block.text.requested, block.text.kept) == (2, 2)
    assert block.text.ranks is not None
    # Group 1: four tokens count, and its text token is the last of them: (3 + 1/2) / 4. Group 0: (0 + 1/2) / 4.
    assert block.text.ranks.median == pytest.approx((0.125 + 0.875) / 2)


def test_two_choices_of_a_token_are_two_requests() -> None:
    tally = BlockTally(num_experts=3, vocab_size=4)
    expert_GSK = torch.tensor([[[0, 1], [0, 2]]])
    kept_GSK = torch.tensor([[[True, False], [True, True]]])
    both = Route(expert_GSK, kept_GSK, torch.tensor([[1, 0]]), NO_INDEX)
    tally.add(both, Sent(1, torch.tensor([[3]]), torch.ones(1, 2, dtype=torch.bool)))
    block = tally.result(MOE, ("image", "text"), padding_is_routed=False, name_of=str)
    assert block.image is not None
    assert block.text is not None
    assert (block.image.requested, block.image.kept) == (2, 1)
    assert (block.text.requested, block.text.kept) == (2, 2)
    assert block.text.without_padding is None
    assert [expert.pieces[0].count for expert in block.experts if expert.pieces] == [1, 1]


def test_an_absent_modality_is_null_and_nothing_is_nan() -> None:
    tally = BlockTally(num_experts=3, vocab_size=0)
    tally.add(route([[0, 0, 1]], [[1, 1, 1]], [[0, 1, 2]]), Sent(3, None, torch.ones(1, 3, dtype=torch.bool)))
    block = tally.result(MOE, ("image",), padding_is_routed=True, name_of=str)
    assert block.text is None
    assert block.image is not None
    assert [expert.text_tokens for expert in block.experts] == [None] * 3
    assert [expert.image_frac for expert in block.experts] == [None] * 3
    assert [expert.of_images_frac for expert in block.experts] == [2 / 3, 1 / 3, 0.0]
    assert "NaN" not in block.model_dump_json()
    assert BlockRouting.model_validate_json(block.model_dump_json()) == block


def test_experts_by_gates_are_those_of_a_group_s_average_gate() -> None:
    tally = BlockTally(num_experts=3, vocab_size=4)
    sure = [[1.0, 0, 0], [0, 1.0, 0]]
    # Group 0: images go evenly to experts 0 and 1, 2 experts; group 1: to expert 0 alone, 1. The mean of ln 2 and 0.
    image_GSE = torch.tensor([sure, [sure[0], sure[0]]])
    text_GSE = torch.full((2, 1, 3), 1 / 3)
    counted = torch.ones(2, 3, dtype=torch.bool)
    tally.add_gates(torch.cat([image_GSE, text_GSE], dim=1), Sent(2, torch.zeros(2, 1), counted))
    block = tally.result(MOE, ("image", "text"), padding_is_routed=False, name_of=str)
    assert block.image is not None
    assert block.text is not None
    assert block.image.effective_experts_by_gates == pytest.approx(math.sqrt(2))
    assert block.text.effective_experts_by_gates == pytest.approx(3.0)
    assert block.image.success_rate is None


@pytest.mark.parametrize(("counts", "expected"), [([5, 5, 5, 0], 3.0), ([7, 0], 1.0), ([0, 0], None), ([], None)])
def test_effective_experts_are_as_many_as_share_evenly(counts: list[float], expected: float | None) -> None:
    assert effective_experts(counts) == (expected if expected is None else pytest.approx(expected))


def test_passes_add_up() -> None:
    tally, twice = (BlockTally(num_experts=3, vocab_size=4) for _ in range(2))
    sent = Sent(3, torch.tensor(PIECES), torch.ones(2, 5, dtype=torch.bool))
    for tensors in (tally, twice, twice):
        tensors.add(route(EXPERTS, KEPT, ORDER), sent)
    sums: list[Tensor] = [twice.requested_E2, twice.kept_E2, twice.pieces_EV, twice.words_2]
    for total, once in zip(sums, (tally.requested_E2, tally.kept_E2, tally.pieces_EV, tally.words_2), strict=True):
        assert torch.equal(total, 2 * once)
