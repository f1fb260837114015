"""`limoe doctor`: what of this machine limoe-dist can use. Works without any package, so that it can say what lacks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from launch import probes
from launch.probes.finding import SETUP, Finding, Probe, examine
from limoe_dist.config.errors import UserError, nearest

OPTIONS = ("--quick", "--json", "--help", "-h")

USAGE = """\
usage: limoe doctor [--quick] [--json]

Prints a table of what training, data preparation and clusters use: ok, or missing with what one loses and how
to get it. What training cannot do without is then marked `needed`. Changes nothing, and asks nobody but Slurm's
controller, where there is Slurm.

  --quick  for health checks: only what training needs, by looking; imports nothing, starts nothing, asks nobody
  --json   print one JSON object: {"can_train": ..., "findings": [...]}

exit status: 0 where training can run, 1 where it cannot"""


def main(argv: list[str]) -> int:
    """Runs `limoe doctor`; returns its exit status. Lets UserError pass."""
    for word in argv:
        if word not in OPTIONS:
            raise UserError(f'unknown option "{word}"{nearest(word, OPTIONS)} (see limoe doctor --help)')
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    return diagnose(probes.QUICK if "--quick" in argv else probes.ALL, as_json="--json" in argv)


def diagnose(checks: Sequence[Probe], *, as_json: bool) -> int:
    """Prints what the checks find; 0 where nothing that training needs is missing, else 1."""
    findings = examine(checks)
    lacking = [finding.name for finding in findings if finding.needed and finding.status == "missing"]
    if as_json:
        content = {"can_train": not lacking, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(content, indent=2))
    else:
        _print_table(findings)
        print(f"training cannot run without {', '.join(lacking)}" if lacking else "training can run on this machine")
    return 1 if lacking else 0


def _print_table(findings: Sequence[Finding]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        # A bare machine: the same rows as plain lines.
        for one in findings:
            print(f"{one.status:<8}{one.name:<10} {one.found}{'; lost: ' + one.loss if one.loss else ''}")
        print(f"rich is not installed, hence no table: {SETUP}", file=sys.stderr)
        return
    table = Table()
    for column in ("", "status", "found, or looked for", "what one loses, how to get it"):
        table.add_column(column, overflow="fold")
    for one in findings:
        lacking = one.needed and one.status == "missing"
        status = "missing, needed" if lacking else one.status
        color = "bold red" if lacking else {"ok": "green", "missing": "yellow"}[one.status]
        # Text, not markup: a path or a message may hold square brackets.
        table.add_row(one.name, Text(status, style=color), Text(one.found), Text(one.loss))
    Console(highlight=False).print(table)
