"""Embeds a whole manifest, or a list of texts, on all ranks; every rank gets all of it.

Every rank makes as many forward passes of the same size as every other: the experts' all-to-all waits for all ranks.
With moe.eval_capacity=full nothing is dropped, so that an embedding depends on its own picture or text only.

Shapes: R rows of a manifest, X texts, n rows of this rank, b rows of a forward pass, P embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.evaluation import evaluation_batches, num_evaluation_batches
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.eval.rows import Holdings, check_pictures, holdings
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


class Embedder:
    """What one model makes of one manifest, each thing computed once however many tasks ask: the pictures, and lists
    of texts. Its methods are collectives over all ranks where they compute.
    """

    def __init__(
        self,
        model: Limoe,
        run: Run,
        shards: ShardSet,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh,
        device: torch.device,
        progress: Progress = silent,
    ) -> None:
        self.model, self.run, self.shards, self.tokenizer = model, run, shards, tokenizer
        self.mesh, self.device, self.progress = mesh, device, progress
        self._texts: dict[tuple[str, ...], Tensor] = {}

    @cached_property
    def rows(self) -> Holdings:
        return holdings(self.shards)

    @cached_property
    def pictures(self) -> PictureEmbeddings:
        """As `embed_pictures`. Raises UserError where no row holds a picture."""
        check_pictures(self.rows.pictured, place=self.rows.place)
        return embed_pictures(
            self.model, self.run, self.shards, mesh=self.mesh, device=self.device, progress=self.progress
        )

    def undecodable(self) -> int:
        """Rows that hold a picture that cannot be decoded."""
        return int((~self.pictures.good_R).sum()) - self.rows.pictureless

    def texts(self, texts: Sequence[str]) -> Tensor:
        """As `embed_texts`; the same list is embedded once."""
        wanted = tuple(texts)
        if wanted not in self._texts:
            self._texts[wanted] = embed_texts(
                self.model,
                self.run,
                self.tokenizer,
                wanted,
                mesh=self.mesh,
                device=self.device,
                progress=self.progress,
            )
        return self._texts[wanted]


def embed_pictures(
    model: Limoe, run: Run, shards: ShardSet, *, mesh: Mesh, device: torch.device, progress: Progress = silent
) -> PictureEmbeddings:
    """The embedding of every picture of the manifest, the same on every rank. A collective over all ranks.

    Raises UserError where no picture can be used, or an embedding is not finite.
    """
    image_RP, good_R = _of_pictures(
        "embeddings", model, run, shards, None, mesh=mesh, device=device, what="pictures", progress=progress
    )
    return PictureEmbeddings(image_RP=image_RP, good_R=good_R)


@dataclass(frozen=True)
class PictureFeatures:
    feature_RD: Tensor
    """(R, D) float32: the mean over a picture's tokens, before the projection; zeros where the row is bad."""
    good_R: Tensor
    """(R,) bool"""


def picture_features(
    model: Limoe,
    run: Run,
    shards: ShardSet,
    numbers: Sequence[int] | None = None,
    *,
    mesh: Mesh,
    device: torch.device,
    what: str = "pictures",
    progress: Progress = silent,
) -> PictureFeatures:
    """What the last block makes of the R pictures `numbers` (None: all), on every rank. A collective over all ranks.

    Raises UserError as `embed_pictures` does. what: their name where progress is shown.
    """
    feature_RD, good_R = _of_pictures(
        "features", model, run, shards, numbers, mesh=mesh, device=device, what=what, progress=progress
    )
    return PictureFeatures(feature_RD=feature_RD.float(), good_R=good_R)


@torch.no_grad()
def _of_pictures(
    wanted: Literal["embeddings", "features"],
    model: Limoe,
    run: Run,
    shards: ShardSet,
    numbers: Sequence[int] | None,
    *,
    mesh: Mesh,
    device: torch.device,
    what: str,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    count = len(shards) if numbers is None else len(numbers)
    size = pass_size(run, count, world=mesh.world.size)
    total = num_evaluation_batches(count, batch_pairs=size, world=mesh.world.size)
    dtype = next(model.parameters()).dtype
    places, real, found = [], [], []
    batches = evaluation_batches(
        run, shards, None, batch_pairs=size, rank=mesh.rank, world=mesh.world.size, device=device, numbers=numbers
    )
    for done, batch in enumerate(batches, start=1):
        with autocast(run, device):
            out = model(batch.images.to(dtype), None)
        x_bX = out.image_BP if wanted == "embeddings" else out.image_BD
        assert x_bX is not None
        found.append(x_bX)
        places.append(torch.from_numpy(batch.places).to(device))
        real.append(batch.real)
        progress(what, done, total)
    x_RX, good_R = _in_order(torch.cat(found), torch.cat(places), torch.cat(real), count, mesh)
    if not good_R.any():
        raise UserError(f"{shards.path}: none of its {count} pictures can be decoded: pack again", told_by=0)
    _check_finite(x_RX, f"the pictures of {shards.path}")
    return x_RX, good_R


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
