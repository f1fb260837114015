"""b local pairs, B pairs of the global batch, P embedding width, C columns of the logits in memory at once."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def share(image_BP, text_BP, rows, scale, chunk=0):
    return contrastive_loss(
        image_BP[rows], text_BP[rows], image_BP, text_BP, first=rows.start, scale=scale, chunk=chunk
    )


@st.composite
def cases_of_chunks(draw):
    """(B, b, first, chunk): chunks that divide B, that do not, and that are larger than B."""
    batch = draw(st.integers(1, 12))
    local = draw(st.integers(1, batch))
    return batch, local, draw(st.integers(0, batch - local)), draw(st.integers(1, batch + 2))


def five_leaves(batch, local, *, seed, width=3, scale=20.0):
    """Local images and texts (b, P), global ones (B, P), and scale, float64: five tensors of their own."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(local, width), (local, width), (batch, width), (batch, width)]
    rows = [normalize(torch.randn(shape, dtype=torch.float64, generator=random)) for shape in shapes]
    return [leaf.requires_grad_() for leaf in (*rows, torch.tensor(scale, dtype=torch.float64))]


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("name", ["k1_g1", "dense"])
def test_the_loss_equals_the_golden_tower(name, chunk):
    golden = arrays("limoe_tiny_dense" if name == "dense" else "limoe_tiny_k1_g1")
    image_BP, text_BP, scale = (torch.tensor(golden[f"{name}/{key}"]) for key in ("zi", "zt", "scale"))
    found = share(image_BP, text_BP, slice(0, 6), scale, chunk)
    # float32 of numbers near 4: 5e-7 is one last bit.
    assert found.loss.item() == pytest.approx(golden[f"{name}/contrastive"].item(), abs=2e-6)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_two_pairs_by_hand(chunk):
    # Images e1, e2; texts e1, (e1 + e2) / sqrt 2; scale sqrt 2: logits [[1.414214, 1], [0, 1]].
    # Rows (image to text): log(1 + e^-0.414214) = 0.507335; log(1 + e^-1) = 0.313262.
    # Columns (text to image): log(1 + e^-1.414214) = 0.217622; log(1 + e^0) = 0.693147.
    # Sum 1.731366, divided by 2 * 2 pairs: 0.432842.
    image_BP = torch.eye(2, dtype=torch.float64)
    text_BP = torch.tensor([[1.0, 0.0], [math.sqrt(0.5), math.sqrt(0.5)]], dtype=torch.float64)
    found = share(image_BP, text_BP, slice(0, 2), torch.tensor(math.sqrt(2), dtype=torch.float64), chunk)
    assert found.loss.item() == pytest.approx(0.432842, abs=1e-6)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_correct_counts_the_pairs_that_find_each_other(chunk):
    # Image 0 finds text 0 (1 > 0.6), image 1 text 1 (0.8 > 0), image 2 = image 1 finds text 1 instead of text 2.
    # Text 0 finds image 0 (1 > 0), text 1 images 1 (0.8 > 0.6), text 2 finds image 0 instead of image 2 (-1).
    image_BP = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    text_BP = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    found = share(image_BP, text_BP, slice(0, 3), torch.tensor(10.0), chunk)
    assert found.correct.tolist() == [2.0, 2.0]
    assert not found.correct.requires_grad
    # The second and third pair alone, against the same columns: image 1, and text 1.
    assert share(image_BP, text_BP, slice(1, 3), torch.tensor(10.0), chunk).correct.tolist() == [1.0, 1.0]


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


@given(cases_of_chunks(), st.integers(0, 2**31))
def test_chunks_change_neither_value_nor_gradients_nor_counts(case, seed):
    batch, local, first, chunk = case
    leaves = five_leaves(batch, local, seed=seed)
    found, expected = (
        contrastive_loss(*leaves[:4], first=first, scale=leaves[4], chunk=columns) for columns in (chunk, 0)
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.0, atol=1e-12)
    assert torch.equal(found.correct, expected.correct)
    # 3: the gradient that arrives is not 1 when auxiliary losses or microbatches weigh it.
    ours, theirs = (torch.autograd.grad(3 * result.loss, leaves) for result in (found, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0.0, atol=1e-12)


@given(cases_of_chunks(), st.integers(0, 2**31))
def test_ties_go_to_the_first_column_in_chunks_too(case, seed):
    # Whole numbers: every product and sum is exact, and most rows have several largest logits.
    batch, local, first, chunk = case
    random = torch.Generator().manual_seed(seed)
    image_BP, text_BP = (torch.randint(-1, 2, (batch, 2), generator=random).double() for _ in range(2))
    rows, scale = slice(first, first + local), torch.tensor(2.0, dtype=torch.float64)
    found, expected = (share(image_BP, text_BP, rows, scale, columns) for columns in (chunk, 0))
    assert torch.equal(found.correct, expected.correct)


@pytest.mark.parametrize("chunk", [0, 1, 2, 3])
def test_of_equal_columns_only_the_first_is_found(chunk):
    # Four images and texts that are all the same: every row takes column 0, which is right for row 0 alone.
    same_BP = torch.ones(4, 1, dtype=torch.float64)
    scale = torch.tensor(7.0, dtype=torch.float64)
    assert share(same_BP, same_BP, slice(0, 4), scale, chunk).correct.tolist() == [1.0, 1.0]
    assert share(same_BP, same_BP, slice(1, 4), scale, chunk).correct.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_the_gradients_in_chunks_equal_finite_differences(chunk):
    leaves = five_leaves(5, 2, seed=3, scale=4.0)

    def loss(image_bP, text_bP, all_image_BP, all_text_BP, scale):
        return contrastive_loss(image_bP, text_bP, all_image_BP, all_text_BP, first=2, scale=scale, chunk=chunk).loss

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("chunk", [0, 7, 64, 300])
def test_float32_stays_accurate_at_a_scale_of_100(chunk):
    # Pairs that nearly agree, as late in training: logits of 100, a loss of a fraction of a nat.
    random = torch.Generator().manual_seed(0)
    image_BP, noise_BP = (normalize(torch.randn(200, 32, generator=random)) for _ in range(2))
    text_BP = normalize(image_BP + 1.3 * noise_BP)
    found, expected = [], []
    for dtype, columns, into in ((torch.float32, chunk, found), (torch.float64, 0, expected)):
        leaves = [leaf.to(dtype).requires_grad_() for leaf in (image_BP, text_BP, torch.tensor(100.0))]
        result = share(leaves[0], leaves[1], slice(40, 190), leaves[2], columns)
        into.extend([result.loss, *torch.autograd.grad(result.loss, leaves)])
    for ours, exact in zip(found, expected, strict=True):
        # Half the last bit of a logit near 100 is 2^-18 = 3.8e-6, and no more than that may be lost after it.
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 2**-18


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_small_loss_keeps_its_digits_beside_large_logits(chunk):
    # e1 and (0.93, sqrt(1 - 0.93^2)), images and texts alike, scale 100: logits [[100, 93], [93, 100]].
    # Each of the four terms, and so the loss, is log(1 + e^-7) = 9.114665e-4; 1 + e^-7 in float32 is known to 6e-8,
    # which is 7e-5 of it. 100 + 9.1e-4 - 100 would only be known to 4e-6, which is 4e-3 of it.
    rows_BP = torch.tensor([[1.0, 0.0], [0.93, math.sqrt(1 - 0.93**2)]])
    found = share(rows_BP, rows_BP, slice(0, 2), torch.tensor(100.0), chunk)
    assert found.loss.item() == pytest.approx(9.114665e-4, rel=2e-4)


class LiveElements(TorchDispatchMode):
    """The largest tensor that was made, and the most elements that were alive at once, of 8 bytes each."""

    def __init__(self):
        super().__init__()
        self.largest = self.most = 0
        self._alive = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._alive = [tensor for tensor in (*self._alive, *made) if tensor() is not None]
        storages = [tensor().untyped_storage() for tensor in self._alive]
        sizes = {storage.data_ptr(): storage.nbytes() // 8 for storage in storages}
        self.largest = max(self.largest, *sizes.values())
        self.most = max(self.most, sum(sizes.values()))
        return out


def live_elements(chunk):
    """Of the loss and its backward for b=50 rows, B=400 columns, P=2, in elements of 8 bytes."""
    leaves = five_leaves(400, 50, seed=0, width=2)
    with LiveElements() as live:
        contrastive_loss(*leaves[:4], first=100, scale=leaves[4], chunk=chunk).loss.backward()
    return live


def test_chunks_hold_a_few_small_matrices_and_never_the_whole():
    # One (b, chunk) matrix has 50 * 20 = 1,000 elements, and three are room enough beside the gradients of the four
    # embeddings, 2 * (400 + 50) * 2. All columns at once are 20,000 elements, in several matrices.
    live, whole = live_elements(20), live_elements(0)
    assert live.largest == 50 * 20
    assert live.most <= 3 * 50 * 20 + 2 * (400 + 50) * 2
    assert whole.largest == 50 * 400
    assert whole.most > 3 * 50 * 400


def test_chunks_keep_only_embeddings_and_two_numbers_a_row_for_the_backward():
    leaves, saved = five_leaves(400, 50, seed=0, width=2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept.numel()) or kept, lambda kept: kept):
        contrastive_loss(*leaves[:4], first=100, scale=leaves[4], chunk=20)
    assert sorted(numel for numel in saved if numel > 1) == [50] * 4 + [100, 100, 800, 800]


def test_a_nan_in_one_column_reaches_the_loss_from_every_chunk():
    image_BP, text_BP = embeddings(6)
    for column in range(6):
        spoiled_BP = text_BP.detach().clone()
        spoiled_BP[column, 0] = math.nan
        found = contrastive_loss(
            image_BP[:2], text_BP[:2], image_BP, spoiled_BP, first=0, scale=torch.tensor(5.0).double(), chunk=2
        )
        assert found.loss.isnan()


def test_a_second_derivative_of_chunks_is_refused():
    leaves = five_leaves(4, 2, seed=0)
    loss = contrastive_loss(*leaves[:4], first=0, scale=leaves[4], chunk=2).loss
    (first_order,) = torch.autograd.grad(loss.square(), leaves[4], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first_order.backward()


def test_a_negative_chunk_is_refused():
    image_BP, text_BP = embeddings(4)
    with pytest.raises(ValueError, match=r"chunk=-1 must be a number of columns, or 0"):
        share(image_BP, text_BP, slice(0, 2), torch.tensor(1.0), -1)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize(("first", "text"), [(-1, "-1 to 1"), (3, "3 to 5")])
def test_local_rows_outside_the_global_batch_are_refused(first, text, chunk):
    image_BP, text_BP = embeddings(4)
    with pytest.raises(ValueError, match=rf"local rows {text} lie outside the global batch of 4"):
        contrastive_loss(
            image_BP[:2], text_BP[:2], image_BP, text_BP, first=first, scale=torch.tensor(1.0), chunk=chunk
        )


def test_normalize_divides_by_the_length():
    # Length 5, as big_vision plus 1e-8; a row of zeros stays zero and has a finite gradient.
    rows_bP = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    unit_bP = normalize(rows_bP)
    torch.testing.assert_close(
        unit_bP, torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64), rtol=0.0, atol=5e-9
    )
    unit_bP.sum().backward()
    assert rows_bP.grad.isfinite().all()
