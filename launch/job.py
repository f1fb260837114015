"""`limoe job begin|end RUN`: what a job script asks before it trains and after, so that it knows how to go on.

Both work from the files of the run and the variables of the job. Slurm's commands tell more where they are there; in a
container they are not. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from launch.job_case import Case, look, someone_else, train_steps
from limoe_dist.checkpoint.contents import plain
from limoe_dist.config.errors import UserError, warn
from limoe_dist.config.exit_codes import DONE, FAILED, GO_ON, GUARDED, INTERRUPTED, MEND, TERMINATED
from limoe_dist.config.parse import write_atomically
from slurm import attempts as book
from slurm import scheduler
from slurm.attempts import Attempt
from slurm.losses import is_preempted, lost_hosts, since_when, what_happened

TRAIN, NOTHING_TO_DO, RESUBMIT, REQUEUE = 0, 10, 11, 12
"""What the job script does next: see BeginOptions and EndOptions."""
ANY_KIND = 5
"""So many times --idle-restarts starts in a row that brought nothing stop the run whatever ended them."""


@dataclass(frozen=True)
class BeginOptions:
    """Note that this job begins, and say whether it shall train.

    Exit status: 0 train. 10 nothing to do, the run is done. 11 a host that failed twice is among this job's: submit
    anew without those in RUN/slurm/exclude. 2 stop, and the reason is printed: another job trains
    there; an attempt of this job or chain ended with a setting to mend (2) or was stopped by a guard (3); a person
    ended the job before of this chain by a signal, which saved; or the last starts brought no new step.

    A start brought nothing where the newest checkpoint is no newer after it. It counts against --idle-restarts unless
    it was cancelled, preempted, stopped by a person's signal, lost with a node or in a power cut, or failed by a host
    that this job does not have. 5 times as many in a row stop the run whatever ended them.

    What a person submits anew counts from zero, and may try again what was stopped.
    """

    run: tyro.conf.Positional[str]
    """Directory of the run; it may not be there yet."""
    idle_restarts: int = 2
    """Stop when so many starts in a row brought no new step; 0: never."""
    wait: float = 60.0
    """Seconds that what is left of an attempt before may take to go away."""


@dataclass(frozen=True)
class EndOptions:
    """Note how training ended, and say what becomes of the job.

    Exit status: 12 requeue it. 11 submit it anew without the hosts in RUN/slurm/exclude. Anything else is the status
    that the job ends with, that of training: 0 done, 1 failed, 2 a setting to mend, 3 stopped by a guard, 75 the time
    was up, 130 or 143 stopped by a person and saved.

    12 and 11 come only with --requeue, and where another start may help: after 1, 75, ranks that were killed, and 130
    or 143 of a job that Slurm preempts; not where the last starts brought no new step.
    What training wrote into RUN/ended.json tells better than srun, which ends with 143 where one rank failed and it
    terminated the others.
    """

    run: tyro.conf.Positional[str]
    """Directory of the run."""
    status: int
    """What srun ended with."""
    cancelled: tyro.conf.FlagCreatePairsOff[bool] = False
    """The script itself received SIGTERM: scancel, preemption or the time limit. Slurm or a person decides."""
    requeue: tyro.conf.FlagCreatePairsOff[bool] = False
    """The job was submitted to start again by itself."""
    idle_restarts: int = 2
    """As for `limoe job begin`: a start that would be refused is not asked for."""


COMMANDS: dict[str, Callable[..., BeginOptions | EndOptions]] = {"begin": BeginOptions, "end": EndOptions}


@dataclass(frozen=True)
class Verdict:
    status: int
    action: str
    why: str


def main(argv: list[str]) -> int:
    """Runs `limoe job`; returns its exit status. Lets UserError pass."""
    try:
        options = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="limoe job",
            description="What a job script asks; the script of `limoe submit` does. docs/slurm.md tells more.",
            args=argv or ["--help"],
        )
    except SystemExit as stop:
        return 2 if not argv else stop.code if isinstance(stop.code, int) else 2
    case = look(Path(options.run), os.environ)
    verdict = begin(case, options) if isinstance(options, BeginOptions) else end(case, options)
    if verdict.why:
        print(plain(f"limoe: job {case.job.number}: {verdict.why}"), flush=True)
    return verdict.status


def begin(case: Case, options: BeginOptions) -> Verdict:
    """Whether this job shall train. Raises UserError where it must stop."""
    steps = train_steps(case.run_dir)
    if case.ended and steps and case.ended.status == DONE and case.ended.step >= steps:
        return _sent_away(case, Verdict(NOTHING_TO_DO, "done", f"the run is done, at step {case.ended.step:,}"))
    if owner := someone_else(case, patience_s=options.wait):
        raise _stop(case, f"{case.run_dir} is in use: {owner}")
    _close_open_attempt(case)
    if problem := _stopped(case) or _going_round(case, options.idle_restarts):
        raise _stop(case, problem)
    if bad := _exclude(case):
        names = ", ".join(bad)
        # Never twice in a row: should the exclusion not work, jobs would send each other for ever.
        sent = bool(case.past) and not case.past[-1].trained and case.past[-1].action == "resubmit"
        if not sent and case.chain[-1:] != [case.job.number]:
            return _sent_away(case, Verdict(RESUBMIT, "resubmit", f"{names} failed before: submitting without"))
        warn(f"{names} failed {book.FAILURES} times in this run, and is among the nodes of this job")
    known = scheduler.known(lambda: scheduler.nodes([case.job.node_list] if case.job.nodes else []))
    since = since_when(known or {})
    case.note("begin", nodes=list(case.job.nodes), step=case.step, mark=book.mark(case.run_dir), **since)
    return Verdict(TRAIN, "train", "")


def _sent_away(case: Case, verdict: Verdict) -> Verdict:
    nodes = list(case.job.nodes)
    case.note("skip", nodes=nodes, step=case.step, status=verdict.status, action=verdict.action, why=verdict.why)
    return verdict


def _stop(case: Case, why: str) -> UserError:
    _sent_away(case, Verdict(MEND, "stop", why))
    return UserError(f"job {case.job.number}: {why}")


def _close_open_attempt(case: Case) -> None:
    """Finds out what became of the attempt before, where it could not say so itself."""
    before = next((attempt for attempt in reversed(case.past) if attempt.trained), None)
    if before is None or before.key == case.job.key:
        return
    if not before.action:
        hosts, why = what_happened(before) if before in case.family else ([], "ended without a word")
        ended = book.ended_by(before, case.ended)
        _note_lost(case, before, hosts, why, **({"status": ended.status} if ended else {}))
    # Slurm started the job again, and not every time its script lived to see that a node was gone.
    elif before.action == "cancelled" and before.job == case.job.number and not before.lost:
        hosts, why = what_happened(before)
        if hosts:
            _note_lost(case, before, hosts, why)


def _note_lost(case: Case, attempt: Attempt, hosts: list[str], why: str, **facts: object) -> None:
    case.note("lost", job=attempt.job, restart=attempt.restart, hosts=hosts, why=why, step=case.step, **facts)
    case.past = book.attempts(case.run_dir) or case.past
    if hosts:
        print(plain(f"limoe: {attempt}: {why}"), flush=True)


def _stopped(case: Case) -> str:
    """Why a person has to look first; empty: nobody has to."""
    stopped = book.for_good(case.family, case.job.number)
    if stopped is None:
        return ""
    again = f"then submit again: limoe submit --resume {case.run_dir}"
    if stopped.status == GUARDED:
        return f"{stopped} was stopped by a guard at step {stopped.end_step}: see {case.run_dir}/guard.jsonl, {again}"
    if stopped.status != MEND:
        return f"{stopped} was stopped by a person's signal at step {stopped.end_step}: to go on, {again[5:]}"
    reason = case.ended.reason.splitlines()[0] if case.ended and case.ended.reason else ""
    what = f"a setting or file to mend ({reason})" if reason else "a setting or file to mend"
    return f"{stopped} ended with {what}: see its log in {case.run_dir}/slurm; mend it, {again}"


def _going_round(case: Case, limit: int) -> str:
    """Why starting again does not help; empty: it may."""
    idle = book.idle(case.family, case.faults, step=case.step, nodes=case.job.nodes)
    if not limit or (len(idle.counted) < limit and idle.total < ANY_KIND * limit):
        return ""
    first = f"the last {idle.total} starts, whatever ended them,"
    if len(idle.counted) >= limit:
        hosts = sorted({name for attempt in idle.counted for name in attempt.nodes})
        names = ", ".join(str(attempt) for attempt in idle.counted)
        first = f"the last {len(idle.counted)} starts that counted ({names}; on {', '.join(hosts)})"
    fault = f"; the last fault: {case.faults[-1].get('text', '')}" if case.faults else ""
    return (
        f"no new step between two restarts: {first} left the newest checkpoint at step {case.step:,}{fault}; "
        f"see the logs in {case.run_dir}/slurm, then submit again: limoe submit --resume {case.run_dir}"
    )


def _exclude(case: Case) -> list[str]:
    """Writes RUN/slurm/exclude; returns the nodes of this job that are in it."""
    found = book.exclusion(case.past, case.faults, case.job.nodes)
    path = case.run_dir / book.EXCLUDE
    if found.spared:
        warn(
            f"{', '.join(found.spared)} failed {book.FAILURES} times too, but without it more than half of the nodes "
            "that this run had would be excluded: it is kept"
        )
    try:
        if found.hosts:
            write_atomically(path, ",".join(found.hosts) + "\n")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        warn(f"{path}: cannot be written: {error.strerror}; no host is excluded")
        return []
    return [name for name in case.job.nodes if name in found.hosts]


def end(case: Case, options: EndOptions) -> Verdict:
    status = _true_status(case, options.status)
    verdict = _end(case, status, options)
    # First of all: a job that was told to end has some seconds.
    case.note("end", status=status, step=case.step, action=verdict.action, why=verdict.why)
    mine = case.this_attempt
    if verdict.action == "cancelled" and mine is not None:
        if is_preempted(case.job.number):
            case.note("end", status=status, step=case.step, action="preempted", why="preempted by another job")
        # Of several nobody can tell whether they were lost before it was told to end.
        elif len(lost := lost_hosts(mine) or []) == 1:
            _note_lost(case, mine, lost, f"lost {lost[0]}")
            _exclude(case)
    return verdict


def _true_status(case: Case, srun: int) -> int:
    """That of training: from ended.json, where this attempt wrote it, else from srun's."""
    mine = case.this_attempt
    if case.ended and (mine is None or book.ended_by(mine, case.ended)):
        return case.ended.status
    # Without a word of the run itself nobody saved: one rank failed, and srun terminated the others.
    return FAILED if srun in (INTERRUPTED, TERMINATED) or srun > 128 else srun


def _end(case: Case, status: int, options: EndOptions) -> Verdict:
    """What becomes of the job, with the status that it ends with."""
    bad = _exclude(case)
    if options.cancelled:
        return Verdict(
            status,
            "cancelled",
            "told to end by scancel, preemption, the time limit or a lost node: Slurm decides how it goes on",
        )
    # During the grace period of a preemption Slurm sends SIGTERM to the ranks alone, as a person would.
    if status not in (DONE, MEND, GUARDED) and is_preempted(case.job.number):
        again = f"; requeueing from step {case.step:,}" if options.requeue else ""
        return Verdict(REQUEUE if options.requeue else status, "preempted", f"preempted by another job{again}")
    if not book.worth_another(status):
        return Verdict(status, "done" if status == DONE else "stop", "")
    what = "its time is up" if status == GO_ON else f"training ended with status {options.status}"
    if not options.requeue:
        return _in_chain(case, Verdict(status, "end", what), bad)
    if (mine := case.this_attempt) is not None:
        closed = replace(mine, action="requeue", status=status)
        after = [closed if attempt is mine else attempt for attempt in case.past]
        rest = tuple(name for name in case.job.nodes if name not in bad)
        then = replace(case, past=after, job=replace(case.job, nodes=rest))
        if problem := _going_round(then, options.idle_restarts):
            return Verdict(status, "stop", f"{what}; it is not started again: {problem}")
    if bad:
        names = ", ".join(bad)
        return Verdict(RESUBMIT, "resubmit", f"{what}; {names} failed {book.FAILURES} times: submitting without")
    return Verdict(REQUEUE, "requeue", f"{what}; requeueing from step {case.step:,}")


def _in_chain(case: Case, verdict: Verdict, bad: list[str]) -> Verdict:
    """The next job of a chain goes on by itself; it only has to be told of hosts that it shall not get."""
    if bad and case.chain and case.chain[-1] != case.job.number:
        names = f"{', '.join(bad)} failed {book.FAILURES} times"
        return Verdict(RESUBMIT, "resubmit", f"{verdict.why}; {names}: the next job does without")
    return verdict
