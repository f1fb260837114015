"""Embeds a whole manifest, or a list of texts, on all ranks; every rank gets all of it.

Every rank makes as many forward passes of the same size as every other: the experts' all-to-all waits for all ranks.
With moe.eval_capacity=full nothing is dropped, so that an embedding depends on its own picture or text only.

Shapes: R rows of a manifest, X texts, n rows of this rank, b rows of a forward pass, P embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import evaluation_batches, num_evaluation_batches
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.model.tower import Limoe, autocast
from limoe_dist.parallel.collectives import all_gather_rows
from limoe_dist.parallel.mesh import Mesh

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many batches are done, and of how many."""


def silent(what: str, done: int, total: int) -> None:
    """The Progress that shows nothing."""


@dataclass(frozen=True)
class PictureEmbeddings:
    image_RP: Tensor
    """(R, P) at least float32, rows of length 1; zeros where the row is bad."""
    good_R: Tensor
    """(R,) bool: False for a row whose picture cannot be used."""


@torch.no_grad()
def embed_pictures(
    model: Limoe, run: Run, shards: ShardSet, *, mesh: Mesh, device: torch.device, progress: Progress = silent
) -> PictureEmbeddings:
    """The embedding of every picture of the manifest, the same on every rank. A collective over all ranks.

    Raises UserError where no picture can be used, or an embedding is not finite.
    """
    size = pass_size(run, len(shards), world=mesh.world.size)
    total = num_evaluation_batches(len(shards), batch_pairs=size, world=mesh.world.size)
    dtype = next(model.parameters()).dtype
    rows, real, embedded = [], [], []
    batches = evaluation_batches(
        run, shards, None, batch_pairs=size, rank=mesh.rank, world=mesh.world.size, device=device
    )
    for done, batch in enumerate(batches, start=1):
        with autocast(run, device):
            image_bP = model(batch.images.to(dtype), None).image_BP
        assert image_bP is not None
        embedded.append(image_bP)
        rows.append(torch.from_numpy(batch.rows).to(device))
        real.append(batch.real)
        progress("pictures", done, total)
    image_RP, good_R = _in_order(torch.cat(embedded), torch.cat(rows), torch.cat(real), len(shards), mesh)
    if not good_R.any():
        raise UserError(f"{shards.path}: none of its {len(shards)} pictures can be decoded: pack again", told_by=0)
    _check_finite(image_RP, f"the pictures of {shards.path}")
    return PictureEmbeddings(image_RP=image_RP, good_R=good_R)


@torch.no_grad()
def embed_texts(
    model: Limoe,
    run: Run,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    mesh: Mesh,
    device: torch.device,
    progress: Progress = silent,
) -> Tensor:
    """(X, P) at least float32, rows of length 1: the embedding of every text, the same on every rank. A collective.

    Texts with the same tokens are embedded once: their rows are equal to the last bit, so that ties stay ties.
    Raises UserError where an embedding is not finite.
    """
    encoded = tokenizer(texts)
    _, first, of_text = np.unique(
        np.concatenate([encoded.tokens, encoded.valid], axis=1), axis=0, return_index=True, return_inverse=True
    )
    size = pass_size(run, len(first), world=mesh.world.size)
    embedded, numbers = [], []
    starts = range(mesh.rank * size, _rounded_up(len(first), mesh.world.size * size), mesh.world.size * size)
    for done, start in enumerate(starts, start=1):
        number = torch.arange(start, start + size, device=device)
        # The last passes are filled up with text 0, which is not counted again.
        chosen = first[np.where(number.cpu().numpy() < len(first), number.cpu().numpy(), 0)]
        tokens, valid = (torch.from_numpy(x[chosen]).to(device) for x in (encoded.tokens, encoded.valid))
        with autocast(run, device):
            text_bP = model(None, tokens, valid).text_BP
        assert text_bP is not None
        embedded.append(text_bP)
        numbers.append(number)
        progress("texts", done, len(starts))
    number_n = torch.cat(numbers)
    real_n = number_n < len(first)
    text_XP, _ = _in_order(torch.cat(embedded), number_n.where(real_n, 0), real_n, len(first), mesh)
    _check_finite(text_XP, "the texts")
    return text_XP[torch.from_numpy(of_text.reshape(-1)).to(device)]


def pass_size(run: Run, count: int, *, world: int) -> int:
    """Rows b of each forward pass: eval.batch_pairs, less where all ranks together have fewer."""
    return min(run.eval.batch_pairs, -(-count // world))


def _in_order(x_nP: Tensor, number_n: Tensor, real_n: Tensor, total: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """All ranks' rows, each at its number: (total, P), and (total,) bool, False for a number that no rank had."""
    # Not every backend gathers bool.
    real = all_gather_rows(real_n.to(torch.uint8), mesh.world).bool()
    number = all_gather_rows(number_n, mesh.world)[real]
    times = torch.bincount(number, minlength=total)
    assert int(times.max()) <= 1, "a row was embedded twice"
    table = x_nP.new_zeros(total, x_nP.shape[1])
    table[number] = all_gather_rows(x_nP, mesh.world)[real]
    return table, times.bool()


def _check_finite(x_XP: Tensor, what: str) -> None:
    bad = int((~x_XP.isfinite()).any(1).sum())
    if bad:
        raise UserError(
            f"{bad} of the {len(x_XP)} embeddings of {what} are not finite: the weights have diverged; "
            "take an earlier checkpoint, and train with a smaller optim.lr",
            told_by=0,
        )


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
