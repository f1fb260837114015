"""One thread a rank that looks at the ranks' store: a rank that hangs, fails or dies ends all ranks within seconds.

The first rank that finds a fault raises the alarm, once for all ranks, and is the first to print. The others answer
what they are in, with their stacks, wait until that rank has told, and end with status 1.

    failed    an exception left the `with` of `watch`: its traceback
    broken    a collective raised, since another rank died or its connection broke: the error, and who is silent
    hang      a rank is in one collective for too long: a line for each rank, and the stacks
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch.distributed as dist

from limoe_dist.config.errors import UserError
from limoe_dist.parallel import flight_recorder
from limoe_dist.parallel.asking import Asked
from limoe_dist.parallel.fault import Fault, OnFault, blamed, describe, note, of_the_host, within
from limoe_dist.parallel.place import name_ranks
from limoe_dist.parallel.preflight import AHEAD_S, STORE_S, Meeting, wait_until
from limoe_dist.parallel.stacks import alike, innermost, stacks
from limoe_dist.parallel.telling import Answer, Finding, why_gone
from limoe_dist.parallel.traffic import Traffic

LOOK_S = 1.0
"""Between two looks into the store: one request a second and rank."""
MARK_S = 1.5
"""A rank whose connection broke first waits so long for the alarm of the one that failed."""
ANSWER_S = 4.0
"""What the others are in has to be here by then; a rank that lives answers within LOOK_S."""
TOLD_S = 12.0
"""The others wait so long at most for the rank that tells."""
LAST_S = 5.0
"""The rank that keeps the store waits so long for the others before it ends."""
BACKSTOP_S = 30.0
"""By then the thread has ended the process, or the main thread does."""
TOGETHER_S = 1.0
"""Where a launcher ends all ranks, the store is gone a moment before they are: that is no fault."""

ALARM, TOLD, LEFT = "alarm", "told", "left"


@dataclass(frozen=True)
class Alarm:
    kind: Literal["failed", "broken", "hang"]
    rank: int
    """Who found it, and tells it."""
    what: str
    """For the others' line: what that rank did."""


@dataclass(frozen=True)
class Failure:
    """Why this rank raises an alarm by itself."""

    alarm: Alarm
    trace: str
    """Empty where this rank shows its error by itself."""
    error: str
    """In a line."""
    of_the_host: bool = False
    """See fault.of_the_host."""


class Watchdog:
    """Watches one rank, which may be in one collective for limit_s seconds; limit_name: the setting that says so."""

    def __init__(
        self, meeting: Meeting, traffic: Traffic, *, limit_s: float, limit_name: str, on_fault: OnFault | None = None
    ) -> None:
        self._meeting, self._rank, self._hosts = meeting, meeting.rank, meeting.hosts
        self._store = Asked(meeting.store)
        self._traffic, self._on_fault = traffic, on_fault
        self.limit(limit_s, limit_name)
        self._failure: Failure | None = None
        self._wake, self._ended = threading.Event(), threading.Event()
        self._stopped, self._leaving = False, False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._second = threading.Thread(target=self._watch_the_store, name="watchdog of the store", daemon=True)

    def limit(self, seconds: float, name: str) -> None:
        """Another limit from now on."""
        self._limit_s, self._limit_name = seconds, name

    def start(self) -> None:
        self._thread.start()
        self._second.start()

    def leave(self) -> None:
        """This rank has done its part. The rank that keeps the store waits here for the others."""
        if self._meeting.kept_by == self._rank:
            self._all_left(self._limit_s)
            self.stop()
            return
        # The store may be gone as soon as its keeper knows that this rank needs it no more.
        self.stop()
        with suppress(dist.DistError):
            self._meeting.store.add(LEFT, 1)

    def leave_together(self, teller: int) -> None:
        """This rank leaves by an error that all ranks raise; `teller` tells it."""
        self._leaving = True
        self._all_left(LAST_S)
        self.stop()
        time.sleep(0 if self._rank == teller else AHEAD_S)

    def leave_early(self, what: str, *, others_s: float) -> None:
        """This rank leaves by an error that it shows itself; ranks that do not leave too in that time are ended.

        what: this rank did, for their line.
        """
        self._leaving = True
        if not self._all_left(others_s):
            self._failure = Failure(Alarm("failed", self._rank, what), "", what)
            self._wake.set()
            self._ended.wait(BACKSTOP_S)
        self.stop()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process, and with it all ranks, after the traceback of the error was printed, or its cause."""
        text = "".join(traceback.format_exception(_without_own_frames(error)))
        if isinstance(error, dist.DistError) or self._traffic.broke_with(error):
            alarm = Alarm("broken", self._rank, "lost a connection")
        else:
            alarm = Alarm("failed", self._rank, f"failed with {type(error).__name__}")
        self._failure = Failure(alarm, text, describe(error), of_the_host(error))
        self._wake.set()
        self._thread.join(BACKSTOP_S)
        self._end(f"{self._me()} failed:\n{text}")

    def _all_left(self, timeout_s: float) -> bool:
        with suppress(dist.DistError):
            self._meeting.store.add(LEFT, 1)
            return wait_until(lambda: self._meeting.store.add(LEFT, 0) == self._meeting.world, timeout_s)
        return True

    def stop(self) -> None:
        """Before the interpreter ends: a thread that comes back from C++ later would abort the process."""
        self._stopped = True
        self._wake.set()
        self._thread.join(BACKSTOP_S)

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._wake.wait(min(LOOK_S, self._limit_s / 2))
                self._wake.clear()
                if not self._stopped and (alarm := self._look() or self._find()) is not None:
                    self._answer_to(alarm)
        except dist.DistError:
            self._wake.wait(TOGETHER_S)
            if not (self._stopped or self._leaving):
                self._store_is_gone()
        finally:
            self._ended.set()

    def _watch_the_store(self) -> None:
        """Ends this rank where the first thread waits for an answer that does not come."""
        while not self._ended.wait(LOOK_S):
            if self._store.waits_s() > min(STORE_S, self._limit_s) and not (self._stopped or self._leaving):
                self._store_is_gone()

    def _look(self) -> Alarm | None:
        if not self._store.check([ALARM]):
            return None
        return Alarm(**json.loads(self._store.get(ALARM)))

    def _find(self) -> Alarm | None:
        """The alarm that this rank raises, or the one that another raised before it."""
        found = self._failure.alarm if self._failure else self._hang()
        if found is None:
            return None
        if found.kind == "broken" and wait_until(lambda: self._store.check([ALARM]), MARK_S):
            return self._look()
        raised = self._store.set_first(ALARM, json.dumps(asdict(found)))
        return Alarm(**json.loads(raised))

    def _hang(self) -> Alarm | None:
        standing = self._traffic.standing()
        if standing is None or not standing.inside or standing.seconds < self._limit_s:
            return None
        return Alarm("hang", self._rank, "found that ranks hang")

    def _answer_to(self, alarm: Alarm) -> None:
        self._store.set(f"answer/{self._rank}", json.dumps(asdict(self._answer())))
        if alarm.rank == self._rank:
            self._tell(alarm)
            self._store.set(TOLD, "")
            line = ""
        else:
            wait_until(lambda: self._store.check([TOLD]), TOLD_S)
            line = f"{self._me()} ends because {name_ranks([alarm.rank], self._hosts)} {alarm.what}"
        self._store.set(f"ended/{self._rank}", "")
        if self._meeting.kept_by == self._rank:
            self._await_end(alarm)
        if self._leaving:
            # The main thread has an error of its own to show, and ends the process.
            self._stopped = True
        else:
            self._end(line)

    def _await_end(self, alarm: Alarm) -> None:
        """The store ends with this rank: the others need it for their last look."""
        ranks = range(self._meeting.world)
        # After a hang or a death all that still live have answered; after a failure they are about to look.
        others = [rank for rank in ranks if alarm.kind == "failed" or self._store.check([f"answer/{rank}"])]
        wait_until(lambda: self._store.check([f"ended/{rank}" for rank in others]), LAST_S)

    def _tell(self, alarm: Alarm) -> None:
        failure = self._failure
        if alarm.kind == "failed":
            if failure is not None and failure.trace:
                _write(f"{self._me()} failed:\n{failure.trace}")
                text = f"{name_ranks([self._rank], self._hosts)} failed with {failure.error}"
                hosts = blamed([self._rank], self._hosts) if failure.of_the_host else ()
                note(self._on_fault, Fault("failed", (self._rank,), hosts, text))
            return
        if failure is None:
            cause, trace = f"no progress for {self._limit_name}={self._limit_s:g} seconds", ""
        else:
            cause, trace = failure.error, failure.trace
        finding = Finding(alarm.kind, self._rank, self._hosts, self._answers(), ANSWER_S, cause, trace)
        _write(finding.text())
        note(self._on_fault, finding.fault())

    def _answers(self) -> dict[int, Answer]:
        """What every rank that lives is in."""
        keys = [f"answer/{rank}" for rank in range(self._meeting.world)]
        wait_until(lambda: self._store.check(keys), ANSWER_S)
        there = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        return {rank: Answer(**json.loads(self._store.get(keys[rank]))) for rank in there}

    def _store_is_gone(self) -> None:
        """The rank that keeps it has died or stands still, or the launcher has: nobody can be asked any more."""
        keeper = self._meeting.kept_by
        owner = "the launcher" if keeper is None else name_ranks([keeper], self._hosts)
        found = why_gone(*self._meeting.at)
        line = f"{self._me()} ends because the store of {owner} is gone: {found.why}"
        if (failure := self._failure) is not None:
            if failure.alarm.kind == "failed":
                _write(f"{self._me()} failed:\n{failure.trace}")
            else:
                line += f" ({failure.error})"
        answer = self._answer()
        lines = [line, f"  {answer.line}"]
        if keeper is not None and self._rank == (keeper + 1) % self._meeting.world:
            lines += alike({self._rank: answer.stacks}, self._hosts)
        _write("\n".join(lines))
        ranks = () if keeper is None else (keeper,)
        hosts = blamed(ranks, self._hosts) if found.of_process else ()
        note(self._on_fault, Fault(found.kind, ranks, hosts, f"the store of {owner} is gone: {found.why}"))
        self._end("")

    def _answer(self) -> Answer:
        """What this rank is in or was in last, and where its Python stands."""
        standing, words, thread = self._traffic.standing(), "in no collective yet", None
        inside = standing is not None and standing.inside
        if standing is not None:
            call = f"{standing.op} over {standing.axis}, {standing.num_bytes} bytes, call {standing.number}"
            if self._failure is not None:
                words = f"{self._failure.alarm.what} in or after {call}"
            elif inside:
                words, thread = f"in {call}, for {standing.seconds:.1f} s", standing.thread
            else:
                words = f"outside of collectives for {standing.seconds:.1f} s, last in {call}"
        if self._failure is None:
            words += f"; at {innermost(thread or threading.main_thread().ident)}"
        recorded = within(1.0, flight_recorder.last_entry)
        words += f"; flight recorder: {recorded}" if recorded else ""
        return Answer(words, inside, stacks(thread))

    def _me(self) -> str:
        return f"limoe: {name_ranks([self._rank], self._hosts)}"

    def _end(self, line: str) -> NoReturn:
        if line:
            _write(line)
        # The main thread may be in the middle of a print, or stuck in C++: nothing here may wait for it.
        within(1.0, sys.stdout.flush)
        os._exit(1)


def _write(text: str) -> None:
    """In one piece, so that lines of ranks do not mix, and without Python's lock on the stream."""
    rest = f"{text.rstrip()}\n".encode()
    with suppress(OSError):
        while rest:
            rest = rest[os.write(2, rest) :]


@contextmanager
def watch(
    meeting: Meeting, traffic: Traffic, *, limit_s: float, limit_name: str, on_fault: OnFault | None = None
) -> Iterator[Watchdog]:
    """Watches this rank inside a `with`. An error that is none of UserError ends the process here, with status 1.

    on_fault: takes the fault on the rank that tells of it, from the watch's thread, before that rank ends.
    """
    watchdog = Watchdog(meeting, traffic, limit_s=limit_s, limit_name=limit_name, on_fault=on_fault)
    watchdog.start()
    try:
        yield watchdog
    except UserError as error:
        if error.told_by is None:
            watchdog.leave_early("ended with an error", others_s=LAST_S)
        else:
            watchdog.leave_together(error.told_by)
        raise
    except (KeyboardInterrupt, SystemExit):
        watchdog.leave_early("was interrupted", others_s=0.0)
        raise
    except Exception as error:
        watchdog.fail(error)
    else:
        watchdog.leave()
    finally:
        watchdog.stop()


def _without_own_frames(error: BaseException) -> BaseException:
    """The error as if the `with` statements around the run had not been there."""
    trace, own = error.__traceback__, (__file__, str(Path(__file__).with_name("bootstrap.py")), contextlib.__file__)
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    return error.with_traceback(trace)
