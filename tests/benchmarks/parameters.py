"""Parameters and FLOPs of every preset and its twins, as `limoe plan` counts them, beside the paper's numbers.

python -m tests.benchmarks.parameters --out docs/measured/parameters.json     (seconds; no weights are made)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from launch.counting import with_twins
from limoe_dist.config.parse import write_atomically
from limoe_dist.config.presets import base_names, preset
from tests.benchmarks.machine import origin

PUBLISHED = {"total": "5.6 B (section 3.2)", "per_token": "675 M (Table 1)"}
"""The paper's, of H/14."""
EXPECTED_TOTAL = 5_553.8e6
"""Of H/14, by hand, with what the preset decides where the paper is silent."""


@dataclass(frozen=True)
class Options:
    out: Path
    """The JSON file to write."""


def counts() -> dict[str, Any]:
    return {name: {twin: asdict(cost) for twin, cost in with_twins(preset(name)).items()} for name in base_names()}


def main() -> None:
    options = tyro.cli(Options)
    found = counts()
    h14 = found["h14"]["itself"]["parameters"]
    content = {
        "about": "parameters, and FLOPs of a pair's forward pass, of every preset and its dense twins",
        **origin("tests.benchmarks.parameters"),
        "formula": "limoe plan PRESET --help; tests/launch/test_plan.py compares it with torch's FlopCounterMode",
        "h14": {"paper": PUBLISHED, "total_over_expected": h14["total"] / EXPECTED_TOTAL},
        "presets": found,
    }
    write_atomically(options.out, json.dumps(content, indent=2) + "\n")
    for name, twins in found.items():
        count, flops = twins["itself"]["parameters"], twins["itself"]["flops"]
        print(
            f"{name:5}  {count['total'] / 1e6:>8,.1f} M parameters, {count['per_token'] / 1e6:>6,.1f} M per token, "
            f"{count['router']:>9,} of routers, {flops['pair'] / 1e9:>8,.3f} GFLOPs a pair"
        )


if __name__ == "__main__":
    main()
