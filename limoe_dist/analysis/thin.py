"""A long curve with fewer points that looks the same: its ends and its extremes stay."""

from __future__ import annotations

import numpy as np

from limoe_dist.analysis.history import Column

MOST_POINTS = 400
"""More than a panel of a few hundred pixels can show."""


def thin(steps: Column, values: Column, *, most: int = MOST_POINTS) -> tuple[Column, Column]:
    """At most `most` of the points, in order: the first, the last, and the least and largest of each even stretch.

    steps, values: (n,), all finite. A single spike among many lines is kept, which a mean would hide.
    Raises ValueError for most < 4.
    """
    if most < 4:
        raise ValueError(f"most={most}: a curve needs at least 4 points, for its ends and its extremes")
    if len(steps) <= most:
        return steps, values
    kept = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), (most - 2) // 2):
        kept.add(int(stretch[np.argmin(values[stretch])]))
        kept.add(int(stretch[np.argmax(values[stretch])]))
    chosen = np.array(sorted(kept))
    return steps[chosen], values[chosen]
