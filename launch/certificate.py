"""The outcome of `limoe verify`: certificate.json, and the same as a table."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from launch.verified import Change, Layout
from limoe_dist.config.parse import decisive
from limoe_dist.config.schema import Run

if TYPE_CHECKING:
    from rich.table import Table

    from limoe_dist.train.parity.checks import Check
    from limoe_dist.train.parity.compare import Blame, Comparison

FORMAT = "limoe-dist certificate 1"


def fingerprint(run: Run, layout: Layout) -> str:
    """sha256 over the settings that decide results, the engine and the layout: those that were asked for."""
    engine = {"optim": [run.optim.engine, run.optim.zero_stage, run.optim.offload]}
    content = decisive(run) | engine | {"layout": layout.to_json()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def certificate(
    asked: Run,
    used: Run,
    *,
    layouts: tuple[Layout, Layout],
    changes: Sequence[Change],
    comparisons: Sequence[Comparison],
    blamed: Blame | None,
    device: str,
    seconds: float,
    made: str,
) -> dict[str, Any]:
    """layouts: the one that was asked for, and the one that ran. made: the time, as ISO 8601 has it."""
    import torch

    passed = all(one.passed for one in comparisons)
    versions = {"limoe-dist": version("limoe-dist"), "torch": str(torch.__version__)}
    content = {
        "format": FORMAT,
        "result": "passed" if passed else "failed",
        "first_difference": None if blamed is None else _blame(blamed),
        "preset": asked.preset,
        "fingerprint": fingerprint(asked, layouts[0]),
        "layout": {name: layout.to_json() for name, layout in zip(("asked", "used"), layouts, strict=True)},
        "changes": [asdict(change) for change in changes],
        "versions": versions | {"python": platform.python_version()},
        "device": device,
        "made": made,
        "seconds": round(seconds, 1),
        "comparisons": [
            {
                "precision": one.precision,
                "passed": one.passed,
                "lacking": list(one.lacking),
                "facts": asdict(one.facts),
                "checks": [_check(check) for check in one.checks],
            }
            for one in comparisons
        ],
        "settings": used.model_dump(mode="json", exclude={"data", "eval", "checkpoint", "log"}),
    }
    return {name: _without_infinity(value) for name, value in content.items()}


def _blame(blamed: Blame) -> dict[str, Any]:
    return {
        "precision": blamed.precision,
        "check": blamed.check.what,
        "step": blamed.check.step,
        "place": blamed.place,
        "parameter": blamed.parameter or None,
    }


def _check(check: Check) -> dict[str, Any]:
    return asdict(check) | {"failed": list(check.failed), "passed": check.passed}


def _without_infinity(value: Any) -> Any:
    """JSON has no infinity and no NaN: what is not finite becomes null."""
    if isinstance(value, dict):
        return {name: _without_infinity(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_infinity(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(comparisons: Sequence[Comparison]) -> Table:
    """One row for each kind of check and precision, with its worst step."""
    from rich.table import Table

    from limoe_dist.train.parity.checks import DECISIONS

    shown = Table()
    for name in ("", "compared", "worst error", "allowed", "where", ""):
        shown.add_column(name, overflow="fold")
    for one in comparisons:
        for what in dict.fromkeys(check.what for check in one.checks):
            checks = [check for check in one.checks if check.what == what]
            worst = max(checks, key=lambda check: (not check.passed, check.error / (check.tolerance or 1)))
            where = [f"{worst.place} ({worst.step})"] if worst.error else []
            # Flips of every step, and of other notes that of the worst.
            noted = checks if what == DECISIONS else [worst]
            where += [f"{check.step}: {check.note}" for check in noted if check.note]
            result = "[green]ok[/]" if worst.passed else "[bold red]FAILED[/]"
            figures = (f"{worst.error:.1e}", f"{worst.tolerance:.0e}")
            shown.add_row(one.precision, what, *figures, "\n".join(where), result)
        shown.add_section()
    return shown


def contents(one: Comparison, run: Run) -> str:
    """What the batches contained, in one line."""
    facts, sparse = one.facts, ""
    if facts.dropped_frac is not None:
        idle = ", ".join(f"{experts} of block {block}" for block, experts in facts.idle.items())
        sparse = f"{facts.dropped_frac:.1%} of tokens dropped; idle experts {idle or 'none'}; "
    kind = "routing groups" if run.moe.blocks else "pairs"
    groups = ", ".join(f"{count} with {name}" for name, count in facts.groups.items())
    norms = ", ".join(f"{norm:.3g}" for norm in facts.norms)
    return f"{one.precision}: {sparse}{kind}: {groups}; norms {norms}, clipped at {run.optim.clip_norm:.3g}"
