"""`make quickstart`: from an empty folder to a trained model and a report, by `limoe` commands that a user would type.

Each stage is one or more commands, echoed before they run; the first that fails ends the quick start with its status.
A second run is fast: preparation finds its own work done, and a run that has finished is not trained again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.figures import measured
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run
from limoe_dist.config.presets import preset

ROOT = Path("quickstart")
DEMO, SHARDS, RUN = ROOT / "demo", ROOT / "shards", ROOT / "run"
TRAIN, VALIDATION = (SHARDS / split / "manifest.json" for split in ("train", "validation"))
TIMES = ROOT / "seconds.json"

STEPS = preset("tiny").train.steps
STOP_AFTER = STEPS - 100
"""Training stops here with a checkpoint, and the stage after it goes on from there."""

# Where `limoe eval` writes by itself, and `limoe report` looks.
ZEROSHOT, RETRIEVAL = (RUN / f"eval-{task}-{STEPS}.json" for task in ("zeroshot", "retrieval"))

Command = list[str]


@dataclass(frozen=True)
class Stage:
    name: str
    about: str
    commands: Callable[[], list[Command]]
    """What is left to do, decided when the stage's turn comes; nothing where it was done before."""


def _prepare(*words: str | Path) -> Callable[[], list[Command]]:
    return lambda: [["prep", *map(str, words)]]


def _pack() -> list[Command]:
    splits = ("train", "validation")
    # The folder is the quick start's own: what an earlier version packed there is replaced.
    return [
        ["prep", "pack", "--source", str(DEMO / split), "--out", str(SHARDS / split), "--overwrite"] for split in splits
    ]


def _train() -> list[Command]:
    """The first part of the run; goes on with one that was interrupted."""
    step = _saved_step()
    settings = RUN / "run.json"
    if settings.is_file() and load_run(settings).train.steps != STEPS:
        # Made by another version of the preset: begin anew.
        step = 0
    if step >= STOP_AFTER:
        return []
    ending = ["--ranks", "2", "--stop-after", str(STOP_AFTER)]
    if step:
        return [["train", "--resume", str(RUN), *ending]]
    if RUN.exists():
        # Interrupted before its first checkpoint: nothing can go on from it, and no new run may begin on top of it.
        shutil.rmtree(RUN)
    data = ["--data", str(TRAIN), "--data.validation", str(VALIDATION)]
    return [["train", "tiny", *data, "--out", str(RUN), "--parallel.ep", "2", *ending]]


def _resume() -> list[Command]:
    """The rest of the run, from its checkpoint: the same curve as without the stop."""
    return [] if _saved_step() >= STEPS else [["train", "--resume", str(RUN), "--ranks", "2"]]


def _saved_step() -> int:
    """Step of the newest whole checkpoint (one with a manifest); 0 where there is none."""
    # By name, without limoe_dist.checkpoint: importing torch would cost a second run more than all the rest.
    steps = [int(path.parent.name.removeprefix("step-")) for path in RUN.glob("checkpoints/step-*/manifest.json")]
    return max(steps, default=0)


def _evaluate(task: str, result: Path) -> Callable[[], list[Command]]:
    def commands() -> list[Command]:
        newest = max(RUN.glob("checkpoints/step-*/manifest.json"), default=None)
        if newest and result.is_file() and result.stat().st_mtime > newest.stat().st_mtime:
            return []
        return [["eval", task, "--run", str(RUN), "--data", str(VALIDATION)]]

    return commands


STAGES = (
    Stage("fetch", "emoji of seven makers, with captions", _prepare("fetch-demo", "--out", DEMO)),
    Stage("pack", "pictures and captions into Arrow shards", _pack),
    Stage("tokenizer", "a vocabulary", _prepare("tokenizer", "--data", TRAIN, "--vocab-size", "2000")),
    Stage("train", f"the preset tiny on 2 ranks, to step {STOP_AFTER}", _train),
    Stage("resume", f"goes on from the checkpoint, to step {STEPS}", _resume),
    Stage("zero-shot", "pictures of a maker that was not trained on", _evaluate("zeroshot", ZEROSHOT)),
    Stage("retrieval", "captions of pictures, pictures of captions", _evaluate("retrieval", RETRIEVAL)),
    Stage("report", "one HTML page", lambda: [["report", str(RUN)]]),
)


@dataclass(frozen=True)
class Done:
    stage: str
    seconds: float
    skipped: bool
    """Finished by an earlier quick start; the seconds are those of then."""


@dataclass(frozen=True)
class Quickstart:
    """Run all stages of the quick start in ./quickstart, each as `limoe` commands that are printed first."""

    setup_seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 0.0
    """Seconds that the set-up before this took."""
    figures: Path = ROOT / "figures.json"
    """File for what was measured: seconds, accuracies, success rates, machine, versions, commit."""


def main(argv: list[str]) -> int:
    try:
        given = tyro.cli(Quickstart, args=argv, prog="python -m launch.quickstart")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    ROOT.mkdir(exist_ok=True)
    done = [Done("set-up", given.setup_seconds, skipped=False)]
    for stage in STAGES:
        status = _run(stage, done)
        if status:
            print(f"\nquick start: the stage {stage.name} ended with status {status}", file=sys.stderr)
            return status
    times = [(one.stage, one.seconds, one.skipped) for one in done]
    try:
        figures = measured(times, run=RUN, zeroshot=ZEROSHOT, retrieval=RETRIEVAL)
    except UserError as error:
        print(f"quick start: error: {error}", file=sys.stderr)
        return 2
    given.figures.parent.mkdir(parents=True, exist_ok=True)
    given.figures.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _show(done, given.figures)
    return 0


def _run(stage: Stage, done: list[Done]) -> int:
    """Runs what is left of a stage and notes its seconds; returns the status of its last command."""
    print(f"\n== {stage.name}: {stage.about}", flush=True)
    before = _times()
    commands = stage.commands()
    if not commands:
        print("done before", flush=True)
        done.append(Done(stage.name, before.get(stage.name, 0.0), skipped=True))
        return 0
    start = time.monotonic()
    for command in commands:
        print(f"$ limoe {shlex.join(command)}", flush=True)
        if status := _limoe(command):
            return status
    seconds = round(time.monotonic() - start, 1)
    print(f"-- {stage.name}: {seconds:.1f} s", flush=True)
    TIMES.write_text(json.dumps(before | {stage.name: seconds}, indent=2) + "\n", encoding="utf-8")
    done.append(Done(stage.name, seconds, skipped=False))
    return 0


def _times() -> dict[str, float]:
    """Seconds of the stages when they were last run in full."""
    try:
        found: dict[str, float] = json.loads(TIMES.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _limoe(command: Command) -> int:
    """Runs one command with our terminal; returns its exit status."""
    with subprocess.Popen([sys.executable, "-m", "limoe_dist", *command]) as process:
        while True:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                # The terminal gave Ctrl-C to the command too: it saves a checkpoint, and is not to be killed meanwhile.
                continue
            return status if status >= 0 else 128 - status


def _show(done: list[Done], figures: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="quick start", title_justify="left", show_footer=True)
    table.add_column("stage", footer="total of this run")
    table.add_column("seconds", justify="right", footer=f"{sum(one.seconds for one in done if not one.skipped):.1f}")
    table.add_column("")
    for one in done:
        table.add_row(one.stage, f"{one.seconds:.1f}", "done before, seconds of then" if one.skipped else "")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"report: {RUN / 'report.html'}\nfigures: {figures}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
