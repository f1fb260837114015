"""Runs a trial in a layout along the reference's routing decisions.

The layout decides for itself first. Where that differs and rounding explains it, the reference's decision is forced
and the trial runs again: the rest is then compared on equal routes. Decisions are taken in order, for the later ones
hang on the earlier. After each optimizer step the layout goes on from the reference's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from limoe_dist.parallel.collectives import max_over, sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.parity.boxes import fill_boxes, told
from limoe_dist.train.parity.case import Case, Given
from limoe_dist.train.parity.routes import Decision, Flips, judge, valid_tokens
from limoe_dist.train.parity.trial import Trial, run_trial

Planted = Callable[[], AbstractContextManager[object]]
"""Wraps what the ranks do in their layout, and not the reference: a test plants a defect with it."""


_Spot = tuple[int, int]
"""Number of the step, MoE block."""


@dataclass(frozen=True)
class Stage:
    """A trial that was made in one process, and is now to be made in a layout."""

    case: Case
    batches: tuple[Given, ...]
    wanted: Trial | None
    """What one process found; on rank 0 alone."""
    mesh: Mesh
    device: torch.device

    def label(self, number: int) -> str:
        """The name of a step in checks."""
        return f"step {number + 1}: {self.batches[number]}"

    def resume(self, number: int, shards: dict[str, Shard]) -> None:
        """Every step begins with the reference's state: else rounding would add up from step to step."""
        wanted = {} if self.wanted is None else self.wanted.passes[number].state
        whole = {name: shard.tensor for name, shard in wanted.items()}
        fill_boxes(shards, whole, mesh=self.mesh, device=self.device)

    def mine(self, wholes: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts, of one type and of the shapes of `likes`, of tensors that rank 0 has of all ranks.

        A collective; `wholes` of other ranks are not looked at.
        """
        world, rank = self.mesh.world.size, self.mesh.rank
        shapes = [(len(like) * world, *like.shape[1:]) for like in likes]
        told_ones = told(wholes, shapes, likes[0].dtype, mesh=self.mesh, device=self.device)
        return [one[rank * len(like) : (rank + 1) * len(like)] for one, like in zip(told_ones, likes, strict=True)]


@dataclass(frozen=True)
class Followed:
    """A trial of which every decision is the reference's."""

    trial: Trial
    flips: dict[_Spot, Flips]
    """What the layout had decided otherwise, over all ranks."""


def follow_reference(stage: Stage, planted: Planted, *, limit: float) -> Followed:
    """limit: the margin from which a flip is a defect. A collective."""
    forced: list[dict[int, Decision]] = [{} for _ in stage.batches]
    flips: dict[_Spot, Flips] = {}
    while True:
        with planted():
            trial = run_trial(
                stage.case, stage.batches, mesh=stage.mesh, device=stage.device, forced=forced, resume=stage.resume
            )
        wanted = _wanted(stage, trial)
        spot = _first_difference(stage, trial, wanted)
        if spot is None:
            return Followed(trial, flips)
        flips[spot] = _judge(stage, trial, spot, wanted[spot], limit=limit)
        for number, block in wanted:
            # After a defect the other decisions of its step differ for its sake: they say nothing about rounding.
            if (number, block) == spot or (number == spot[0] and flips[spot].margin >= limit):
                forced[number][block] = wanted[number, block]


def _wanted(stage: Stage, trial: Trial) -> dict[_Spot, Decision]:
    """The reference's decisions for this rank's groups, in the order in which they are taken."""
    spots = [(number, block) for number, one in enumerate(trial.passes) for block in sorted(one.decisions)]
    if not spots:
        return {}
    likes = [trial.passes[number].decisions[block].expert_GSK for number, block in spots]
    experts: Sequence[Tensor | None] = [None] * len(spots)
    kept = experts
    if stage.wanted is not None:
        decisions = [stage.wanted.passes[number].decisions[block] for number, block in spots]
        experts, kept = [one.expert_GSK for one in decisions], [one.kept_GSK for one in decisions]
    pairs = zip(stage.mine(experts, likes), stage.mine(kept, likes), strict=True)
    return {spot: Decision(expert, served.bool()) for spot, (expert, served) in zip(spots, pairs, strict=True)}


def _first_difference(stage: Stage, trial: Trial, wanted: dict[_Spot, Decision]) -> _Spot | None:
    """The first decision that is not the reference's on every rank."""
    if not wanted:
        return None
    differs = [int(not trial.passes[n].decisions[block].equals(wanted[n, block])) for n, block in wanted]
    anywhere = max_over(torch.tensor(differs, device=stage.device), stage.mesh.world).tolist()
    return next((spot for spot, found in zip(wanted, anywhere, strict=True) if found), None)


def _judge(stage: Stage, trial: Trial, spot: _Spot, wanted: Decision, *, limit: float) -> Flips:
    """Over all ranks."""
    number, block = spot
    run, one = stage.case.run, trial.passes[number]
    whole = None if stage.wanted is None else stage.wanted.passes[number].gates[block]
    (gates_GSE,) = stage.mine([whole], [one.gates[block]])
    step = stage.case.first_step + number
    examples = stage.case.examples(stage.batches[number], step=step, mesh=stage.mesh, device=stage.device)
    mine = judge(
        one.decisions[block],
        wanted,
        gates_GSE,
        valid_tokens(examples, run),
        by=run.moe.priority if run.moe.order == "priority" else None,
        limit=limit,
    )
    counts = sum_over(torch.tensor([mine.choices, mine.slots], device=stage.device), stage.mesh.world).tolist()
    margin = max_over(torch.tensor(mine.margin, dtype=torch.float64, device=stage.device), stage.mesh.world)
    return Flips(choices=counts[0], slots=counts[1], margin=margin.item())
