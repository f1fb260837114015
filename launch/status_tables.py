"""What `limoe status` prints: tables on a terminal, the same as plain columns anywhere else."""

from __future__ import annotations

import math
import shlex
import sys
from collections import Counter
from datetime import datetime

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.status_facts import Facts
from launch.status_state import Verdict, faults_by_host, how, remaining, slow_host, warnings
from limoe_dist.checkpoint.contents import plain
from slurm.attempts import Attempt, number, whole

COLORS = {
    "done": "bold green",
    "training": "green",
    "saving": "green",
    "evaluating": "green",
    "failed": "bold red",
    "looks dead": "bold red",
    "guarded": "bold red",
    "stopped": "yellow",
    "queued": "yellow",
}
HEADINGS = ("job", "restart", "nodes", "began", "ran", "steps", "how it ended")
ROWS = 20
"""Of the jobs, the newest."""


def clear() -> None:
    print("\x1b[H\x1b[2J", end="")


def show(facts: Facts, verdict: Verdict) -> None:
    """To standard output; 80 columns hold it on a terminal. Anywhere else no line is folded, so that grep finds it."""
    if sys.stdout.isatty():
        _show_rich(facts, verdict)
        return
    print(plain(f"{facts.run_dir}: {verdict.state}: {verdict.text}"))
    columns = [[plain(name), plain(value)] for name, value in _rows(facts, verdict)]
    for table in (columns, [list(HEADINGS), *_attempts(facts)] if facts.attempts else []):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print("  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip())
    for line in _notes(facts, verdict):
        print(plain(line))


def _show_rich(facts: Facts, verdict: Verdict) -> None:
    console = Console(highlight=False)
    head = Text(plain(f"{facts.run_dir}: "))
    head.append(verdict.state, style=COLORS.get(verdict.state, ""))
    console.print(head.append(plain(f": {verdict.text}")))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _rows(facts, verdict):
        table.add_row(Text(plain(name)), Text(plain(value)))
    console.print(table)
    if facts.attempts:
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
        for column in HEADINGS:
            table.add_column(column, justify="right" if column in ("restart", "ran") else "left", overflow="fold")
        for row in _attempts(facts):
            table.add_row(*map(Text, row))
        console.print(table)
    for line in _notes(facts, verdict):
        console.print(Text(plain(line), style="yellow" if line.startswith("warning: ") else ""))


def _attempts(facts: Facts) -> list[list[str]]:
    rows = [["...", "", "", "", "", "", f"{len(facts.attempts) - ROWS} before"]] if len(facts.attempts) > ROWS else []
    for one in facts.attempts[-ROWS:]:
        row = (one.job, str(one.restart), ",".join(one.nodes), moment(one.began), _ran(one), _steps(facts, one))
        rows.append([plain(word) for word in (*row, how(facts, one))])
    return rows


def _notes(facts: Facts, verdict: Verdict) -> list[str]:
    told = [f"warning: {line}" for line in warnings(facts)]
    return [*_events(facts), *told, *([line] if (line := _advice(facts, verdict)) else [])]


def _rows(facts: Facts, verdict: Verdict) -> list[tuple[str, str]]:
    rows = []
    if facts.steps:
        rows.append(("step", f"{facts.step:,} of {facts.steps:,} ({100 * facts.step / facts.steps:.1f} %)"))
    figures = [
        f"{name} {value:{form}}{unit}"
        for name, value, form, unit in (
            ("loss", facts.metrics.get("loss"), ".4f", ""),
            ("", facts.metrics.get("pairs_per_s"), ",.1f", " pairs/s"),
        )
        if isinstance(value, float) or number(value) is not None
    ]
    if figures:
        step = whole(facts.metrics.get("step"))
        rows.append(("last line", ", ".join(one.strip() for one in figures) + f" (step {step})"))
    if left := _left(facts) if not verdict.over else "":
        rows.append(("left", left))
    if saved := facts.checkpoint:
        verified = "verified" if saved.verified else "not verified"
        rows.append(("checkpoint", f"step {saved.step:,}, {since(facts.now, saved.written)}, {verified}"))
    for job in facts.jobs_in_queue:
        words = [job.state, job.reason if job.waits else "", f"on {job.nodes}" if job.nodes else ""]
        if job.waits and job.start:
            words.append(f"expected to start {moment(job.start)}")
        if job.runs and job.left_s is not None:
            words.append(f"{duration(job.left_s)} to its time limit")
        rows.append((f"job {job.job}", ", ".join(word for word in words if word)))
    return rows


def _left(facts: Facts) -> str:
    rest = remaining(facts)
    if rest.training_s is None:
        return ""
    text = f"{duration(rest.training_s)} of training"
    if rest.wall_s is not None and rest.waiting_frac is not None and rest.waiting_frac >= 0.01:
        text += f"; {duration(rest.wall_s)} with pauses as so far ({100 * rest.waiting_frac:.0f} % of the time)"
    return text + f"; done {moment(facts.now + (rest.wall_s or rest.training_s))}"


def _ran(attempt: Attempt) -> str:
    if attempt.ended is None:
        return ""
    # A clock that was set back.
    return duration(attempt.ended - attempt.began) if attempt.ended >= attempt.began else "?"


def _steps(facts: Facts, attempt: Attempt) -> str:
    to = attempt.end_step
    if to is None and facts.heartbeat and facts.heartbeat.key == attempt.key:
        to = facts.heartbeat.step
    return f"{attempt.step:,}" + ("" if to is None else f" to {to:,}") if attempt.trained else ""


def _events(facts: Facts) -> list[str]:
    told = []
    for host, kinds in faults_by_host(facts.faults, facts.attempts).items():
        what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        told.append(f"faults of {host or 'no known host'}: {what}")
    if facts.faults:
        told.append(f"last fault: {_first_line(facts.faults[-1].get('text'))}")
    if facts.guard:
        kinds = Counter(f"{event.get('kind')} ({event.get('action')})" for event in facts.guard)
        told.append("guard: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        last = facts.guard[-1]
        told.append(f"last guard event, step {last.get('step')}: {_first_line(last.get('text'))}")
    if slow := slow_host(facts.heartbeat):
        told.append(
            f"slow: rank {slow['rank']} (host {slow['host']}) works {slow['busy_s']:.3g} s a step outside of "
            f"collectives, the median rank {slow['median_s']:.3g} s"
        )
    return told


def _first_line(text: object) -> str:
    return (str(text or "").strip().splitlines() or [""])[0]


def _advice(facts: Facts, verdict: Verdict) -> str:
    run = shlex.quote(str(facts.run_dir))
    if verdict.state in ("stopped", "failed", "looks dead") and facts.steps:
        return f"go on: limoe train --resume {run}, or limoe submit --resume {run}"
    return ""


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`, `2 days 4 h`; `?` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    rest = max(0, round(seconds))
    if rest < 120:
        return f"{rest} s"
    if rest < 2 * 3600:
        return f"{rest // 60} min"
    if rest < 48 * 3600:
        return f"{rest // 3600} h {rest % 3600 // 60} min"
    return f"{rest // 86400} days {rest % 86400 // 3600} h"


def since(now: float, then: float) -> str:
    """`12 min ago`; for what lies in the future by a clock that was set, that."""
    return f"{duration(now - then)} ago" if then <= now + 1 else f"{duration(then - now)} in the future"


def moment(unix: float) -> str:
    """Local time."""
    try:
        return datetime.fromtimestamp(unix).strftime("%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "unknown"
