"""Every layout's checkpoint loaded in every other layout and in one process: how many numbers come back unequal.

python -m tests.benchmarks.checkpoint_layouts --out docs/measured/checkpoint_layouts.json

The case and the comparison are those of tests/ranks/test_checkpoint_layouts.py: two steps of training in float32 on
gloo ranks, saved, then loaded over NaN. Compared are all numbers of the weights and of the optimizer's state on every
rank that holds them, and the parameters of the model, bit by bit. AdamW's checkpoints go to DeepSpeed's engine too, and
back; Adafactor is the native engine's alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import origin
from tests.ranks.test_checkpoint_layouts import STEPS, Compared, Layout, alone, layouts, matrix
from tests.support.ranks import RanksPool

MODULE = "tests.benchmarks.checkpoint_layouts"
FAMILIES = (("adamw", "deepspeed"), ("adafactor",))
"""Optimizers that read one another's checkpoints; the first runs in one process too."""


def entry(compared: Compared) -> dict[str, Any]:
    return {
        "saved": described(compared.saved),
        "loaded": described(compared.loaded),
        "tensors": compared.tensors,
        "numbers": compared.numbers,
        "unequal": compared.unequal,
        "largest_difference": compared.largest_difference,
    }


def described(layout: Layout) -> str:
    dp, edp = layout.ranks // layout.tp, layout.ranks // layout.ep
    ranks = f"{layout.ranks} rank{'s' if layout.ranks > 1 else ''}"
    return f"{ranks} dp={dp} tp={layout.tp} edp={edp} ep={layout.ep}, {layout.optimizer}"


def measure(pools: dict[int, RanksPool]) -> list[dict[str, Any]]:
    found = []
    for family in FAMILIES:
        one = alone(family[0])
        cuts = [one, *(layout for optimizer in family for layout in layouts(optimizer))]
        with tempfile.TemporaryDirectory() as folder:
            found += [entry(compared) for compared in matrix(Path(folder), pools, cuts, cuts)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    pools = {world: RanksPool(world) for world in (2, 4)}
    try:
        pairs = measure(pools)
    finally:
        for pool in pools.values():
            pool.close()
    total = {
        "pairs": len(pairs),
        "unequal": sum(pair["unequal"] for pair in pairs),
        "largest_difference": max(pair["largest_difference"] for pair in pairs),
    }
    figures = origin(MODULE) | {"dtype": "fp32", "steps_of_training": STEPS, "total": total, "pairs": pairs}
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(total)
    return 1 if total["unequal"] else 0


if __name__ == "__main__":
    sys.exit(main())
