"""Reads the reference values; what they are and where they came from: README.md in this folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
ROUTING_CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((FOLDER / "routing_cases.json").read_text())["cases"]
}


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file, by key; do not write into them."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def routing_case(name: str) -> dict[str, Tensor]:
    """One routing case, by key without the case's name; integers as int64."""
    found = {}
    for key, value in arrays("routing_cases").items():
        case, _, short = key.partition("/")
        if case == name:
            tensor = torch.tensor(value)
            found[short] = tensor.long() if tensor.dtype == torch.int32 else tensor
    return found
