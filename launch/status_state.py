"""What follows from the files of a run and from Slurm: its state, how its attempts ended, when it will be done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from launch.status_facts import Facts, Heartbeat
from slurm import attempts as book
from slurm.attempts import Attempt, Ended
from slurm.scheduler import Queued

State = Literal[
    "queued", "starting", "training", "evaluating", "saving", "stopped", "guarded", "done", "failed", "looks dead"
]
PHASES: dict[str, State] = {"start": "starting", "train": "training", "evaluate": "evaluating", "save": "saving"}
START_S = 1800.0
"""A job that has sent no heartbeat for so long after it began does not come any more, where Slurm cannot tell."""
FRESH_S = 30.0


@dataclass(frozen=True)
class Verdict:
    state: State
    text: str
    """A sentence."""

    @property
    def exit_status(self) -> int:
        return {"failed": 1, "looks dead": 1, "guarded": 3}.get(self.state, 0)

    @property
    def over(self) -> bool:
        """Whether nothing more comes by itself."""
        return self.state in ("stopped", "guarded", "done", "failed", "looks dead")


def judge(facts: Facts) -> Verdict:
    """The state of a run. What Slurm says goes before what the files say: files stay as they were when a host dies."""
    running = [job for job in facts.jobs_in_queue if job.runs]
    if is_done(facts) and not running:
        return Verdict("done", f"all {facts.steps:,} steps are done")
    if running:
        return _running(facts, running[0])
    if waiting := [job for job in facts.jobs_in_queue if job.waits]:
        job = min(waiting, key=lambda one: (one.reason == "Dependency", one.job))
        return Verdict("queued", f"job {job.job} waits" + (f" ({job.reason})" if job.reason else ""))
    alive = facts.heartbeat is not None and not facts.heartbeat.stale and facts.ended is None
    # Where Slurm knows no such job any more, its last heartbeat proves nothing.
    if alive and (facts.trained_by or not _gone(facts)):
        return _phase(facts)
    if facts.trained_by and not (facts.heartbeat and facts.heartbeat.stale):
        return Verdict("starting", f"{facts.trained_by} has the run")
    return _over(facts)


def is_done(facts: Facts) -> bool:
    ended = facts.ended
    return ended is not None and facts.steps is not None and ended.status == 0 and ended.step >= facts.steps


def _gone(facts: Facts) -> bool:
    beat = facts.heartbeat
    newest = next((attempt for attempt in reversed(facts.attempts) if attempt.trained), None)
    if beat is None or not beat.key[0]:
        return False
    closed = newest is not None and newest.key == beat.key and bool(newest.action)
    # A heartbeat of just now wins: this may be a login node of another cluster.
    return closed or (facts.queued is not None and beat.age_s > FRESH_S)


def _running(facts: Facts, job: Queued) -> Verdict:
    newest = next((one for one in reversed(facts.attempts) if one.job == job.job and one.trained), None)
    beat = facts.heartbeat
    mine = beat is not None and beat.key[0] == job.job and (newest is None or newest.key == beat.key)
    if beat is None or not mine:
        return Verdict("starting", f"job {job.job} is {job.state} on {job.nodes}; no heartbeat of it yet")
    if job.state == "COMPLETING" or (facts.ended and newest and book.ended_by(newest, facts.ended)):
        return Verdict("saving", f"job {job.job} comes to its end")
    if beat.stale:
        return Verdict(
            "looks dead",
            f"no heartbeat for {beat.age_s:.0f} s, in phase {beat.phase}, though job {job.job} is {job.state}: it "
            "hangs, or its directory cannot be written",
        )
    return _phase(facts)


def _phase(facts: Facts) -> Verdict:
    beat = facts.heartbeat
    assert beat is not None
    of = f" of job {beat.key[0]}" if beat.key[0] else ""
    ranks = f"{len(beat.hosts)} rank{'s' if len(beat.hosts) != 1 else ''}{of}"
    return Verdict(PHASES.get(beat.phase, "training"), f"{ranks}, heartbeat {beat.age_s:.0f} s ago")


def _over(facts: Facts) -> Verdict:
    """Nobody trains, as far as anybody can tell."""
    name: State
    last = facts.attempts[-1] if facts.attempts else None
    if last is not None and last.action in ("requeue", "resubmit") and facts.queued is None:
        return Verdict("queued", f"{last}: {how(facts, last)}; Slurm is not here to ask how it goes on")
    if last is not None and last.action == "resubmit":
        return Verdict("failed", f"{last} {_no_successor(facts, last)}")
    if facts.ended is not None:
        return _ended(facts, facts.ended)
    if last is not None and not last.trained and last.action == "stop":
        return Verdict("failed", f"{last} did not train: {last.why}")
    newest = next((attempt for attempt in reversed(facts.attempts) if attempt.trained), None)
    if newest is not None and newest.action:
        name = "stopped" if newest.action == "cancelled" or newest.status in (0, 75, 130, 143) else "failed"
        text = newest.why if newest.action == "stop" and newest.why else how(facts, newest)
        return Verdict("guarded" if newest.status == 3 else name, f"{newest}: {text}")
    if newest is not None and facts.queued is not None:
        return Verdict("failed", f"{newest}: {how(facts, newest)}; nothing of it is in the queue")
    if newest is not None and (facts.heartbeat is None or facts.heartbeat.key != newest.key):
        age = max(0.0, facts.now - newest.began)
        name = "starting" if age < START_S else "looks dead"
        return Verdict(name, f"{newest} began {age:.0f} s ago and has sent no heartbeat; Slurm is not here to ask")
    if facts.heartbeat is not None:
        return Verdict(
            "looks dead", f"no heartbeat for {facts.heartbeat.age_s:.0f} s, in phase {facts.heartbeat.phase}"
        )
    if facts.submissions and not facts.attempts:
        jobs = ", ".join(book.words(facts.submissions[-1].get("jobs")))
        if facts.queued is None:
            return Verdict("queued", f"job {jobs} was submitted; Slurm is not here to ask")
        return Verdict("failed", f"job {jobs} has left the queue without a sign of it here; `sacct -j {jobs}` may tell")
    return Verdict("stopped", "nobody trains, and nothing says how the last start ended")


def _no_successor(facts: Facts, attempt: Attempt) -> str:
    """The last attempt asked for another job in its place, and none is in the queue."""
    jobs = [
        job for line in facts.submissions if line.get("after") == attempt.job for job in book.words(line.get("jobs"))
    ]
    if jobs:
        return f"was to be followed by job {jobs[-1]}, which has left the queue without a sign of it here"
    return f"wanted to be submitted anew ({attempt.why}), but no job came in its place: see its log"


def _ended(facts: Facts, ended: Ended) -> Verdict:
    reason = ended.reason.strip().splitlines()
    why = f": {reason[0]}" if reason else ""
    match ended.status:
        case 0:
            return Verdict("stopped", f"at step {ended.step:,}, as it was told to (--stop-after)")
        case 75:
            return Verdict("stopped", f"at step {ended.step:,}: the time of the job was up; saved, to be gone on with")
        case 130 | 143:
            return Verdict(
                "stopped", f"at step {ended.step:,} by {'Ctrl-C' if ended.status == 130 else 'SIGTERM'}; saved"
            )
        case 3:
            last = facts.guard[-1].get("text", "") if facts.guard else ""
            return Verdict("guarded", f"at step {ended.step:,}{why or f': {last}'}")
        case 2:
            return Verdict("failed", f"at step {ended.step:,}, with a setting or file to mend{why}")
    return Verdict("failed", f"at step {ended.step:,} with status {ended.status}{why}")


def how(facts: Facts, attempt: Attempt) -> str:
    """How an attempt ended."""
    entries = [entry for entry in facts.history if entry.job == attempt.job]
    state = entries[attempt.restart].state.lower() if len(entries) > attempt.restart else ""
    lost = f"lost {', '.join(attempt.lost)}" if attempt.lost else ""
    match attempt.action:
        case "":
            here = (facts.queued or {}).get(attempt.job)
            newest = [one for one in facts.attempts if one.job == attempt.job][-1]
            if here is not None and here.runs and attempt is newest:
                return "runs"
            return f"ended without a word{f' ({state})' if state else ''}" if facts.queued is not None else "not known"
        case "lost":
            return lost or (f"ended by Slurm ({state})" if state else attempt.why)
        case "done":
            return "done"
        case "preempted":
            return "preempted" + (", requeued" if _went_on(facts, attempt) else "")
        case "cancelled":
            return lost or f"ended by Slurm{f' ({state})' if state else ' or a person'}"
    if not attempt.trained:
        return f"did not train: {attempt.why}"
    meaning = {75: "time was up", 1: "failed", 2: "setting to mend", 3: "guard", 130: "Ctrl-C", 143: "SIGTERM"}
    what = meaning.get(attempt.status or 0, f"status {attempt.status}")
    next_step = {"requeue": ", requeued", "resubmit": ", submitted anew", "stop": ", stopped"}
    if not _went_on(facts, attempt):
        # It asked for it; whether Slurm obeyed is not to be seen.
        next_step |= {"requeue": ", wanted to be requeued", "resubmit": ", wanted to be submitted anew"}
    return what + next_step.get(attempt.action, "") + (f"; {lost}" if lost else "")


def _went_on(facts: Facts, attempt: Attempt) -> bool:
    """Whether something came after it: another attempt, or a job that is in the queue."""
    return attempt is not facts.attempts[-1] or bool(facts.jobs_in_queue)


@dataclass(frozen=True)
class Remaining:
    training_s: float | None
    """At the pace of the last log lines; None where there is none yet."""
    waiting_frac: float | None
    """Of the time between the first begin and the last, the part in which no attempt ran; None: nothing to tell by."""

    @property
    def wall_s(self) -> float | None:
        if self.training_s is None or self.waiting_frac is None:
            return None
        return self.training_s / (1 - self.waiting_frac)


def remaining(facts: Facts) -> Remaining:
    steps = facts.steps or (facts.heartbeat.steps if facts.heartbeat else 0)
    pace = facts.heartbeat.seconds_per_step if facts.heartbeat else None
    pace = pace if pace is not None else book.number(facts.metrics.get("seconds_per_step"))
    training = max(0, steps - facts.step) * pace if pace and pace > 0 and steps else None
    return Remaining(training, waiting_frac(facts.attempts, facts.submissions))


def waiting_frac(attempts: Sequence[Attempt], submissions: Sequence[dict[str, Any]]) -> float | None:
    """Of one submission: pauses between an attempt that said when it ended and the next one, over all that is known.

    Differences that a jump of the clock made negative are taken as none.
    """
    trained = [attempt for attempt in attempts if attempt.trained]
    if not trained:
        return None
    members = book.family(attempts, submissions, trained[-1].job)
    own = [attempt for attempt in trained if attempt.job in members]
    ran = sum(max(0.0, one.ended - one.began) for one in own if one.ended is not None)
    pauses = [max(0.0, after.began - one.ended) for one, after in pairwise(own) if one.ended is not None]
    return sum(pauses) / (sum(pauses) + ran) if pauses and ran else None


def slow_host(beat: Heartbeat | None, *, factor: float = 1.5) -> dict[str, Any] | None:
    """The rank that works longest between collectives, where it takes `factor` times the median or more."""
    if beat is None or len(beat.busy_s) < 2 or len(beat.hosts) != len(beat.busy_s):
        return None
    middle = sorted(beat.busy_s)[(len(beat.busy_s) - 1) // 2]
    rank = max(range(len(beat.busy_s)), key=beat.busy_s.__getitem__)
    if not middle or beat.busy_s[rank] < factor * middle:
        return None
    return {"rank": rank, "host": beat.hosts[rank], "busy_s": beat.busy_s[rank], "median_s": middle}


def faults_by_host(faults: Sequence[dict[str, Any]], attempts: Sequence[Attempt]) -> dict[str, Counter[str]]:
    """How often each host was to blame, by kind; under "" what no host was blamed for."""
    found: dict[str, Counter[str]] = {}
    for fault in faults:
        for host in book.words(fault.get("hosts")) or ("",):
            found.setdefault(book.short(host), Counter())[str(fault.get("kind", "fault"))] += 1
    for attempt in attempts:
        for host in attempt.lost:
            found.setdefault(book.short(host), Counter())["lost"] += 1
    return found


def warnings(facts: Facts) -> list[str]:
    told = list(facts.warnings)
    if facts.heartbeat and facts.heartbeat.ahead_s:
        told.append(
            f"the heartbeat is {facts.heartbeat.ahead_s:.0f} s in the future: a clock was set, or that of rank 0's "
            "host and of this one differ; its age is told by the file's date"
        )
    if facts.checkpoint is None and facts.step:
        told.append("there is no checkpoint yet: what is done now would be lost")
    if facts.excluded:
        told.append(f"{', '.join(facts.excluded)} failed {book.FAILURES} times: excluded (RUN/slurm/exclude)")
    return told
