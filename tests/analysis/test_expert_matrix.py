from __future__ import annotations

import pytest

from limoe_dist.analysis.expert_matrix import expert_matrix
from tests.analysis.lines import metrics_line


def test_the_shares_equal_a_case_worked_by_hand() -> None:
    # kept: [30, 10], [60, 0], [0, 9], [0, 0]; 90 image tokens, 19 text tokens, an even part is 109 / 4 = 27.25.
    blocks = expert_matrix(metrics_line(1))
    assert [block.block for block in blocks] == [1, 3]
    experts = blocks[0].experts
    assert [expert.tokens for expert in experts] == [40, 60, 9, 0]
    assert [expert.image_frac for expert in experts] == [30 / 40, 1.0, 0.0, None]
    assert [expert.text_frac for expert in experts] == [10 / 40, 0.0, 1.0, None]
    assert [expert.of_images_frac for expert in experts] == [30 / 90, 60 / 90, 0.0, 0.0]
    assert [expert.of_texts_frac for expert in experts] == [10 / 19, 0.0, 9 / 19, 0.0]
    assert [expert.kind for expert in experts] == ["mixed", "image", "text", "idle"]
    assert [blocks[0].count(kind) for kind in ("image", "text", "mixed", "idle")] == [1, 1, 1, 1]


def test_an_expert_is_of_a_modality_from_90_percent_and_idle_up_to_5_percent_of_an_even_part() -> None:
    # 400 tokens over 4 experts: an even part is 100, 5 % of it 5.
    line = metrics_line(1, blocks=(1,))
    line["blocks"]["1"]["kept"] = [[90, 10], [89, 11], [5, 0], [6, 189]]
    assert [expert.kind for expert in expert_matrix(line)[0].experts] == ["image", "mixed", "idle", "text"]
    line["blocks"]["1"]["kept"] = [[10, 90], [11, 89], [0, 5], [189, 6]]
    assert [expert.kind for expert in expert_matrix(line)[0].experts] == ["text", "mixed", "idle", "image"]


def test_a_block_without_tokens_divides_nothing_by_zero() -> None:
    line = metrics_line(1, blocks=(1,))
    line["blocks"]["1"]["kept"] = [[0, 0], [0, 0]]
    (block,) = expert_matrix(line)
    assert [expert.kind for expert in block.experts] == ["idle", "idle"]
    assert (block.most_of_images_frac, block.most_of_texts_frac) == (1.0, 1.0)


def test_blocks_come_in_the_order_of_their_numbers() -> None:
    assert [block.block for block in expert_matrix(metrics_line(1, blocks=(11, 3, 7)))] == [3, 7, 11]


@pytest.mark.parametrize("kept", [None, "text", [1, 2], [[1, 2, 3]], [[1, "2"]], [[-1, 2]], [[float("nan"), 1]], []])
def test_what_is_not_tokens_by_expert_is_left_out(kept: object) -> None:
    line = metrics_line(1, blocks=(1,))
    line["blocks"]["1"]["kept"] = kept
    assert expert_matrix(line) == ()
    assert expert_matrix({"blocks": [1]}) == ()
