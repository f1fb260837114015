"""What became of an attempt that could not say so itself, as far as Slurm tells."""

from __future__ import annotations

from collections.abc import Mapping

from slurm import scheduler
from slurm.attempts import Attempt


def what_happened(attempt: Attempt) -> tuple[list[str], str]:
    """The hosts that an attempt lost, and what ended it, as far as Slurm tells."""
    entries = scheduler.known(lambda: scheduler.history([attempt.job] if attempt.job else [])) or []
    # One entry for each restart, in their order.
    state = entries[attempt.restart].state if len(entries) > attempt.restart else ""
    if state in ("PREEMPTED", "CANCELLED", "TIMEOUT", "DEADLINE"):
        return [], state.lower()
    lost = lost_hosts(attempt)
    if lost is None:
        return [], "ended without a word; Slurm's commands are not here to ask why"
    return lost, "lost " + ", ".join(lost) if lost else "ended without a word: preemption, scancel, or a power cut"


def lost_hosts(attempt: Attempt) -> list[str] | None:
    """Its nodes that are down, or were started since; None where Slurm does not tell."""
    found = scheduler.known(lambda: scheduler.nodes(attempt.nodes))
    if found is None:
        return None
    before = dict(attempt.slurmd)
    return [name for name in attempt.nodes if (node := found.get(name)) and (node.lost or _anew(node, attempt, before))]


def _anew(node: scheduler.Node, attempt: Attempt, before: Mapping[str, float]) -> bool:
    """Whether the node, or at least its daemon, was started again since the attempt began."""
    if node.slurmd_start is None:
        return False
    return node.slurmd_start > before.get(node.name, attempt.began) + 1
