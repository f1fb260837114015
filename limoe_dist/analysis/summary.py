"""The head of a report: what was trained, how far, how fast, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from limoe_dist.analysis.history import History
from limoe_dist.config.schema import Run


@dataclass(frozen=True)
class Facts:
    """What is not in the logs; None where it is not known."""

    folder: str
    parameters: int | None = None
    per_token: int | None = None
    world: int | None = None
    """Ranks that wrote the newest checkpoint."""


@dataclass(frozen=True)
class Tile:
    name: str
    value: str
    note: str = ""


def tiles(run: Run, history: History, facts: Facts, *, stopped: bool = False) -> list[Tile]:
    """In the order in which they are read. stopped: by the run's guard."""
    done, planned = int(history.steps[-1]), run.train.steps
    state = "finished" if done >= planned else "stopped by its guard" if stopped else "running, or stopped early"
    loss, contrastive, aux = (history.latest(name) for name in ("loss", "contrastive", "aux"))
    found = [
        Tile("Preset", run.preset or "none", _architecture(run)),
        Tile("Parameters", _count(facts.parameters), _per_token(run, facts)),
        Tile(
            "Steps",
            f"{done:,} of {planned:,}",
            f"{state}; {done * run.train.batch_pairs:,} pairs",
        ),
        Tile("Last log line", *date_and_time(history.latest("time"), "%H:%M UTC")),
        Tile("Training time", duration(training_seconds(history)), "from the logged seconds per step"),
        Tile("Ranks", "unknown" if facts.world is None else str(facts.world), _layout(run, facts.world)),
        Tile("Throughput", f"{_median(history, 'pairs_per_s')} pairs/s", "median over the log lines"),
        Tile(
            "Final loss" if done >= planned else "Latest loss",
            _figure(loss),
            f"contrastive {_figure(contrastive)}" + (f" + auxiliary {_figure(aux)}" if run.moe.blocks else ""),
        ),
    ]
    memory = history.latest("memory_bytes")
    if memory:
        found.append(Tile("Peak memory", f"{memory / 2**30:,.2f} GiB", "of rank 0"))
    return found


def training_seconds(history: History) -> float:
    """Seconds per step times the steps between two lines, summed: pauses between a stop and a resume do not count."""
    per_step = np.nan_to_num(history.column("seconds_per_step"), posinf=0.0)
    return float((per_step * np.diff(history.steps, prepend=0)).sum())


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours = whole // 3600
    return f"{hours} h {whole % 3600 // 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _architecture(run: Run) -> str:
    if not run.moe.blocks:
        return f"dense, {run.model.depth} blocks of width {run.model.width}"
    return f"{run.moe.num_experts} experts in {len(run.moe.blocks)} of {run.model.depth} blocks, top-{run.moe.top_k}"


def _count(number: int | None) -> str:
    if number is None:
        return "unknown"
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:,}"


def _per_token(run: Run, facts: Facts) -> str:
    return f"{_count(facts.per_token)} for each token" if run.moe.blocks and facts.per_token is not None else ""


def _layout(run: Run, world: int | None) -> str:
    tp, ep = run.parallel.tp, run.parallel.ep
    if world is None:
        return f"tp {tp}, ep {ep}; the number is read from a checkpoint"
    if world % tp or world % ep:
        return f"tp {tp}, ep {ep}"
    experts = f"; experts edp {world // ep} \N{MULTIPLICATION SIGN} ep {ep}" if run.moe.blocks else ""
    return f"dp {world // tp} \N{MULTIPLICATION SIGN} tp {tp}{experts}"


def date_and_time(seconds: float | None, time_format: str) -> tuple[str, str]:
    """The day and the time of it in UTC; "unknown" and nothing where `seconds` is no time that has a date."""
    try:
        moment = None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        moment = None
    return ("unknown", "") if moment is None else (f"{moment:%Y-%m-%d}", moment.strftime(time_format))


def _median(history: History, name: str) -> str:
    column = history.column(name)
    good = column[np.isfinite(column)]
    return f"{np.median(good):,.0f}" if len(good) else "unknown"


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
