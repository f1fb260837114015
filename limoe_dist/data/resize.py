"""Pictures of any size to one size, on a CPU: torch's antialiased bilinear filter for uint8.

The filter is DALI's (a triangle as wide as the scale) in fixed-point arithmetic on vector units: the same pixels to a
level or two, for a fifth of the time, which is more than half of what a picture cost. tests/benchmarks/loader.py
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

Pixels = npt.NDArray[np.uint8]


def resized(pictures: Sequence[Pixels], size: int, pool: Executor) -> Pixels:
    """(n, size, size, 3) uint8. pictures: (height, width, 3) uint8 each, at least one pixel; pool: does the work."""
    out = torch.empty((len(pictures), size, size, 3), dtype=torch.uint8)

    def one(i: int) -> None:
        # (1, 3, H, W) whose memory is H, W, 3: the layout that torch has vector code for.
        picture = torch.from_numpy(pictures[i]).permute(2, 0, 1).unsqueeze(0)
        small = interpolate(picture, size=(size, size), mode="bilinear", antialias=True)
        out[i] = small[0].permute(1, 2, 0)

    # To its end: what a picture raises belongs to whoever asked for it.
    list(pool.map(one, range(len(pictures))))
    return out.numpy()
