"""Which ranks work longer than the others, so that all wait for them; a host is named where all of its ranks do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from limoe_dist.parallel.place import name_ranks

LINES = 3
"""Log lines in a row in which a rank is slow before it is named, or fine before it can be named again."""
WORTH = 0.05
"""A rank that costs a smaller share of the step is left alone."""


def median_of(busy_s: Sequence[float]) -> float:
    """The lower median: of two ranks the faster one, so that the slower one stands out."""
    return statistics.median_low(busy_s)


class Stragglers:
    """Looks at every log line; hosts: of each rank; factor: times the median, and a rank is slow."""

    def __init__(self, hosts: Sequence[str], factor: float) -> None:
        self._hosts, self._factor = hosts, factor
        self._in_a_row = [0] * len(hosts)
        """Log lines in which a rank was slow, up to now; below 0, in which it was not."""
        self._told: set[int] = set()

    def look(self, busy_s: Sequence[float], seconds_per_step: float) -> str | None:
        """A line for a person, where a rank is to be named that was not; busy_s: seconds of work of a step, by rank."""
        median, before = median_of(busy_s), self._in_a_row
        for rank, busy in enumerate(busy_s):
            slow = busy > self._factor * median and busy - median > WORTH * seconds_per_step
            before[rank] = max(before[rank], 0) + 1 if slow else min(before[rank], 0) - 1
            if before[rank] <= -LINES:
                self._told.discard(rank)
        lasting = {rank for rank, lines in enumerate(before) if lines >= LINES}
        if lasting <= self._told:
            return None
        self._told |= lasting
        return (
            f"slow: {self._name(lasting)}: up to {max(busy_s[rank] for rank in lasting):.3g} s a step outside of "
            f"collectives, where the median rank works {median:.3g} s; all wait for it. Look at its data loading, "
            "at the clock of its cores or GPU, and for another job on the host"
        )

    def _name(self, ranks: set[int]) -> str:
        of_host: dict[str, set[int]] = {}
        for rank, host in enumerate(self._hosts):
            of_host.setdefault(host, set()).add(rank)
        # Of one rank on a host, or of the only host, the rank says as much.
        whole = [host for host, its in of_host.items() if 1 < len(its) < len(self._hosts) and its <= ranks]
        rest = ranks.difference(*(of_host[host] for host in whole))
        names = [f"host {host} ({name_ranks(of_host[host], {})}, all that it has)" for host in whole]
        return ", ".join([*names, *([name_ranks(rest, self._hosts)] if rest else [])])
