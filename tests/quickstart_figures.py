"""Run as a script on the figures of a quick start: prints each with what is wanted; status 1 where one falls short.

    python tests/quickstart_figures.py quickstart/figures.json

Its last line is like pytest's: "N passed, M failed".
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WANTED_TOP1, WANTED_TOP5, WANTED_SUCCESS = 0.08, 0.20, 0.9


@dataclass(frozen=True)
class Check:
    figure: str
    wanted: str
    got: str
    passed: bool


def checks(figures: dict[str, Any]) -> list[Check]:
    """Every figure that the quick start promises, beside what came out."""
    zeroshot, neighbour = figures["zeroshot"], figures["pixel_nearest_neighbour"] or {}
    found = [
        _at_least("zero-shot top-1", zeroshot["top1"], WANTED_TOP1),
        _at_least("zero-shot top-5", zeroshot["top5"], WANTED_TOP5),
        _is("ranks", figures["ranks"], 2),
        _is("ep (ranks that share the experts)", figures["ep"], 2),
        _is("preset", figures["preset"], "tiny"),
    ]
    success = figures["success"]
    found.append(Check("MoE blocks", "at least 1", str(len(success)), len(success) >= 1))
    for block, rates in success.items():
        found += [_at_least(f"block {block}: success rate, {name}", rates[name], WANTED_SUCCESS) for name in rates]
    print(f"for comparison: chance {zeroshot['chance_top1']:.4f}, nearest neighbour in pixels {neighbour.get('top1')}")
    return found


def _at_least(figure: str, got: float | None, wanted: float) -> Check:
    # A rate is None where no token of the modality was routed: that is a failure, not a pass.
    return Check(figure, f">= {wanted:g}", "none" if got is None else f"{got:.4f}", got is not None and got >= wanted)


def _is(figure: str, got: object, wanted: object) -> Check:
    return Check(figure, f"= {wanted}", str(got), got == wanted)


def main(path: Path) -> int:
    figures = json.loads(path.read_text(encoding="utf-8"))
    found = checks(figures)
    for stage in figures["stages"]:
        print(f"{stage['name']:<12}{stage['seconds']:>9.1f} s{'  (done before)' if stage['done_before'] else ''}")
    print(f"{'total':<12}{figures['seconds']:>9.1f} s")
    width = max(len(check.figure) for check in found)
    print(f"\n{'figure':<{width}}  {'wanted':<8}{'got':<10}")
    for check in found:
        print(f"{check.figure:<{width}}  {check.wanted:<8}{check.got:<10}{'' if check.passed else 'FAILED'}")
    failed = sum(not check.passed for check in found)
    print(f"{len(found) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
