"""What the tests of the numbers cover: settings, random draws, keys of logs and results.

python -m tests.benchmarks.net --out docs/measured/net.json     (a second)
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import tyro

from limoe_dist.config.parse import known_keys, write_atomically
from limoe_dist.config.schema import Run
from tests.benchmarks.machine import origin
from tests.curve.curve import CURVES, STEPS, frozen
from tests.draws import test_augmentation, test_initial_values
from tests.figures.keys import KEYS
from tests.settings.table import ELSEWHERE, NO_EFFECT, ROWS, TESTS


def settings() -> dict[str, Any]:
    fields = [name for name in known_keys(Run) if "." in name or name == "preset"]
    shown = {row.setting for row in ROWS}
    return {
        "fields": len(fields),
        "by sections": Counter(name.partition(".")[0] for name in fields),
        "whose effect on results is compared": len(shown),
        "with a test of what they do": len(set(TESTS) - shown),
        "that decide nothing": NO_EFFECT,
        "changes compared": len(ROWS),
        "that must change no number of a step": len(ELSEWHERE),
        "not covered": sorted(set(fields) - shown - set(TESTS) - set(NO_EFFECT)),
    }


def draws() -> dict[str, Any]:
    return {
        "of a position, over 10^5 positions, all pairs independent": list(test_augmentation.INDEPENDENT),
        "of a routing group": ["router noise", "random order of service"],
        "kinds of initial values": len(test_initial_values.TABLE),
        "of the data order": ["shards of an epoch", "rows of a window", "rows of an epoch", "sources of a mixture"],
        "others": ["few-shot rows", "rows of an analysis", "patches shown", "batches of verify", "pauses of retries"],
    }


def main(out: Path) -> None:
    content = origin("tests.benchmarks.net") | {
        "settings": settings(),
        "draws": draws(),
        "keys with a test": {name: len(keys) for name, keys in KEYS.items()},
        "loss curves": {
            "curves": list(CURVES),
            "steps": STEPS,
            "numbers": sum(len(values) for curve in frozen().values() for values in curve.values()),
        },
    }
    write_atomically(out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
