"""A run that is killed, or whose disk fails, again and again: what it went on from, and whether its bits are right."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from limoe_dist.config.schema import Checkpoint, Data, Log, Parallel, Run
from tests.support.cases import small_run
from tests.support.faults import DIVISIBLE, ERRORS, KILLS, Fault, How, Point
from tests.support.mortal_ranks import Kill, Life, Lived
from tests.support.undisturbed import Undisturbed, newest_whole

Live = Callable[[Life], Lived]
WHO = ((0,), (1,), (0, 1))
"""Ranks that a random kill may hit."""


def frequent_run(data: Path, *, steps: int, keep_all: bool = False) -> Run:
    """Two small ranks with the experts cut between them that save after every step; keep_all: else only one is kept.

    One that is kept is the hardest case: nothing older is there to fall back to.
    """
    run = small_run("fp32", steps=steps)
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"depth": 2}),
            "moe": run.moe.model_copy(update={"blocks": (1,)}),
            "data": Data(manifest=str(data)),
            "parallel": Parallel(ep=2),
            "checkpoint": Checkpoint(every_steps=1, keep=1, keep_every=1 if keep_all else 0),
            "log": Log(every_steps=1, tensorboard=False),
        }
    )


def write_points(live: Live, run: Run, out: Path) -> list[Point]:
    """What a save does that finds an older checkpoint, which it removes: rank by rank, in order."""
    lived = live(Life(run, out, until=3))
    return [passed.point for passed in lived.passed if passed.step == 2]


def undisturbed_run(live: Live, run: Run, out: Path) -> Undisturbed:
    lived = live(Life(run, out, until=run.train.steps))
    assert set(lived.statuses) == {0}, lived.printed
    return Undisturbed(out)


@dataclass(frozen=True)
class Death:
    """A kill, and what was found then."""

    where: str
    """The point and its rank, or the ranks of a random kill."""
    stage: str
    newest: int
    """The newest whole checkpoint, which the next life goes on from; 0: none yet."""


class Victim:
    """A run in `out`, over all its lives."""

    def __init__(self, live: Live, run: Run, out: Path, undisturbed: Undisturbed) -> None:
        self.run, self.out, self.undisturbed = run, out, undisturbed
        self.newest = 0
        """The newest whole checkpoint that stands."""
        self.differences: list[str] = []
        """What is not as if nothing had happened."""
        self._live, self._promised = live, 0

    def live(self, *, until: int, faults: Sequence[Fault] = (), kill: Kill | None = None) -> Lived:
        """One more start of the run: to the step `until`, or to its death."""
        lived = self._live(Life(self.run, self.out, until, tuple(faults), kill))
        if lived.began_at not in (None, self.newest):
            self.differences.append(f"{self.out} went on from step {lived.began_at}, not from {self.newest}")
        if not lived.killed and set(lived.statuses) != {0}:
            self.differences.append(f"{self.out} ended with {lived.statuses}:\n{lived.printed}")
        met = {(passed.step, passed.point) for passed in lived.passed}
        self.differences += [f"{fault} was not met" for fault in faults if (fault.step, fault.point) not in met]
        self._promised = max(self._promised, lived.promised)
        self.differences += self.undisturbed.differences(self.out, at_least=self._promised)
        self.newest = newest_whole(self.out)
        return lived

    def die(self, where: str, *, until: int, faults: Sequence[Fault] = (), kill: Kill | None = None) -> Death | None:
        """A life that is to be killed; None where it ended before."""
        before = set(_names(self.out))
        lived = self.live(until=until, faults=faults, kill=kill)
        if not lived.killed:
            return None
        return Death(where, stage_at_death(self.out, before), self.newest)

    def finish(self, until: int) -> None:
        """The last life, which nobody disturbs."""
        self.live(until=until)
        self.differences += self.undisturbed.differences_at_the_end(self.out, until)


def _names(out: Path) -> list[str]:
    folder = out / "checkpoints"
    return os.listdir(folder) if folder.exists() else []


def stage_at_death(out: Path, before: set[str]) -> str:
    """Which stage of a save was under way, by what it left; `before`: the names beside it when the life began."""
    new = [name for name in _names(out) if name not in before]
    for name in new:
        if name.startswith(".removing-"):
            return "retire"
        if name.startswith(".saving-"):
            return "commit" if (out / "checkpoints" / name / "state.json").exists() else "write"
    steps = sorted(name for name in _names(out) if name.startswith("step-"))
    if not steps or steps[-1] in before:
        return "before its first save"
    if not (out / "checkpoints" / steps[-1] / "verified").exists():
        return "read back"
    return "retire" if len(steps) > 1 else "between saves"


def deaths_at_points(points: Sequence[Point], hows: Sequence[How] = KILLS) -> list[tuple[Point, How]]:
    """Every way to be killed at every point; those that have no middle are not killed there."""
    return [(point, how) for point in points for how in hows if how != "within" or point.operation in DIVISIBLE]


def killed_at_points(victim: Victim, deaths: Sequence[tuple[Point, How]]) -> Iterator[Death]:
    """Each life saves once, which shows that it went on well, and dies in its second save."""
    for point, how in deaths:
        fault = Fault(point, victim.newest + 2, how)
        where = f"{how} {point.name} of rank {point.rank}"
        death = victim.die(where, until=fault.step + 1, faults=[fault])
        if victim.newest < fault.step - 1:
            victim.differences.append(f"{where}: the save before failed, of step {fault.step - 1}")
        if death is not None:
            yield death
    victim.finish(victim.newest + 2)


def killed_at_random(
    live: Live,
    run: Run,
    folder: Path,
    undisturbed: Undisturbed,
    *,
    kills: int,
    until: int,
    chance: random.Random,
    who: Sequence[tuple[int, ...]] = WHO,
) -> Iterator[tuple[Victim, Death | None]]:
    """Runs to the step `until` that are killed at moments of chance until they are done; the last one is left to end.

    The moments of each life are as likely between its start and the seconds that a whole run takes. Yields each kill,
    and None where a run has ended.
    """
    whole_s = live(Life(run, folder / "timed", until)).seconds
    runs = 0
    while kills:
        victim = Victim(live, run, folder / f"run-{runs:03d}", undisturbed)
        runs += 1
        while kills:
            kill = Kill(chance.uniform(0, whole_s), chance.choice(who))
            death = victim.die(" and ".join(f"rank {rank}" for rank in kill.ranks), until=until, kill=kill)
            if death is None:
                break
            kills -= 1
            yield victim, death
        victim.finish(until)
        yield victim, None


def failed_at_points(victim: Victim, points: Sequence[Point]) -> list[Fault]:
    """One life in which saves meet one error after the other at each point in turn; the next save must succeed."""
    period = len(ERRORS) + 1
    faults = [
        Fault(point, 3 + period * number + place, how)
        for number, point in enumerate(points)
        for place, how in enumerate(ERRORS)
    ]
    last = faults[-1].step + 1
    lived = victim.live(until=last, faults=faults)
    victim.differences += victim.undisturbed.differences_at_the_end(victim.out, last)
    for begun in lived.passed:
        if begun.point.operation == "make_folder" and begun.step > 1:
            # Steps 2, 5, 8 and so on succeed; one that fails after it has given a checkpoint its name may leave it.
            last_good = begun.step - 1 - (begun.step - 3) % period
            if begun.newest < last_good:
                victim.differences.append(f"when step {begun.step} was saved, the newest whole was {begun.newest}")
    # What cannot be removed is told too: the new checkpoint is whole then.
    warnings = ("limoe: warning: a checkpoint ", "limoe: warning: old checkpoints stay: ")
    told = [line for line in lived.printed.splitlines() if line.startswith(warnings)]
    # A mark that could not be made is no loss: the checkpoint is whole, and is verified again when it is read.
    wanted = [os.strerror(getattr(errno, fault.how)) for fault in faults if not fault.point.name.endswith("verified")]
    if len(told) != len(wanted) or any(error not in line for error, line in zip(wanted, told, strict=True)):
        victim.differences.append(f"{len(wanted)} saves failed, and these warnings were shown: {told}")
    return faults
