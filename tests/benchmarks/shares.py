"""Can any pattern keep every stretch of a mixture within one sample of its shares? And how far off is ours?

python -m tests.benchmarks.shares --out docs/measured/shares.json

Exhaustive, with pruning: for each set of whole weights without a common divisor all patterns of one period are tried.
"Within one" is meant generously, one sample included; the stretches are all those between two positions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import reduce
from itertools import combinations_with_replacement
from math import gcd
from pathlib import Path

import numpy as np

from limoe_dist.config.parse import write_atomically
from limoe_dist.data.mixture import Mixture
from tests.benchmarks.machine import origin

MODULE = "tests.benchmarks.shares"
LARGEST = {2: 20, 3: 9, 4: 6, 5: 5}
"""Largest weight, by the number of sources."""


def has_pattern(weights: Sequence[int]) -> bool:
    """Whether some pattern keeps every stretch within one sample, for all sources."""
    period = sum(weights)

    def goes_on(ahead: list[int], low: list[int], high: list[int], left: list[int]) -> bool:
        """ahead: by source, samples minus share, times the period; its range is the worst stretch."""
        if not any(left):
            return True
        for source in sorted(range(len(weights)), key=ahead.__getitem__):
            if not left[source]:
                continue
            then = [value - weight for value, weight in zip(ahead, weights, strict=True)]
            then[source] += period
            lower, higher = list(map(min, low, then)), list(map(max, high, then))
            if all(b - a <= period for a, b in zip(lower, higher, strict=True)):
                rest = [count - (number == source) for number, count in enumerate(left)]
                if goes_on(then, lower, higher, rest):
                    return True
        return False

    zeros = [0] * len(weights)
    return goes_on(zeros, zeros, zeros, list(weights))


def worst(weights: Sequence[int]) -> tuple[float, float]:
    """Of our pattern: the most samples that a position, and a stretch, are off."""
    sources, _ = Mixture(weights).samples(np.arange(sum(weights)))
    positions = np.arange(1, sum(weights) + 1)
    off = [
        np.concatenate([[0.0], np.cumsum(sources == source) - positions * weight / sum(weights)])
        for source, weight in enumerate(weights)
    ]
    return max(float(np.abs(one).max()) for one in off), max(float(np.ptp(one)) for one in off)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = []
    for sources, largest in LARGEST.items():
        sets = [w for w in combinations_with_replacement(range(1, largest + 1), sources) if reduce(gcd, w) == 1]
        without = [weights for weights in sets if not has_pattern(weights)]
        off = [worst(weights) for weights in sets]
        lines.append(
            {
                "sources": sources,
                "largest_weight": largest,
                "sets_of_weights": len(sets),
                "no_pattern_within_one_in_every_stretch": len(without),
                "the_first_of_them": list(without[0]) if without else None,
                "ours_off_at_a_position": round(max(position for position, _ in off), 3),
                "bound_at_a_position": round(1 - 1 / (2 * sources - 2), 3),
                "ours_off_over_a_stretch": round(max(stretch for _, stretch in off), 3),
            }
        )
        print(lines[-1], flush=True)
    write_atomically(options.out, json.dumps(origin(MODULE) | {"mixtures": lines}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
