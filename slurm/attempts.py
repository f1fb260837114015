"""What the jobs of a run did: RUN/slurm/attempts.jsonl, and what follows from it about hosts and restarts.

Every start of a job is an attempt: it has a number of the job and of the restart. One line says that it began, one that
it ended; one that Slurm or a power cut ended is closed by the next, with the hosts that were lost.
Lines are never ordered by their times, only by their place: clocks jump, and differ between hosts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limoe_dist.config.exit_codes import GO_ON, GUARDED, INTERRUPTED, MEND, TERMINATED

ATTEMPTS, SUBMISSIONS, EXCLUDE = "slurm/attempts.jsonl", "slurm/submissions.jsonl", "slurm/exclude"
FAULTS, ENDED = "faults.jsonl", "ended.json"
FAILURES = 2
"""A host that failed in so many attempts of a run gets no more of them."""
MOST = 1 << 53
"""Above it no count and no time of a file is believed."""
Key = tuple[str, int]
"""Number of the job, number of its restart."""


@dataclass(frozen=True)
class Attempt:
    job: str
    restart: int
    nodes: tuple[str, ...]
    step: int
    """Of the newest checkpoint when it began."""
    began: float
    trained: bool = True
    """False: `limoe job begin` sent the job away."""
    mark: int | None = None
    """ended.json as it was when the attempt began: another mark later, and the attempt wrote it."""
    slurmd: tuple[tuple[str, float], ...] = ()
    """Since when the daemon of each node had been there."""
    boot: tuple[tuple[str, float], ...] = ()
    """Since when each node itself had."""
    action: str = ""
    """done, stop, requeue, resubmit, cancelled, preempted, end (for others to go on), lost; empty: it is open."""
    status: int | None = None
    ended: float | None = None
    end_step: int | None = None
    lost: tuple[str, ...] = ()
    why: str = ""

    @property
    def key(self) -> Key:
        return self.job, self.restart

    def __str__(self) -> str:
        return f"job {self.job}" + (f" restart {self.restart}" if self.restart else "")


@dataclass(frozen=True)
class Ended:
    """RUN/ended.json: how a run ended that ended by itself."""

    step: int
    status: int
    mark: int
    reason: str = ""


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a line that a power cut left half written is passed over, a missing file empty."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def append(path: Path, record: dict[str, Any]) -> None:
    """One line more, on disk when this returns; what a power cut left without its end stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        broken = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, (("\n" if broken else "") + json.dumps(record) + "\n").encode())
        os.fsync(file)
    finally:
        os.close(file)


def attempts(run_dir: Path) -> list[Attempt]:
    """All attempts of a run in the order in which they began."""
    found: list[Attempt] = []
    for line in lines(run_dir / ATTEMPTS):
        key = str(line.get("job", "")), whole(line.get("restart"))
        match line.get("event"):
            case "begin" | "skip":
                found.append(_begun(line, key))
            case "end" | "lost":
                here = next((i for i in reversed(range(len(found))) if found[i].key == key), None)
                # Whether it was preempted may be known only after it said that it was told to end.
                if here is not None and (not found[here].action or line.get("action") == "preempted"):
                    found[here] = _closed(found[here], line)
                elif here is not None and line["event"] == "lost":
                    found[here] = replace(found[here], lost=words(line.get("hosts")))
    return found


def _begun(line: dict[str, Any], key: Key) -> Attempt:
    mark = line.get("mark")
    return Attempt(
        job=key[0],
        restart=key[1],
        nodes=words(line.get("nodes")),
        step=whole(line.get("step")),
        began=number(line.get("time")) or 0.0,
        trained=line["event"] == "begin",
        mark=mark if isinstance(mark, int) else None,
        slurmd=_times(line.get("slurmd")),
        boot=_times(line.get("boot")),
        action=str(line.get("action", "")),
        why=str(line.get("why", "")),
    )


def _closed(attempt: Attempt, line: dict[str, Any]) -> Attempt:
    return replace(
        attempt,
        action="lost" if line["event"] == "lost" else str(line.get("action") or "end"),
        status=exit_status(line.get("status")),
        # A lost attempt ended at some time before its successor found out.
        ended=number(line.get("time")) if line["event"] == "end" else None,
        end_step=whole(line.get("step")) if "step" in line else None,
        lost=words(line.get("hosts")),
        why=str(line.get("why", "")),
    )


def whole(value: object) -> int:
    """A count from a file that anything may have written; 0 where it is none."""
    return value if isinstance(value, int) and 0 <= value <= MOST else 0


def number(value: object) -> float | None:
    """A time or a figure from such a file; None where it is none, or not finite."""
    return float(value) if isinstance(value, int | float) and abs(value) <= MOST else None


def exit_status(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value <= 255 else None


def _times(value: object) -> tuple[tuple[str, float], ...]:
    found = {name: number(time) for name, time in value.items()} if isinstance(value, dict) else {}
    return tuple((name, time) for name, time in found.items() if time is not None)


def words(value: object) -> tuple[str, ...]:
    return tuple(str(word) for word in value) if isinstance(value, list) else ()


def mark(run_dir: Path) -> int | None:
    """Changes whenever ended.json is written; None where there is none."""
    try:
        return (run_dir / ENDED).stat().st_mtime_ns
    except OSError:
        return None


def read_ended(run_dir: Path) -> Ended | None:
    """How the run ended; None where it was killed, or still runs."""
    try:
        content = json.loads((run_dir / ENDED).read_text(encoding="utf-8"))
        signal = whole(content.get("signal"))
        # Before there was a status, a signal told it.
        status = exit_status(content.get("status", 128 + signal if signal else 0))
    except (OSError, ValueError, AttributeError):
        return None
    if status is None or not isinstance(content.get("step"), int):
        return None
    return Ended(whole(content["step"]), status, mark(run_dir) or 0, str(content.get("reason") or ""))


def ended_by(attempt: Attempt, ended: Ended | None) -> Ended | None:
    """How the run ended in this attempt, and not in one before."""
    return None if ended is None or ended.mark == attempt.mark else ended


def family(past: Sequence[Attempt], submissions: Iterable[dict[str, Any]], job: str) -> set[str]:
    """The jobs that one submission led to: this one, its chain, and those that were submitted in place of each other.

    What a person submits anew is another family: it may try what failed before.
    """
    # A job that was submitted by another in its own place tells so: after.
    chains = [{*words(line.get("jobs")), *words([line["after"]] if line.get("after") else [])} for line in submissions]
    members, new = {job}, {job}
    while new:
        one = new.pop()
        near = set().union(*(chain for chain in chains if one in chain))
        # Where that could not be noted, the order tells.
        before = past[: next((i for i, attempt in enumerate(past) if attempt.job == one), len(past))]
        if not near and before and before[-1].action == "resubmit":
            near = {before[-1].job}
        new |= near - members
        members |= near
    return members


def failures(past: Sequence[Attempt], faults: Iterable[dict[str, Any]]) -> dict[str, set[Key]]:
    """The attempts in which each host failed, by its short name: it was lost, or a fault was laid to it."""
    found: dict[str, set[Key]] = {}
    for attempt in past:
        for host in attempt.lost:
            found.setdefault(short(host), set()).add(attempt.key)
    for fault in faults:
        for host in words(fault.get("hosts")):
            key = str(fault.get("job") or ""), whole(fault.get("restart"))
            found.setdefault(short(host), set()).add(key)
    return found


def short(host: str) -> str:
    """Slurm calls n1 what may call itself n1.cluster.example."""
    return host.partition(".")[0]


@dataclass(frozen=True)
class Exclusion:
    hosts: tuple[str, ...]
    """Failed too often: as Slurm calls them, worst first."""
    spared: tuple[str, ...]
    """Failed as often, but with them more than half of all nodes would be gone."""


def exclusion(past: Sequence[Attempt], faults: Iterable[dict[str, Any]], nodes: Sequence[str]) -> Exclusion:
    """Hosts that the run shall not get again; nodes: those of this job.

    Never more than half of the nodes that the run was given so far: where all fail, it is not the hosts.
    """
    given = {short(name): name for attempt in past for name in attempt.nodes} | {short(name): name for name in nodes}
    counts = failures(past, faults)
    bad = [host for host, keys in counts.items() if len(keys) >= FAILURES and host in given]
    bad.sort(key=lambda host: -len(counts[host]))
    room = len(given) // 2
    return Exclusion(tuple(given[host] for host in bad[:room]), tuple(given[host] for host in bad[room:]))


@dataclass(frozen=True)
class Idle:
    """The newest attempts of a family, in a row, that brought no new step."""

    counted: tuple[Attempt, ...]
    """Those that ended by themselves, or by a host that this job has again; oldest first."""
    total: int


def idle(past: Sequence[Attempt], faults: Iterable[dict[str, Any]], *, step: int, nodes: Sequence[str]) -> Idle:
    """past: of one family. step: that of the newest checkpoint now. nodes: of the job that is about to begin."""
    here, blamed = {short(name) for name in nodes}, failures(past, faults)
    counted: list[Attempt] = []
    after, total = step, 0
    for attempt in reversed(past):
        if not attempt.trained:
            continue
        if after > attempt.step:
            break
        after, total = attempt.step, total + 1
        hosts = {host for host, keys in blamed.items() if attempt.key in keys}
        wished = attempt.action in ("cancelled", "preempted", "lost", "") or attempt.status in (INTERRUPTED, TERMINATED)
        if not wished and not hosts - here:
            counted.append(attempt)
    return Idle(tuple(reversed(counted)), total)


def for_good(past: Sequence[Attempt], job: str) -> Attempt | None:
    """past: of one family. Its newest attempt, where a person has to decide before this job makes sense."""
    newest = next((attempt for attempt in reversed(past) if attempt.trained), None)
    if newest is None:
        return None
    # Saved and ended by a person's signal. Who put that very job into the queue again wished otherwise since.
    wished = newest.action == "stop" and newest.status in (INTERRUPTED, TERMINATED) and newest.job != job
    return newest if wished or newest.status in (MEND, GUARDED) else None


def worth_another(status: int) -> bool:
    """Whether starting again helps: the time was up, or something failed that may not fail again."""
    return status == GO_ON or status not in (0, MEND, GUARDED, INTERRUPTED, TERMINATED)
