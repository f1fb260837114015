"""`limoe status RUN`: how a run is, from its files and from Slurm. Needs no torch, so that a login node will do."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from launch.status_facts import Facts, gather
from launch.status_state import Verdict, faults_by_host, how, judge, remaining, slow_host, warnings
from launch.status_tables import clear, show
from limoe_dist.config.errors import UserError


@dataclass(frozen=True)
class Options:
    """Tell how a run is: its jobs and restarts, step, ETA, last checkpoint, faults, and what its guards did.

    States: queued, starting, training, evaluating, saving; stopped (saved, and can be gone on with), guarded (stopped
    by a guard), done, failed, looks dead (it sends no heartbeat any more). Without Slurm it tells what the files of the
    run do. Exit status: 0 done, going on, or stopped as somebody wished; 1 failed or looks dead; 2 no such run;
    3 stopped by a guard.
    """

    run: tyro.conf.Positional[str]
    """Directory of a run."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object; times are Unix times, durations seconds."""
    watch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Again and again, until nothing more comes by itself."""
    every: float = 10.0
    """Seconds between two looks of --watch."""


def main(argv: list[str]) -> int:
    """Runs `limoe status`; returns its exit status. Lets UserError pass."""
    try:
        options = tyro.cli(Options, prog="limoe status", args=argv or ["--help"])
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    if options.every < 1:
        raise UserError(f"--every {options.every:g}: at least 1 second, for Slurm's sake")
    while True:
        facts = gather(Path(options.run))
        verdict = judge(facts)
        if options.watch and sys.stdout.isatty():
            clear()
        if options.json:
            content = finite(as_json(facts, verdict))
            print(json.dumps(content, indent=None if options.watch else 2, allow_nan=False), flush=True)
        else:
            show(facts, verdict)
        if not options.watch or verdict.over:
            return verdict.exit_status
        time.sleep(options.every)


def finite(value: Any) -> Any:
    """The same with null for what is not finite: JSON has no NaN, and few programs read one."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(facts: Facts, verdict: Verdict) -> dict[str, Any]:
    rest, beat, saved = remaining(facts), facts.heartbeat, facts.checkpoint
    return {
        "run": str(facts.run_dir),
        "time": facts.now,
        "state": verdict.state,
        "text": verdict.text,
        "step": facts.step,
        "steps": facts.steps,
        "loss": facts.metrics.get("loss"),
        "pairs_per_s": facts.metrics.get("pairs_per_s"),
        "training_left_s": rest.training_s,
        "wall_left_s": rest.wall_s,
        "waiting_frac": rest.waiting_frac,
        "heartbeat": beat and {"age_s": beat.age_s, "ahead_s": beat.ahead_s, "step": beat.step, "phase": beat.phase},
        "checkpoint": saved and {"step": saved.step, "written": saved.written, "verified": saved.verified},
        "slurm": facts.queued is not None,
        "queue": [vars(job) for job in facts.jobs_in_queue],
        "attempts": [
            {
                "job": one.job,
                "restart": one.restart,
                "nodes": one.nodes,
                "began": one.began,
                "ended": one.ended,
                "from_step": one.step,
                "to_step": one.end_step,
                "status": one.status,
                "how": how(facts, one),
            }
            for one in facts.attempts
        ],
        "faults": {host: dict(kinds) for host, kinds in faults_by_host(facts.faults, facts.attempts).items()},
        "last_fault": facts.faults[-1] if facts.faults else None,
        "guard": {"events": len(facts.guard), "last": facts.guard[-1] if facts.guard else None},
        "slow": slow_host(beat),
        "excluded": facts.excluded,
        "warnings": warnings(facts),
    }
