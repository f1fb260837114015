"""What became of an attempt that could not say so itself, as far as Slurm tells: which of its hosts are to blame."""

from __future__ import annotations

from slurm import scheduler
from slurm.attempts import Attempt
from slurm.scheduler import Node

CLOCK_S = 30.0
"""Times of a boot differ by a second or so whenever Slurm asks for them; no host starts again within this."""


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
    if not lost:
        return [], "ended without a word: preemption, scancel, or a power cut"
    # Preemption and scancel have no part in a node's death: of several that were lost since, none may be the reason.
    if len(lost) > 1 and state != "NODE_FAIL":
        return [], f"ended without a word; {', '.join(lost)} were lost since, and nobody knows whether before its end"
    return lost, "lost " + ", ".join(lost)


def is_preempted(job: str) -> bool:
    """Whether Slurm takes its nodes away from this start of a job; False where it does not tell."""
    return bool(job) and bool(scheduler.known(lambda: scheduler.is_preempted(job)))


def lost_hosts(attempt: Attempt) -> list[str] | None:
    """Its nodes that are down, or were started again since it began; None where Slurm does not tell."""
    found = scheduler.known(lambda: scheduler.nodes(attempt.nodes))
    if found is None:
        return None
    there = [found[name] for name in attempt.nodes if name in found]
    slurmd, boot = dict(attempt.slurmd), dict(attempt.boot)
    lost = {node.name for node in there if node.lost or _is_later(node.boot, boot.get(node.name), attempt, CLOCK_S)}
    # A daemon may be started again under a job that goes on, as all are for a new slurm.conf. That of one host among
    # many tells of the host.
    anew = {node.name for node in there if _is_later(node.slurmd_start, slurmd.get(node.name), attempt, 1.0)}
    if 2 * len(anew) <= len(attempt.nodes):
        lost |= anew
    return [name for name in attempt.nodes if name in lost]


def _is_later(now: float | None, before: float | None, attempt: Attempt, tolerance_s: float) -> bool:
    return now is not None and now > (attempt.began if before is None else before) + tolerance_s


def since_when(nodes: dict[str, Node]) -> dict[str, dict[str, float]]:
    """Of each node, for the line that an attempt begins with: when its daemon was started, and when it was booted."""
    return {
        "slurmd": {name: node.slurmd_start for name, node in nodes.items() if node.slurmd_start},
        "boot": {name: node.boot for name, node in nodes.items() if node.boot},
    }
