"""b local pairs, B pairs of the global batch, P embedding width."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limoe_dist.equations.contrastive import contrastive_loss, normalize
from tests.golden.load import arrays


def embeddings(pairs, *, seed=0, width=3):
    """Images and texts (B, P), float64, of length 1, as leaves."""
    random = torch.Generator().manual_seed(seed)
    return tuple(
        normalize(torch.randn(pairs, width, dtype=torch.float64, generator=random)).requires_grad_() for _ in range(2)
    )


def one_matrix(image_BP, text_BP, scale):
    """Equation 1 as it is printed: mean over pairs and both directions of -log softmax at the diagonal."""
    logits_BB = scale * image_BP @ text_BP.T
    return -(logits_BB.log_softmax(1).diagonal() + logits_BB.log_softmax(0).diagonal()).mean() / 2


def share(image_BP, text_BP, rows, scale):
    return contrastive_loss(image_BP[rows], text_BP[rows], image_BP, text_BP, first=rows.start, scale=scale)


@pytest.mark.parametrize("name", ["k1_g1", "dense"])
def test_the_loss_equals_the_golden_tower(name):
    golden = arrays("limoe_tiny_dense" if name == "dense" else "limoe_tiny_k1_g1")
    image_BP, text_BP, scale = (torch.tensor(golden[f"{name}/{key}"]) for key in ("zi", "zt", "scale"))
    found = share(image_BP, text_BP, slice(0, 6), scale)
    # float32 of numbers near 4: 5e-7 is one last bit.
    assert found.loss.item() == pytest.approx(golden[f"{name}/contrastive"].item(), abs=2e-6)


def test_two_pairs_by_hand():
    # Images e1, e2; texts e1, (e1 + e2) / sqrt 2; scale sqrt 2: logits [[1.414214, 1], [0, 1]].
    # Rows (image to text): log(1 + e^-0.414214) = 0.507335; log(1 + e^-1) = 0.313262.
    # Columns (text to image): log(1 + e^-1.414214) = 0.217622; log(1 + e^0) = 0.693147.
    # Sum 1.731366, divided by 2 * 2 pairs: 0.432842.
    image_BP = torch.eye(2, dtype=torch.float64)
    text_BP = torch.tensor([[1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)]], dtype=torch.float64)
    found = share(image_BP, text_BP, slice(0, 2), torch.tensor(math.sqrt(2), dtype=torch.float64))
    assert found.loss.item() == pytest.approx(0.432842, abs=1e-6)


def test_correct_counts_the_pairs_that_find_each_other():
    # Image 0 finds text 0 (1 > 0.6), image 1 text 1 (0.8 > 0), image 2 = image 1 finds text 1 instead of text 2.
    # Text 0 finds image 0 (1 > 0), text 1 images 1 (0.8 > 0.6), text 2 finds image 0 instead of image 2 (-1).
    image_BP = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    text_BP = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    found = share(image_BP, text_BP, slice(0, 3), torch.tensor(10.0))
    assert found.correct.tolist() == [2.0, 2.0]
    # The second and third pair alone, against the same columns: image 1, and text 1.
    assert share(image_BP, text_BP, slice(1, 3), torch.tensor(10.0)).correct.tolist() == [1.0, 1.0]


def test_equal_embeddings_cost_the_logarithm_of_the_batch():
    same_BP = torch.ones(5, 1, dtype=torch.float64)
    found = share(same_BP, same_BP, slice(0, 5), torch.tensor(7.0, dtype=torch.float64))
    assert found.loss.item() == pytest.approx(math.log(5), rel=1e-14)


@given(st.integers(1, 7), st.integers(0, 2**31))
def test_value_and_gradients_equal_one_matrix_and_autograd(pairs, seed):
    image_BP, text_BP = embeddings(pairs, seed=seed)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    leaves = (image_BP, text_BP, scale)
    found, expected = share(image_BP, text_BP, slice(0, pairs), scale).loss, one_matrix(image_BP, text_BP, scale)
    # float64, a handful of terms of size 10.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-13)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-13)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 2**31))
def test_the_shares_of_the_ranks_add_up_to_the_whole(sizes, seed):
    pairs = sum(sizes)
    image_BP, text_BP = embeddings(pairs, seed=seed)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    shares = [share(image_BP, text_BP, slice(end - size, end), scale) for size, end in zip(sizes, ends, strict=True)]
    whole = share(image_BP, text_BP, slice(0, pairs), scale)
    total = sum(part.loss for part in shares)
    torch.testing.assert_close(total, whole.loss, rtol=0.0, atol=1e-13)
    assert torch.equal(sum(part.correct for part in shares), whole.correct)
    leaves = (image_BP, text_BP, scale)
    for ours, theirs in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(whole.loss, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize(("first", "text"), [(-1, "-1 to 1"), (3, "3 to 5")])
def test_local_rows_outside_the_global_batch_are_refused(first, text):
    image_BP, text_BP = embeddings(4)
    with pytest.raises(ValueError, match=rf"local rows {text} lie outside the global batch of 4"):
        contrastive_loss(image_BP[:2], text_BP[:2], image_BP, text_BP, first=first, scale=torch.tensor(1.0))


def test_normalize_divides_by_the_length():
    # Length 5, as big_vision plus 1e-8; a row of zeros stays zero and has a finite gradient.
    rows_bP = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    unit_bP = normalize(rows_bP)
    torch.testing.assert_close(
        unit_bP, torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64), rtol=0.0, atol=5e-9
    )
    unit_bP.sum().backward()
    assert rows_bP.grad.isfinite().all()
