"""Defaults and presets as a table: a number that changes by accident is seen, one that is meant to is changed here too.

python -m tests.config.test_frozen writes the table anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from limoe_dist.config.presets import base_names, preset
from limoe_dist.config.schema import Run

FILE = Path(__file__).with_name("frozen.json")


def table() -> dict[str, dict[str, Any]]:
    """Every default, and what each preset has in its place, by dotted name."""
    defaults = _flat(Run())
    presets = {name: _flat(preset(name)) for name in base_names()}
    changes = {
        name: {key: value for key, value in values.items() if value != defaults[key]}
        for name, values in presets.items()
    }
    return {"defaults": defaults} | changes


def _flat(run: Run) -> dict[str, Any]:
    content = run.model_dump(mode="json")
    flat = {"preset": content.pop("preset")}
    return flat | {f"{section}.{name}": value for section, fields in content.items() for name, value in fields.items()}


def test_no_default_and_no_preset_has_changed() -> None:
    frozen, now = json.loads(FILE.read_text(encoding="utf-8")), table()
    assert now.keys() == frozen.keys()
    for name, settings in frozen.items():
        assert now[name] == settings, name


if __name__ == "__main__":
    FILE.write_text(json.dumps(table(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
