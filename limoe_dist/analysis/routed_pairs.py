"""Sends rows of shards through a model in routing groups, as in training, and tallies what every router does.

Shapes: B pairs of a pass, G routing groups, S tokens of a group, N text tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limoe_dist.analysis.patches import Looked, pixels
from limoe_dist.analysis.routing import MODALITIES, BlockTally, Sent
from limoe_dist.analysis.routing_record import Modality
from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import Row, ShardSet
from limoe_dist.data.augment import identity_params
from limoe_dist.data.dali import Decoder
from limoe_dist.data.header import picture_refusal
from limoe_dist.data.pictures import PictureReader
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.model.moe_layer import MoeLayer, Route, RoutingMode
from limoe_dist.model.tower import Limoe, autocast

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""

MOST_LOOKED = 48
"""Pictures from which patches are drawn."""


@dataclass
class Routed:
    """What came of it."""

    modalities: tuple[Modality, ...]
    vocab_size: int
    """Pieces of the vocabulary; 0 where texts are absent."""
    tallies: dict[int, BlockTally]
    rows: int = 0
    bad_rows: int = 0
    left_over_rows: int = 0
    groups: int = 0
    group_pairs: int = 0
    group_tokens: int = 0
    looked: list[Looked] = field(default_factory=list)


def as_in_training(run: Run, *, capacity_factor: float = 0.0) -> Run:
    """The run with limited slots in evaluation. capacity_factor: 0 for that of training."""
    moe = run.moe.model_copy(update={"eval_capacity": "paper", "eval_capacity_factor": capacity_factor})
    return run.model_copy(update={"moe": moe})


def drawn_rows(total: int, wanted: int) -> list[int]:
    """`wanted` of the rows, all where it is 0, in a random order that is always the same.

    Rows of one concept often lie together in a shard; in training they never meet in a group as often as that.
    """
    order = np.random.default_rng(0).permutation(total)
    return [int(row) for row in (order[:wanted] if wanted else order)]


def modalities_of(shards: ShardSet, rows: Sequence[int]) -> tuple[Modality, ...]:
    """What these rows have: a modality is absent where no row has it. Raises UserError where there is none at all."""
    pictures = texts = False
    for number in rows:
        row = shards.row(number)
        pictures, texts = pictures or len(row.image) > 0, texts or bool(row.captions)
        if pictures and texts:
            return MODALITIES
    if not (pictures or texts):
        raise UserError(f"{shards.path}: its rows have neither pictures nor captions: pack again")
    return ("image",) if pictures else ("text",)


@torch.no_grad()
def route_rows(
    model: Limoe,
    run: Run,
    shards: ShardSet,
    tokenizer: Tokenizer | None,
    rows: Sequence[int],
    *,
    modalities: tuple[Modality, ...],
    device: torch.device,
    progress: Progress = lambda what, done, total: None,
) -> Routed:
    """run: that of the model, with moe.eval_capacity=paper. tokenizer: None where texts are absent.

    Rows that do not fill a routing group at the end are left over; where there is no whole group, all good rows make
    one smaller group. Raises UserError where no row can be used.
    """
    vocab_size = tokenizer.vocab_size if tokenizer else 0
    tallies = {block: BlockTally(num_experts=run.moe.num_experts, vocab_size=vocab_size) for block in run.moe.blocks}
    found = Routed(modalities, vocab_size, tallies)
    pairs = run.moe.group_pairs
    at_once = max(1, run.eval.batch_pairs // pairs) * pairs
    waiting: list[_Good] = []
    done = 0
    for part in _good_rows(run, shards, rows, modalities, at_once, device):
        done += part.read
        found.bad_rows += part.read - len(part.good)
        waiting += part.good
        while len(waiting) >= at_once:
            _route(model, run, waiting[:at_once], tokenizer, found, device)
            del waiting[:at_once]
        progress("rows routed", done, len(rows))
    whole = len(waiting) // pairs * pairs
    if not found.groups and not whole:
        whole = len(waiting)
    if whole:
        _route(model, run, waiting[:whole], tokenizer, found, device)
    found.left_over_rows = len(waiting) - whole
    if not found.rows:
        raise UserError(
            f"{shards.path}: none of the {len(rows)} rows can be used: all lack "
            f"{' or '.join('a picture that can be decoded' if m == 'image' else 'a caption' for m in modalities)}"
        )
    return found


@dataclass(frozen=True)
class _Good:
    row: Row
    picture: Tensor | None
    """(3, size, size)"""


@dataclass(frozen=True)
class _Part:
    good: list[_Good]
    read: int


def _good_rows(
    run: Run, shards: ShardSet, rows: Sequence[int], modalities: Sequence[Modality], size: int, device: torch.device
) -> Iterator[_Part]:
    """The rows that have what is wanted, `size` of them read at a time; pictures un-augmented."""
    reader = None
    if "image" in modalities:
        decoder = Decoder(run.image, mode="evaluation", batch_size=size, threads=run.data.threads, device=device)
        reader = PictureReader(decoder, picture_refusal)
    for first in range(0, len(rows), size):
        read = [shards.row(number) for number in rows[first : first + size]]
        pictures = reader.read(read, identity_params(len(read))) if reader else None
        good = []
        for i, row in enumerate(read):
            if "text" in modalities and not row.captions:
                continue
            if pictures is None:
                good.append(_Good(row, None))
            elif pictures.reasons[i] is None:
                good.append(_Good(row, pictures.images[i]))
        yield _Part(good, len(read))


def _route(
    model: Limoe, run: Run, good: Sequence[_Good], tokenizer: Tokenizer | None, found: Routed, device: torch.device
) -> None:
    """One forward pass: whole routing groups, or one smaller one."""
    groups = max(1, len(good) // run.moe.group_pairs)
    images, tokens, valid = _inputs(good, tokenizer, found.modalities, device)
    routes: dict[int, Route] = {}
    mode = RoutingMode(training=False, seed=run.train.seed, first_group=found.groups)
    weights = next(model.parameters()).dtype
    sent = _sent(run, found, len(good), groups, tokens, valid)
    with _watched_gates(model, found, sent), autocast(run, device):
        model(None if images is None else images.to(weights), tokens, valid, mode=mode, routes=routes)
    for block, route in routes.items():
        found.tallies[block].add(route, sent)
    if images is not None and (room := MOST_LOOKED - len(found.looked)) > 0:
        found.looked += _looked(run, good[:room], images, routes, sent)
    found.rows += len(good)
    found.groups += groups
    found.group_pairs = len(good) // groups
    found.group_tokens = sent.counted_GS.shape[1]


@contextmanager
def _watched_gates(model: Limoe, found: Routed, sent: Sent) -> Iterator[None]:
    """While it lasts, the tallies see every router's gates: a route alone does not hold them."""

    def watch(layer: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, MoeLayer)
        x_TD, layout, mode, _ = given
        found.tallies[layer.index].add_gates(layer.logits(x_TD, layout, mode)[0].softmax(-1), sent)

    hooks = [layer.register_forward_pre_hook(watch) for layer in model.modules() if isinstance(layer, MoeLayer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _inputs(
    good: Sequence[_Good], tokenizer: Tokenizer | None, modalities: Sequence[Modality], device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(B, 3, size, size), (B, length) int64 and (B, length) bool, on the device."""
    images = tokens = valid = None
    if "image" in modalities:
        images = torch.stack([each.picture for each in good if each.picture is not None]).to(device)
    if tokenizer is not None and "text" in modalities:
        encoded = tokenizer([each.row.captions[0] for each in good])
        tokens, valid = (torch.from_numpy(x).to(device) for x in (encoded.tokens, encoded.valid))
    return images, tokens, valid


def _sent(run: Run, found: Routed, pairs: int, groups: int, tokens: Tensor | None, valid: Tensor | None) -> Sent:
    image_tokens = run.image_tokens * pairs // groups if "image" in found.modalities else 0
    counted = [torch.ones(groups, image_tokens, dtype=torch.bool)]
    piece_GN = None
    if tokens is not None and valid is not None:
        piece_GN = tokens.masked_fill(~valid, found.vocab_size).view(groups, -1).cpu()
        masked = run.text.pad == "masked"
        counted.append(valid.view(groups, -1).cpu() if masked else torch.ones_like(piece_GN, dtype=torch.bool))
    return Sent(image_tokens=image_tokens, piece_GN=piece_GN, counted_GS=torch.cat(counted, dim=1))


def _looked(run: Run, good: Sequence[_Good], images: Tensor, routes: dict[int, Route], sent: Sent) -> list[Looked]:
    """The pictures with the first choice of each patch."""
    drawn = pixels(images[: len(good)], run.image)
    experts: dict[int, Tensor] = {}
    for block, route in routes.items():
        first = route.expert_GSK[:, : sent.image_tokens, 0].masked_fill(~route.kept_GSK[:, : sent.image_tokens, 0], -1)
        experts[block] = first.reshape(-1, run.image_tokens).cpu()
    return [
        Looked(
            row=each.row.number,
            key=each.row.key,
            caption=each.row.captions[0] if each.row.captions else "",
            pixels=drawn[i],
            experts={block: of_pictures[i].numpy() for block, of_pictures in experts.items()},
        )
        for i, each in enumerate(good)
    ]
