"""Gradients of every layout at 4 and 8 ranks against one process: the worst relative error and the parameter it is in.

python -m tests.benchmarks.parity --out docs/measured/parity.json

The case and the comparison are those of tests/ranks/test_layout_parity.py: dropped tokens, an idle expert, every
auxiliary loss on. Errors of gradients are relative to the parameter's largest gradient in one process, that of the
global norm to the norm; losses differ by nats. Which choices each expert kept is the same to the number, or this ends
with an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import origin
from tests.ranks.test_layout_parity import LAYOUTS, TOLERANCE, compare, largest
from tests.support.cases import small_run
from tests.support.ranks import RanksPool

MODULE = "tests.benchmarks.parity"
WORLDS = (4, 8)


def worst_of(answers: list[dict[str, float]]) -> dict[str, Any]:
    """Of all ranks: the largest error of a gradient or the norm, the largest difference of a loss, and where."""
    name, error = largest([{key: part[key] for key in part if not _is_loss(key)} for part in answers])
    loss, difference = largest([{key: part[key] for key in part if _is_loss(key)} for part in answers])
    return {"largest_error": error, "of": name, "largest_loss_difference": difference, "of_loss": loss}


def _is_loss(name: str) -> bool:
    """As "contrastive", "aux" and "block 1 z" are; "blocks.1.norm1.bias", "log_scale" and "norm" are not."""
    return name in ("contrastive", "aux") or name.startswith("block ")


def errors_of(world: int) -> list[dict[str, Any]]:
    """One entry for each layout and type."""
    pool = RanksPool(world)
    try:
        found = []
        for tp, ep in LAYOUTS[world]:
            for dtype, wanted in TOLERANCE.items():
                layout = {"ranks": world, "dp": world // tp, "tp": tp, "edp": world // ep, "ep": ep, "dtype": dtype}
                answers = pool.run(compare, small_run(dtype), tp, ep, "pairs")
                found.append(layout | worst_of(answers) | {"wanted": wanted})
                print(found[-1], flush=True)
        return found
    finally:
        pool.close()


def passes(entry: dict[str, Any]) -> bool:
    """Both kinds of error are within what is wanted."""
    return max(entry["largest_error"], entry["largest_loss_difference"]) < entry["wanted"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    layouts = [entry for world in WORLDS for entry in errors_of(world)]
    worst = {
        dtype: max((entry for entry in layouts if entry["dtype"] == dtype), key=lambda entry: entry["largest_error"])
        for dtype in TOLERANCE
    }
    options.out.write_text(json.dumps(origin(MODULE) | {"worst": worst, "layouts": layouts}, indent=2) + "\n")
    return 0 if all(passes(entry) for entry in layouts) else 1


if __name__ == "__main__":
    sys.exit(main())
