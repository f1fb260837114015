"""The paper's runs as files: a preset and what the run changes in it, in one table that the run.json files repeat.

`python -m launch.recipes --write` writes the files beside this one. Where each value comes from: docs/recipes.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limoe_dist.config.presets import preset
from limoe_dist.config.schema import Run

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    about: str
    preset: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By section of the settings."""

    def run(self) -> Run:
        """Raises pydantic's ValidationError where a change does not fit the settings."""
        content = preset(self.preset).model_dump()
        for section, values in self.changes.items():
            content[section] |= values
        return Run.model_validate(content)


# Section 3.1 of the paper: 16k pairs x 781k steps, 12.8 B pairs, as many as CLIP saw.
_PARETO: dict[str, dict[str, Any]] = {
    "train": {"batch_pairs": 16_384, "steps": 781_250},
    "optim": {"warmup_steps": 10_000, "cooldown_steps": 50_000},
}
# Section 4 and appendix A.2. The paper prints a batch of 8,096, which no power of two of ranks can share.
_ABLATION: dict[str, dict[str, Any]] = {
    "train": {"batch_pairs": 8192, "steps": 100_000},
    "optim": {"warmup_steps": 10_000, "cooldown_steps": 10_000},
    "moe": {"min_text_experts": 9.0, "min_image_experts": 20.0},
}

RECIPES: dict[str, Recipe] = {
    "b16-ablation": Recipe("B/16, 8,192 pairs x 100,000 steps: the ablations, Tables 2 and 3", "b16", _ABLATION),
    "pareto-s32": Recipe("S/32, 16,384 pairs x 781,250 steps: the scaling study", "s32", _PARETO),
    "pareto-s16": Recipe("S/16, likewise", "s16", _PARETO),
    "pareto-b32": Recipe("B/32, likewise", "b32", _PARETO),
    "pareto-b16": Recipe("B/16, likewise", "b16", _PARETO),
    "pareto-l16": Recipe("L/16, likewise", "l16", _PARETO),
    "h14-cotrain": Recipe(
        "H/14, 21,504 pairs x 1,083,500 steps, a quarter of them classes as captions: Table 1",
        "h14",
        {
            "train": {"batch_pairs": 21_504, "steps": 1_083_500},
            "optim": {"warmup_steps": 10_000, "cooldown_steps": 50_000},
            "data": {"mixture": ("shards/web/manifest.json=3", "shards/classes/manifest.json=1")},
            # Ten checkpoints over the cooldown, for `limoe average`: the paper averages some near the end.
            "checkpoint": {"every_steps": 5000, "keep": 10},
        },
    ),
    "laion-400m": Recipe(
        "B/16 on LAION-400M, 8,192 pairs x 100,000 steps: public data, appendix E.6", "b16", _ABLATION
    ),
}


def names() -> dict[str, str]:
    """The recipes with one line about each."""
    return {name: recipe.about for name, recipe in RECIPES.items()}


def path(name: str) -> Path:
    """The run.json of a recipe, which is installed with the package."""
    return FOLDER / f"{name}.json"
