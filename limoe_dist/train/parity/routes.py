"""Routing decisions of a layout beside those of one process: which differ, and whether rounding explains it.

A gate that differs in its last bit moves a token only where two gates are as good as equal. So a changed decision
passes where the reference's own gates tell a margin below a limit, and the comparison then goes on along the
reference's decisions. Everything else is a defect.
Shapes: G routing groups, S tokens of a group, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.equations.dispatch import index_slots
from limoe_dist.equations.routing import capacity, priorities
from limoe_dist.model.moe_layer import Route, Routes
from limoe_dist.model.tokens import TokenLayout
from limoe_dist.train.step import Examples

UNEXPLAINED = 1.0
"""The margin of a change that no two gates explain: no gate is larger."""


@dataclass(frozen=True)
class Decision:
    """Who chose whom in one MoE block, and who got a slot."""

    expert_GSK: Tensor
    """int64."""
    kept_GSK: Tensor
    """bool."""

    @staticmethod
    def of(routes: Sequence[Routes], block: int) -> Decision:
        """That of a rank's whole batch, from the routes of its microbatches."""
        parts = [part[block] for part in routes]
        return Decision(torch.cat([part.expert_GSK for part in parts]), torch.cat([part.kept_GSK for part in parts]))

    def equals(self, other: Decision) -> bool:
        return torch.equal(self.expert_GSK, other.expert_GSK) and torch.equal(self.kept_GSK, other.kept_GSK)


@dataclass(frozen=True)
class Flips:
    """What differs between two decisions over the same tokens."""

    choices: int
    """Choices that went to another expert."""
    slots: int
    """Choices of the same expert that got or lost a slot."""
    margin: float
    """The largest margin that had to be crossed; UNEXPLAINED where none explains a change; 0 without a change."""


def judge(
    found: Decision,
    wanted: Decision,
    gates_GSE: Tensor,
    valid_GS: Tensor | None,
    *,
    by: Literal["max", "sum"] | None,
    limit: float,
) -> Flips:
    """Compares a layout's decision with the reference's, by the reference's noisy gates.

    by: what the priority of a token is, as moe.priority says; None where tokens are served in another order.

    A choice that moved has the margin between the gates of the expert that was wanted and of the one that was found.
    A slot that changed hands has the margin between the token's priority and that of the last one served, or of the
    first one dropped, in the same queue; but as many may change as choices moved into or out of that queue, for those
    push others.
    """
    moved_GSK = found.expert_GSK != wanted.expert_GSK
    gap_GSK = (gates_GSE.gather(-1, wanted.expert_GSK) - gates_GSE.gather(-1, found.expert_GSK)).abs()
    changed_GSK = (found.kept_GSK != wanted.kept_GSK) & ~moved_GSK
    margins = [0.0, *gap_GSK[moved_GSK].tolist()]
    for group, expert in _queues(changed_GSK, wanted.expert_GSK):
        pushed = sum(int((moved_GSK[group] & (side.expert_GSK[group] == expert)).sum()) for side in (found, wanted))
        crossed = _crossed(group, expert, changed_GSK, wanted, gates_GSE, valid_GS, by=by)
        beyond = sorted(margin for margin in crossed if margin >= limit)
        margins += [margin for margin in crossed if margin < limit] + beyond[pushed:]
    return Flips(choices=int(moved_GSK.sum()), slots=int(changed_GSK.sum()), margin=max(margins))


def _queues(changed_GSK: Tensor, expert_GSK: Tensor) -> list[tuple[int, int]]:
    """(group, expert) of every queue in which a slot changed hands."""
    group = changed_GSK.nonzero()[:, 0]
    return sorted(set(zip(group.tolist(), expert_GSK[changed_GSK].tolist(), strict=True)))


def _crossed(
    group: int,
    expert: int,
    changed_GSK: Tensor,
    wanted: Decision,
    gates_GSE: Tensor,
    valid_GS: Tensor | None,
    *,
    by: Literal["max", "sum"] | None,
) -> list[float]:
    """For each slot that changed hands in a queue, how far its token was from the other side of the last slot."""
    asks_SK = wanted.expert_GSK[group] == expert
    if valid_GS is not None:
        asks_SK = asks_SK & valid_GS[group][:, None]
    priority_S = priorities(gates_GSE[group].gather(-1, wanted.expert_GSK[group]), by or "max")
    kept_SK = wanted.kept_GSK[group]
    margins = []
    for token, choice in (changed_GSK[group] & asks_SK).nonzero().tolist():
        was_kept = bool(kept_SK[token, choice])
        # Who stood on the other side of the last slot, among requests of the same rank: first choices come first.
        other_S = asks_SK[:, choice] & (kept_SK[:, choice] != was_kept)
        margins.append(
            (priority_S[other_S] - priority_S[token]).abs().min().item()
            if by is not None and other_S.any()
            else UNEXPLAINED
        )
    return margins


def follow(decisions: dict[int, Decision], examples: Examples, run: Run) -> list[Routes]:
    """Routes for each microbatch of a rank's batch that serve exactly whom the decisions serve."""
    pairs = run.train.microbatch_pairs or examples.pairs
    parts: list[Routes] = []
    for number, part in enumerate(examples.split(pairs)):
        layout = _layout(part, run)
        here = slice(number * layout.groups, (number + 1) * layout.groups)
        parts.append(
            {
                block: _route(Decision(decision.expert_GSK[here], decision.kept_GSK[here]), layout, run)
                for block, decision in decisions.items()
            }
        )
    return parts


def _layout(part: Examples, run: Run) -> TokenLayout:
    given = part.images if part.images is not None else part.tokens
    assert given is not None
    return TokenLayout(
        images=0 if part.images is None else part.pairs,
        image_tokens=run.image_tokens,
        texts=0 if part.tokens is None else part.pairs,
        text_tokens=run.text.length,
        groups=part.pairs // run.moe.group_pairs,
        device=given.device,
        text_valid=part.valid if run.text.pad == "masked" else None,
    )


def _route(decision: Decision, layout: TokenLayout, run: Run) -> Route:
    """Slots are given out anew, in the order of the tokens: which slot of an expert serves a token changes nothing."""
    moe = run.moe
    groups, tokens, _ = decision.expert_GSK.shape
    as_they_stand = torch.arange(tokens, device=decision.expert_GSK.device).expand(groups, tokens)
    size = capacity(
        layout.group_tokens,
        num_experts=moe.num_experts,
        k=moe.top_k,
        factor=moe.capacity_factor,
        multiple=moe.capacity_multiple,
    )
    served_GRE = torch.nn.functional.one_hot(decision.expert_GSK.flatten(1), moe.num_experts)
    served_GRE = served_GRE * decision.kept_GSK.flatten(1)[..., None]
    slot_GR = (served_GRE.cumsum(1) - served_GRE).gather(-1, decision.expert_GSK.flatten(1)[..., None])[..., 0]
    index = index_slots(
        decision.expert_GSK,
        slot_GR.view_as(decision.expert_GSK),
        decision.kept_GSK,
        layout.token_GS,
        num_experts=moe.num_experts,
        capacity=size,
    )
    return Route(decision.expert_GSK, decision.kept_GSK, as_they_stand, index)


def valid_tokens(examples: Examples, run: Run) -> Tensor | None:
    """(G, S) bool of a rank's whole batch, False at masked padding; None where all tokens count."""
    return _layout(examples, run).valid_GS
