"""Counts what a router did with the tokens of some routing groups: one tally for each MoE block.

Shapes: G routing groups, S tokens of a group (image tokens first), N text tokens of a group, K choices, E experts,
V pieces of the vocabulary and, as the last one, padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limoe_dist.analysis.expert_matrix import experts_of
from limoe_dist.analysis.routing_record import (
    RANK_BINS,
    BlockRouting,
    ExpertRouting,
    Modality,
    ModalityRouting,
    PieceCount,
    Ranks,
    Success,
)
from limoe_dist.config.schema import Moe
from limoe_dist.equations.aux_losses import mean_gates
from limoe_dist.model.moe_layer import Route

MODALITIES: tuple[Modality, Modality] = ("image", "text")
MOST_PIECES = 12
"""Of an expert, in the file."""
PADDING = "<padding>"


@dataclass(frozen=True)
class Sent:
    """What one forward pass gave to the router, in the order of its groups."""

    image_tokens: int
    """Of a group; the first so many of its S."""
    piece_GN: Tensor | None
    """(G, N) int64: the piece of each text token, V where it is padding; None without texts."""
    counted_GS: Tensor
    """(G, S) bool: False at masked padding, which is not routed."""


class BlockTally:
    """Sums over passes of one MoE block. Everything is an exact count, but for the ranks, which are kept one by one."""

    def __init__(self, *, num_experts: int, vocab_size: int) -> None:
        self.num_experts, self.vocab_size = num_experts, vocab_size
        self.requested_E2 = torch.zeros(num_experts, 2, dtype=torch.int64)
        self.kept_E2 = torch.zeros(num_experts, 2, dtype=torch.int64)
        self.pieces_EV = torch.zeros(num_experts, vocab_size + 1, dtype=torch.int64)
        self.words_2 = torch.zeros(2, dtype=torch.int64)
        """Requests of text tokens other than padding, and those of them that were kept."""
        self.ranks: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.gate_entropies: tuple[list[Tensor], list[Tensor]] = ([], [])
        """(G,) for each pass, by modality: of the average gate of a group."""

    def add(self, route: Route, sent: Sent) -> None:
        expert_GSK, kept_GSK, order_GS = route.expert_GSK.cpu(), route.kept_GSK.cpu(), route.order_GS.cpu()
        counted_GS = sent.counted_GS.cpu()
        _, tokens, choices = expert_GSK.shape
        text_S = torch.arange(tokens) >= sent.image_tokens
        asked_GSK = counted_GS[..., None].expand_as(kept_GSK)
        kept_GSK = kept_GSK & asked_GSK
        cell_GSK = expert_GSK * 2 + text_S.long()[:, None]
        for total_E2, counts_GSK in ((self.requested_E2, asked_GSK), (self.kept_E2, kept_GSK)):
            total_E2 += torch.bincount(cell_GSK[counts_GSK], minlength=2 * self.num_experts).view(-1, 2)
        self._add_ranks(order_GS, counted_GS, text_S)
        if sent.piece_GN is not None:
            piece_GNK = sent.piece_GN.cpu()[..., None].expand(-1, -1, choices)
            expert_GNK, kept_GNK = expert_GSK[:, text_S], kept_GSK[:, text_S]
            cell = (expert_GNK * (self.vocab_size + 1) + piece_GNK)[kept_GNK]
            self.pieces_EV += torch.bincount(cell, minlength=self.pieces_EV.numel()).view_as(self.pieces_EV)
            word_GNK = (piece_GNK < self.vocab_size) & asked_GSK[:, text_S]
            self.words_2 += torch.stack([word_GNK.sum(), (word_GNK & kept_GNK).sum()])

    def add_gates(self, gates_GSE: Tensor, sent: Sent) -> None:
        """gates_GSE: clean ones, as the auxiliary losses see them."""
        parts = (slice(0, sent.image_tokens), slice(sent.image_tokens, None))
        for entropies, part in zip(self.gate_entropies, parts, strict=True):
            counted_GS = sent.counted_GS[:, part].to(gates_GSE.device)
            there_G = counted_GS.any(1)
            if there_G.any():
                mean_GE = mean_gates(gates_GSE[:, part], counted_GS)[there_G].double()
                entropies.append(torch.special.entr(mean_GE).sum(-1).cpu())

    def _add_ranks(self, order_GS: Tensor, counted_GS: Tensor, text_S: Tensor) -> None:
        """Tokens that are not counted are served last, so the places of the others are 0 .. counted - 1."""
        place_GS = torch.empty_like(order_GS).scatter_(1, order_GS, torch.arange(order_GS.shape[1]).expand_as(order_GS))
        # The middle of a token's own stretch: with two tokens 1/4 and 3/4, so that no modality gains by its number.
        rank_GS = (place_GS + 0.5) / counted_GS.sum(1, keepdim=True).clamp(min=1)
        for ranks, part_S in zip(self.ranks, (~text_S, text_S), strict=True):
            ranks.append(rank_GS[counted_GS & part_S].float())

    def result(
        self, moe: Moe, modalities: Sequence[Modality], *, padding_is_routed: bool, name_of: Callable[[int], str]
    ) -> BlockRouting:
        """name_of: a piece's text by its number."""
        found = {
            name: self._modality(number, moe, padding_is_routed=padding_is_routed) if name in modalities else None
            for number, name in enumerate(MODALITIES)
        }
        return BlockRouting(image=found["image"], text=found["text"], experts=self._experts(modalities, name_of))

    def _modality(self, modality: int, moe: Moe, *, padding_is_routed: bool) -> ModalityRouting:
        requested_E = self.requested_E2[:, modality]
        name, total = MODALITIES[modality], int(requested_E.sum())
        success = success_of(total, int(self.kept_E2[:, modality].sum()))
        words = success_of(*self.words_2.tolist()) if name == "text" and padding_is_routed else None
        return ModalityRouting(
            **success.model_dump(),
            effective_experts=effective_experts(requested_E.tolist()),
            effective_experts_by_gates=math.exp(float(torch.cat(self.gate_entropies[modality]).mean()))
            if self.gate_entropies[modality]
            else None,
            # As in metrics.jsonl.
            used_experts=sum(count * self.num_experts >= total / 2 > 0 for count in requested_E.tolist()),
            soft_minimum=getattr(moe, f"min_{name}_experts"),
            soft_minimum_trained=moe.aux_weight > 0 and getattr(moe, f"global_{name}") > 0,
            ranks=ranks_of(torch.cat(self.ranks[modality])) if self.ranks[modality] else None,
            without_padding=words,
        )

    def _experts(self, modalities: Sequence[Modality], name_of: Callable[[int], str]) -> tuple[ExpertRouting, ...]:
        image, text = ("image" in modalities), ("text" in modalities)
        piece_total_V, total = self.pieces_EV.sum(0), int(self.pieces_EV.sum())
        rows = []
        for expert in experts_of([(float(i), float(t)) for i, t in self.kept_E2.tolist()]):
            image_tokens, text_tokens = self.kept_E2[expert.number].tolist()
            pieces_V = self.pieces_EV[expert.number]
            most = sorted(pieces_V.nonzero().flatten().tolist(), key=lambda piece: (-int(pieces_V[piece]), piece))
            pieces = [
                PieceCount(
                    piece=PADDING if piece == self.vocab_size else name_of(piece),
                    count=int(pieces_V[piece]),
                    of_piece_frac=int(pieces_V[piece]) / int(piece_total_V[piece]),
                    lift=int(pieces_V[piece]) * total / (int(pieces_V.sum()) * int(piece_total_V[piece])),
                )
                for piece in most[:MOST_PIECES]
            ]
            rows.append(
                ExpertRouting(
                    expert=expert.number,
                    image_tokens=image_tokens if image else None,
                    text_tokens=text_tokens if text else None,
                    image_frac=expert.image_frac if image and text else None,
                    of_images_frac=expert.of_images_frac if image else None,
                    of_texts_frac=expert.of_texts_frac if text else None,
                    kind=expert.kind,
                    pieces=tuple(pieces),
                )
            )
        return tuple(rows)


def success_of(requested: int, kept: int) -> Success:
    return Success(requested=requested, kept=kept, success_rate=kept / requested if requested else None)


def effective_experts(counts: Sequence[float]) -> float | None:
    """exp of the entropy of a distribution over experts: n where n experts share evenly. None for no count at all."""
    total = sum(counts)
    if not total:
        return None
    shares = [count / total for count in counts if count]
    return math.exp(-sum(share * math.log(share) for share in shares))


def ranks_of(ranks: Tensor) -> Ranks | None:
    """Of any number of places between 0 and 1; None for none."""
    if not len(ranks):
        return None
    values = ranks.numpy().astype(np.float64)
    counts, _ = np.histogram(values, bins=RANK_BINS, range=(0.0, 1.0))
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Ranks(
        median=median,
        lower_quartile=lower,
        upper_quartile=upper,
        histogram=tuple((counts / len(values)).tolist()),
    )
