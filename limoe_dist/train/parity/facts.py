"""What the batches of a comparison contain: agreement on batches in which little happens would prove little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.parallel.collectives import sum_over
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.parity.trial import Pass

MIN_DROPPED_FRAC = 0.05
KINDS = ("pictures and captions", "pictures alone", "captions alone")


@dataclass(frozen=True)
class Facts:
    dropped_frac: float | None
    """Of the choices of real tokens in the first batch, those that got no slot; None for a dense model."""
    idle: dict[int, list[int]]
    """By MoE block, the experts that no token of that batch chose; blocks without one are left out."""
    groups: dict[str, int]
    """Routing groups, of a dense model pairs, by what they contain: one of KINDS."""
    norms: list[float]
    """Of the gradient of each step, before clipping."""


def facts_of(run: Run, passes: Sequence[Pass], mesh: Mesh) -> Facts:
    """Of a trial that begins with pairs. A collective."""
    count = run.train.batch_pairs // (run.moe.group_pairs if run.moe.blocks else 1)
    groups = dict.fromkeys(KINDS, 0)
    for one in passes:
        groups[_kind(one)] += count
    return Facts(
        dropped_frac=dropped_frac(passes[0], mesh) if run.moe.blocks else None,
        idle=_idle(passes[0], mesh) if run.moe.blocks else {},
        groups=groups,
        norms=[one.norm for one in passes],
    )


def dropped_frac(one: Pass, mesh: Mesh) -> float:
    """A collective."""
    chosen_BE, kept_BE = _served(one, mesh)
    return float(1 - kept_BE.sum() / chosen_BE.sum())


def _idle(one: Pass, mesh: Mesh) -> dict[int, list[int]]:
    found = {
        block: (chosen_E == 0).nonzero()[:, 0].tolist()
        for block, chosen_E in zip(one.records, _served(one, mesh)[0], strict=True)
    }
    return {block: experts for block, experts in found.items() if experts}


def _served(one: Pass, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Two of (MoE blocks, E), over all ranks: tokens that chose each expert, and tokens that it served."""
    chosen = torch.stack([record.routed_E2.sum(1) for record in one.records.values()])
    kept = torch.stack([record.kept_E2.sum(1) for record in one.records.values()])
    return sum_over(chosen.double(), mesh.world), sum_over(kept.double(), mesh.world)


def _kind(one: Pass) -> str:
    """By whose tokens the modules saw."""
    images, texts = (any(len(parts[modality]) for parts in one.outputs.values()) for modality in (0, 1))
    return KINDS[0 if images and texts else 1 if images else 2]


def lacking(facts: Facts, run: Run) -> list[str]:
    """A sentence for each thing that the batches ought to contain and do not."""
    problems = []
    if facts.dropped_frac is not None and facts.dropped_frac < MIN_DROPPED_FRAC:
        problems.append(
            f"{facts.dropped_frac:.1%} of the tokens were dropped, {MIN_DROPPED_FRAC:.0%} are needed: "
            f"moe.capacity_factor={run.moe.capacity_factor:g} has room for nearly all: verify with a smaller one"
        )
    # Where every token goes to every expert, none can be idle.
    if run.moe.blocks and not facts.idle and run.moe.top_k < run.moe.num_experts:
        problems.append("every expert was chosen by some token: none is idle")
    problems += [f"no routing group has {name}" for name, count in facts.groups.items() if not count]
    if facts.norms[0] <= run.optim.clip_norm:
        problems.append(
            f"the gradient is not clipped: its norm {facts.norms[0]:g} is not above "
            f"optim.clip_norm={run.optim.clip_norm:g}"
        )
    return problems
