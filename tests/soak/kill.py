"""A run of two ranks that saves after every step, killed at chance and at every write point, and on a failing disk.

python -m tests.soak.kill --out docs/measured/soak_kill.json

After every death: each directory that has a checkpoint's name is whole and holds the bits of a run that nobody
disturbed, the newest is no older than the run had told, and the next start goes on from it. At the end of each run its
weights, its optimizer, its losses and what it read are those of the undisturbed run, bit for bit.

points     one life for each point of a save and each way to die there: before, in the middle of, after the operation
errors     one life in which saves meet ENOSPC and EIO at each point in turn: it goes on, warns, and saves the next
random     runs that are killed at moments as likely as each other, one rank or both, until they are done
command    the same with `limoe train --resume RUN --ranks 2`: launcher and ranks are killed at once
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the ranks: tensors are small, a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

from limoe_dist.config.parse import save_run
from limoe_dist.config.schema import Run
from tests.benchmarks.machine import origin
from tests.soak.victim import (
    Death,
    Live,
    Victim,
    deaths_at_points,
    failed_at_points,
    frequent_run,
    killed_at_points,
    killed_at_random,
    undisturbed_run,
    write_points,
)
from tests.support.faults import Fault, Point
from tests.support.mortal_ranks import LIMIT_S, RANKS, Life, Lived, Nursery
from tests.support.shards import write_shards
from tests.support.undisturbed import Undisturbed

MODULE = "tests.soak.kill"
STEPS = 240
"""Of the undisturbed run: no other goes further."""
UNTIL = 24
"""Steps of a run that is killed at random."""
COMMAND_UNTIL = STEPS
"""The command takes seconds to start: with so many steps about half of its kills come later."""
COMMAND_SHARE = 10
"""One in so many random kills meets the command."""


def command(life: Life) -> Lived:
    """A life from `limoe train --resume`; a kill ends the launcher and all its ranks at once."""
    life.out.mkdir(parents=True, exist_ok=True)
    if not (life.out / "run.json").exists():
        # A run that was killed before its first step: it is gone on with like any other.
        save_run(life.run, life.out / "run.json")
    words = ["train", "--resume", str(life.out), "--ranks", str(len(RANKS)), "--stop-after", str(life.until)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed:
        launcher = subprocess.Popen([sys.executable, "-m", "limoe_dist", *words], stdout=printed, stderr=printed)
        try:
            launcher.wait(LIMIT_S if life.kill is None else life.kill.after_s)
        except subprocess.TimeoutExpired:
            _kill_all(psutil.Process(launcher.pid))
        status = launcher.wait()
        printed.seek(0)
        return Lived(statuses=(status,), seconds=time.monotonic() - began, printed=printed.read())


def _kill_all(launcher: psutil.Process) -> None:
    # Stopped first: it could start a rank between the list and the kill.
    launcher.suspend()
    everyone = [*launcher.children(recursive=True), launcher]
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(everyone[:-1], timeout=LIMIT_S)


class Soak:
    """All figures of one call, and the differences that were found."""

    def __init__(self, folder: Path, run: Run, undisturbed: Undisturbed, points: list[Point], nursery: Nursery) -> None:
        self.folder, self.run, self.undisturbed, self.points = folder, run, undisturbed, points
        self.nursery = nursery
        self.differences: list[str] = []

    def points_figures(self) -> dict[str, Any]:
        victim = self._victim("points")
        ways = deaths_at_points(self.points)
        deaths = []
        for death in killed_at_points(victim, ways):
            deaths.append(death)
            progress(f"points: {len(deaths)} of {len(ways)}", death)
        self._add(victim)
        return {"kills": len(deaths), "ways": dict(Counter(how for _, how in ways))} | _summary(deaths)

    def errors_figures(self) -> dict[str, Any]:
        victim = self._victim("errors")
        faults: list[Fault] = failed_at_points(victim, self.points)
        self._add(victim)
        print(f"errors: {len(faults)} saves that met one", flush=True)
        return {"failed_saves": len(faults), "errors": dict(Counter(fault.how for fault in faults))}

    def random_figures(self, name: str, live: Live, *, kills: int, until: int, seed: int, **who: Any) -> dict[str, Any]:
        deaths: list[Death] = []
        victims: dict[Path, Victim] = {}
        lives = killed_at_random(
            live,
            self.run,
            self.folder / name,
            self.undisturbed,
            kills=kills,
            until=until,
            chance=random.Random(seed),
            **who,
        )
        for victim, death in lives:
            victims[victim.out] = victim
            if death is not None:
                deaths.append(death)
                progress(f"{name}: {len(deaths)} of {kills}", death)
        for victim in victims.values():
            self._add(victim)
        hit = dict(Counter(death.where for death in deaths))
        return {"kills": len(deaths), "runs": len(victims), "steps_of_a_run": until, "hit": hit} | _summary(deaths)

    def _victim(self, name: str) -> Victim:
        return Victim(self.nursery.live, self.run, self.folder / name, self.undisturbed)

    def _add(self, victim: Victim) -> None:
        for difference in victim.differences:
            print(f"DIFFERENT: {difference}", flush=True)
        self.differences += victim.differences


def progress(what: str, death: Death) -> None:
    print(f"{what}: killed {death.where} ({death.stage}), goes on from step {death.newest}", flush=True)


def _summary(deaths: Sequence[Death]) -> dict[str, Any]:
    went_on = sorted(Counter(death.newest for death in deaths).items())
    return {
        "stage_of_a_save": dict(Counter(death.stage for death in deaths).most_common()),
        "went_on_from_steps": ", ".join(
            f"{step} ({times} times)" if times > 1 else str(step) for step, times in went_on
        ),
    }


def soak(folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    data, by_command = write_shards(folder / "shards", rows=64), -(-kills // COMMAND_SHARE)
    with Nursery(folder / "lives") as nursery:
        points = write_points(nursery.live, frequent_run(data, steps=STEPS), folder / "recorded")
        kept = frequent_run(data, steps=STEPS, keep_all=True)
        undisturbed = undisturbed_run(nursery.live, kept, folder / "through")
        made = Soak(folder, frequent_run(data, steps=STEPS), undisturbed, points, nursery)
        figures = {"killed_at_points": made.points_figures(), "failed_at_points": made.errors_figures()}
        figures["killed_at_random"] = made.random_figures(
            "random", nursery.live, kills=kills - by_command, until=UNTIL, seed=seed
        )
        figures["command_killed_at_random"] = made.random_figures(
            "command", command, kills=by_command, until=COMMAND_UNTIL, seed=seed, who=[RANKS]
        )
    names = {f"rank {rank}": [point.name for point in points if point.rank == rank] for rank in RANKS}
    return {"write_points": names, **figures, "mismatches": made.differences}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=100, help="at random moments, one in ten of them of the command")
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), kills=options.kills, seed=options.seed)
    what = {
        "what": "2 ranks with ep=2, a checkpoint after every step, one kept; no mismatch is wanted",
        "seed": options.seed,
        "seconds": round(time.monotonic() - began),
    }
    options.out.write_text(json.dumps(origin(MODULE) | what | found, indent=2) + "\n")
    deaths = [figures["kills"] for figures in found.values() if "kills" in figures]
    errors = found["failed_at_points"]["failed_saves"]
    print(f"{sum(deaths)} kills, {errors} errors of the disk: {len(found['mismatches'])} mismatches")
    return 1 if found["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
