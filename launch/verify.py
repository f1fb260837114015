"""`limoe verify PRESET --layout dp=2,tp=2,ep=4`: proves that a layout computes what one process computes."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro

from launch.named import listing, run_named
from launch.verified import Change, Layout, needed_bytes, verified_run
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically
from limoe_dist.config.rules import ConfigError, check
from limoe_dist.config.schema import Run

if TYPE_CHECKING:
    import torch

    from limoe_dist.train.parity.compare import Blame, Comparison

USAGE = """\
usage: limoe verify PRESET|RECIPE|FILE.json --layout dp=2,tp=2,ep=4 [--shrink] [--device cpu|cuda]
                    [--out certificate.json] [any setting of limoe train]
       torchrun --nproc-per-node N -m limoe_dist verify PRESET --layout ... --device cuda     (srun and mpirun too)

{listing}

Takes four optimizer steps in that layout and in one process, and compares: routing decisions, losses, every gradient,
the gradient norm, the optimizer's state and the weights; on a CPU in fp64 and fp32, on GPUs in fp32 and bf16. Batches
are generated: no data is read. Writes a certificate; docs/verify.md tells how to read it.

`limoe verify PRESET --help` lists every setting. The layout says how many ranks there are: dp * tp.

exit status: 0 the layout computes the same, 1 it does not, or its batches prove too little, 2 a setting that you can
mend, 130 or 143 interrupted"""

PRECISIONS = {"cpu": ("fp64", "fp32"), "cuda": ("fp32", "bf16")}


@dataclass(frozen=True)
class VerifyCommand:
    run: Annotated[Run, tyro.conf.arg(name="")]
    layout: str = ""
    """The layout to verify, as dp=2,tp=2,ep=4: dp * tp ranks. Beyond 16 ranks dp is cut, where this command starts
    them; where a launcher has started them, it runs on all."""
    shrink: tyro.conf.FlagCreatePairsOff[bool] = False
    """Make width, depth, pictures and vocabulary small. Experts, routing groups and the layout stay."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cpu: gloo, fp64 and fp32; cuda: NCCL, fp32 and bf16, a GPU for each rank. With train.dtype only that one."""
    out: str = "certificate.json"
    """Where to write the certificate."""


@dataclass(frozen=True)
class Task:
    command: VerifyCommand
    asked: Layout
    used: Layout
    run: Run
    """As it is verified, but for the precision."""
    changes: tuple[Change, ...]
    precisions: tuple[str, ...]

    def in_precision(self, dtype: str) -> Run:
        return self.run.model_copy(update={"train": self.run.train.model_copy(update={"dtype": dtype})})


def main(argv: list[str]) -> int:
    """Runs `limoe verify`; returns its exit status. Lets UserError pass."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(listing=listing()))
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UserError(f"give a preset first, as in `limoe verify tiny --layout dp=2,tp=2,ep=4` (got {argv[0]})")
    start = VerifyCommand(run=run_named(argv[0]))
    command = tyro.cli(VerifyCommand, args=argv[1:], prog=f"limoe verify {argv[0]}", default=start)

    from limoe_dist.parallel.place import discover

    place = discover(os.environ)
    alone = place.found_by == "alone"
    if command.device == "cpu":
        # Ranks take the GPUs that they see: these are to see none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        task = _task(command, started=None if alone else place.world)
    except UserError as error:
        if alone:
            raise
        _meet_to_tell(command.run, str(error))
    if not alone:
        return _verify(task)
    if command.device == "cuda":
        _refuse_without_gpus(task.used.ranks)
    else:
        _refuse_without_memory(task)
    from launch.ranks import run_local

    status = run_local(["verify", *argv], ranks=task.used.ranks, threads=task.run.parallel.threads, grace_s=5)
    interrupted = (128 + signal.SIGINT, 128 + signal.SIGTERM)
    # A rank that was killed has proved nothing.
    return 1 if status > 128 and status not in interrupted else status


def _meet_to_tell(run: Run, problem: str) -> NoReturn:
    """Ranks that a launcher has started meet first, so that the problem is told once."""
    from limoe_dist.parallel.bootstrap import start

    with start(run.parallel, os.environ, problem=problem):
        raise UserError(problem)


def _task(command: VerifyCommand, *, started: int | None) -> Task:
    """started: ranks that a launcher has started; None: this command will. Raises UserError, all problems at once."""
    run = command.run
    if not command.layout:
        raise UserError("--layout is missing: the layout to verify, as in --layout dp=2,tp=2,ep=4")
    asked = Layout.parse(command.layout)
    for axis, size in (("tp", asked.tp), ("ep", asked.ep)):
        if (given := getattr(run.parallel, axis)) not in (1, size):
            raise UserError(f"--parallel.{axis} {given} and --layout {asked} differ: leave out --parallel.{axis}")
    if run.parallel.kernels == "apex" and command.device == "cpu":
        raise UserError("parallel.kernels=apex needs --device cuda: on a CPU leave it at auto")
    group = run.moe.group_pairs if run.moe.blocks else 1
    if run.train.microbatch_pairs % group:
        raise UserError(
            f"train.microbatch_pairs={run.train.microbatch_pairs} must be a multiple of moe.group_pairs={group}"
        )
    used = _used(asked, started)
    _check(run, asked, shrink=False)
    verified, changes = _check(run, used, shrink=command.shrink)
    if used.ranks == 1:
        raise UserError(f"--layout {asked} is one process: there is nothing to compare; give two ranks or more")
    out = Path(command.out)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: must be a file in a folder that exists")
    if started is None:
        _warn_of_what_train_refuses(run, asked)
    return Task(command, asked, used, verified, tuple(changes), _precisions(command))


def _warn_of_what_train_refuses(run: Run, asked: Layout) -> None:
    """The batch is another one here: whether the run's own fits its ranks is said beside."""
    parallel = run.parallel.model_copy(update={"tp": asked.tp, "ep": asked.ep})
    try:
        check(run.model_copy(update={"parallel": parallel}), world=asked.ranks)
    except ConfigError as error:
        for problem in error.problems:
            print(f"limoe: warning: limoe train would refuse this layout: {problem}", file=sys.stderr)


def _precisions(command: VerifyCommand) -> tuple[str, ...]:
    if command.run.train.dtype != "auto":
        return (command.run.train.dtype,)
    usual = PRECISIONS[command.device]
    # DeepSpeed's ZeRO has no fp64.
    return tuple(one for one in usual if one != "fp64") if command.run.optim.engine == "deepspeed" else usual


def _used(asked: Layout, started: int | None) -> Layout:
    if started is None:
        return asked.cut()
    # A launcher's ranks are all there; those of this command, which are started alike, are as many as after the cut.
    fitting = [layout for layout in (asked, asked.cut()) if layout.ranks == started]
    if not fitting:
        text = f"--layout {asked} has {asked.ranks} ranks, but {started} were started: start {asked.ranks}"
        raise UserError(text)
    return fitting[0]


def _check(run: Run, layout: Layout, *, shrink: bool) -> tuple[Run, list[Change]]:
    verified, changes = verified_run(run, layout, shrink=shrink)
    try:
        check(verified, world=layout.ranks)
    except ConfigError as error:
        raise UserError("\n".join(f"--layout {layout}: {problem}" for problem in error.problems)) from None
    return verified, changes


def _refuse_without_gpus(ranks: int) -> None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < ranks:
        raise UserError(
            f"--device cuda needs a GPU for each of the {ranks} ranks, {count} are here: verify a smaller layout, "
            "start the ranks on several machines with torchrun or srun, or take --device cpu"
        )


def _refuse_without_memory(task: Task) -> None:
    import psutil

    needed, free = needed_bytes(task.in_precision(task.precisions[0]), task.used), psutil.virtual_memory().available
    if needed > free:
        fix = "take a layout with fewer ranks, or fewer experts" if task.command.shrink else "use --shrink"
        raise UserError(
            f"{task.used.ranks} ranks and the reference need about {needed / 1e9:.0f} GB of memory on this machine, "
            f"{free / 1e9:.0f} GB are free: {fix}"
        )


def _verify(task: Task) -> int:
    """The part that every rank runs. Rank 0 shows and writes the outcome."""
    from launch.ranks import agreement
    from limoe_dist.parallel.bootstrap import start
    from limoe_dist.parallel.collectives import all_or_none
    from limoe_dist.train.parity.compare import compare, prepare

    began = time.monotonic()
    agree = agreement(task.run, files={}, options={"--layout": str(task.asked), "--device": task.command.device})
    with start(task.run.parallel, os.environ, agree=agree) as (mesh, device):
        if device.type != task.command.device:
            raise UserError(f"--device {task.command.device}: this rank sees no GPU; take --device cpu", told_by=0)

        def say(text: str) -> None:
            if mesh.rank == 0:
                print(f"limoe verify: {text}", flush=True)

        say(f"{task.run.preset} on {mesh.world.size} ranks, {task.used}, in {' and '.join(task.precisions)}")
        # After each trial garbage is collected: what is here by now need not be looked at each time.
        gc.collect()
        gc.freeze()
        case = prepare(task.in_precision(task.precisions[0]), mesh=mesh, device=device)
        clipped = task.run.model_copy(update={"optim": case.run.optim})
        task = replace(task, run=clipped, changes=(*task.changes, *_clip(task.run, clipped)))
        comparisons = [
            compare(replace(case, run=task.in_precision(dtype)), mesh=mesh, device=device, say=say)
            for dtype in task.precisions
        ]
        with all_or_none(mesh.world, device):
            if mesh.rank == 0:
                _tell(task, comparisons, device=_name(device), seconds=time.monotonic() - began)
        return 0 if all(one.passed for one in comparisons) else 1


def _name(device: torch.device) -> str:
    import torch

    return "CPU, gloo" if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}, NCCL"


def _clip(before: Run, after: Run) -> list[Change]:
    asked, used = before.optim.clip_norm, after.optim.clip_norm
    why = "half of the gradient's norm: clipping has to be active"
    return [] if asked == used else [Change("optim.clip_norm", asked, used, why)]


def _tell(task: Task, comparisons: list[Comparison], *, device: str, seconds: float) -> None:
    from rich.console import Console

    from launch.certificate import certificate, contents, table
    from limoe_dist.train.parity.compare import blame

    blamed = blame(comparisons)
    content = certificate(
        task.command.run,
        task.run,
        layouts=(task.asked, task.used),
        changes=task.changes,
        comparisons=comparisons,
        blamed=blamed,
        device=device,
        seconds=seconds,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_atomically(Path(task.command.out), json.dumps(content, indent=2, allow_nan=False) + "\n")
    Console(highlight=False).print(table(comparisons))
    for one in comparisons:
        print(contents(one, task.run))
    if task.used != task.asked:
        print(f"ran {task.used}: dp of {task.asked} was cut to what keeps tp, ep and two of each group")
    for change in task.changes:
        print(f"changed {change.setting}: {change.asked} -> {change.used} ({change.why})")
    for one in comparisons:
        for problem in one.lacking:
            print(f"limoe: error: {one.precision}: the batches prove too little: {problem}", file=sys.stderr)
    if blamed is not None:
        print(f"limoe: error: {_first_difference(blamed)}", file=sys.stderr)
    print(f"{content['result']} in {seconds:.0f} s: {task.command.out}", flush=True)


def _first_difference(blamed: Blame) -> str:
    check = blamed.check
    text = (
        f"{blamed.precision}: {check.what}: the first that differs is {blamed.place} ({check.step}); "
        f"the largest error is {check.error:.1e}, {check.tolerance:.0e} is allowed"
    )
    if blamed.parameter and blamed.parameter != blamed.place:
        text += f"; of gradients look at {blamed.parameter}"
    return text
