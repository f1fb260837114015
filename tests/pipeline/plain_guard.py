"""The guard's judgement of a loss in plain Python, from the documented rule; imports nothing of the product."""

from __future__ import annotations

import math


def lower_median(values: list[float]) -> float:
    """The middle value; of an even count the lower of the two."""
    return sorted(values)[(len(values) - 1) // 2]


def z_score(loss: float, before: list[float]) -> float:
    """(loss - median) / max(1.4826 MAD, a thousandth of the median's size)."""
    median = lower_median(before)
    spread = 1.4826 * lower_median([abs(value - median) for value in before])
    return (loss - median) / max(spread, 0.001 * abs(median))


class PlainGuard:
    """Keeps the last `window` losses of steps that were kept, oldest first."""

    def __init__(self, *, window: int, limit: float, leaves_out: bool) -> None:
        self.window, self.limit, self.leaves_out = window, limit, leaves_out
        self.losses: list[float] = []

    def judge(self, loss: float, norm: float) -> tuple[str, bool, float]:
        """Kind, whether the step is kept, and z (NaN with too few losses)."""
        enough = len(self.losses) >= max(8, self.window // 4)
        z = z_score(loss, self.losses) if enough else math.nan
        kind = ""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kind = "non_finite"
        elif enough and z >= self.limit:
            kind = "spike"
        kept = kind == "" or (kind == "spike" and not self.leaves_out)
        if kept:
            self.losses = [*self.losses, loss][-self.window :]
        return kind, kept, z
