"""A layout against one process: the story, from the case to what is to blame.

1. a perturbed model and batches with dropped tokens         case.py
2. rank 0 takes some optimizer steps alone                   trial.py, on Mesh.single()
3. all ranks take them in their layout, on the same routes   trial.py, along.py, routes.py
4. each compares what it holds with what rank 0 found        checks.py, boxes.py
5. and what the batches contained                            facts.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from limoe_dist.config.schema import Run
from limoe_dist.parallel.mesh import Mesh
from limoe_dist.train.parity.along import Planted, Stage, follow_reference
from limoe_dist.train.parity.boxes import told_numbers
from limoe_dist.train.parity.case import Case, Given
from limoe_dist.train.parity.checks import (
    CHECKS,
    DECISIONS,
    GRADIENTS,
    OUTPUTS,
    TOLERANCES,
    Check,
    checks_of,
)
from limoe_dist.train.parity.facts import MIN_DROPPED_FRAC, Facts, dropped_frac, facts_of, lacking
from limoe_dist.train.parity.trial import Trial, run_trial

BATCHES: tuple[Given, ...] = ("pairs", "images", "texts", "pairs")
"""Of the optimizer steps that a comparison takes."""
SKEWS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Tried in turn, until enough tokens are dropped."""


@dataclass(frozen=True)
class Comparison:
    precision: str
    checks: tuple[Check, ...]
    facts: Facts
    lacking: tuple[str, ...]
    """What the batches should contain and do not: a sentence each."""
    modules: tuple[str, ...]
    """Those whose outputs were compared, in the order of the forward pass."""

    @property
    def passed(self) -> bool:
        return not self.lacking and all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Blame:
    """Where a layout first differs from one process."""

    precision: str
    check: Check
    place: str
    parameter: str
    """The first parameter whose gradient differs; the one that differs most where the forward pass did already."""


def compare(
    case: Case,
    *,
    mesh: Mesh,
    device: torch.device,
    planted: Planted = nullcontext,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Compares the case on all ranks with the case in one process. A collective; the same answer on every rank.

    say: gets a line about what begins.
    """
    precision = case.run.train.dtype
    tolerance = TOLERANCES[precision]
    say(f"{precision}: {len(BATCHES)} steps in one process")
    wanted = _one_process(case, BATCHES, mesh, device) if mesh.rank == 0 else None
    say(f"{precision}: {len(BATCHES)} steps on {mesh.world.size} ranks")
    stage = Stage(case, BATCHES, wanted, mesh, device)
    followed = follow_reference(stage, planted, limit=tolerance.margin)
    say(f"{precision}: comparing")
    checks = checks_of(stage, followed, tolerance)
    passes = followed.trial.passes
    facts = facts_of(case.run, passes, mesh)
    order = {what: place for place, what in enumerate(CHECKS)}
    return Comparison(
        precision=precision,
        checks=tuple(sorted(checks, key=lambda check: order[check.what])),
        facts=facts,
        lacking=tuple(lacking(facts, case.run)),
        modules=tuple(dict.fromkeys(name for one in passes for name in one.outputs)),
    )


def prepare(run: Run, *, mesh: Mesh, device: torch.device) -> Case:
    """The case in which enough tokens are dropped and the gradient is clipped, if there is one. A collective."""
    numbers = None
    if mesh.rank == 0:
        skew, trial = _skewed_enough(run, mesh, device)
        # Half of the norm: every step with pairs is clipped then.
        numbers = [skew, min(run.optim.clip_norm, trial.passes[0].norm / 2)]
    skew, clip_norm = told_numbers(numbers, 2, mesh=mesh, device=device)
    return Case(run.model_copy(update={"optim": run.optim.model_copy(update={"clip_norm": clip_norm})}), skew)


def _skewed_enough(run: Run, mesh: Mesh, device: torch.device) -> tuple[float, Trial]:
    """The first skew that drops enough tokens, or else the last, with its trial."""
    for skew in SKEWS if run.moe.blocks else (0.0,):
        trial = _one_process(Case(run, skew), ("pairs",), mesh, device)
        if run.moe.blocks and dropped_frac(trial.passes[0], Mesh.single()) >= MIN_DROPPED_FRAC:
            break
    return skew, trial


def blame(comparisons: Sequence[Comparison]) -> Blame | None:
    """The nearest to a defect of all that failed; None where all passed.

    The first step that differs: every step begins equal. In it weights at the start come first; then the forward pass,
    modules and decisions in its order; losses; the gradient, in the order of the backward pass; its norm; the
    optimizer's state and the weights that come of it.
    """
    for one in comparisons:
        failed = sorted((check for check in one.checks if not check.passed), key=lambda check: check.step)
        if not failed:
            continue
        first = failed[0]
        forward = [check for check in failed if check.what in (OUTPUTS, DECISIONS) and check.step == first.step]
        if first in forward:
            first = min(forward, key=lambda check: one.modules.index(check.failed[0]))
        gradients = [check for check in failed if check.what == GRADIENTS and check.step == first.step]
        parameter = ""
        if gradients:
            parameter = gradients[0].place if forward else gradients[0].failed[0]
        return Blame(one.precision, first, first.failed[0], parameter)
    return None


def _one_process(case: Case, batches: tuple[Given, ...], mesh: Mesh, device: torch.device) -> Trial:
    """The reference: in fp64 the whole batch at once.

    Elsewhere in microbatches of a rank's pairs: sums over as many tokens are rounded alike, and they fit a rank's GPU.
    """
    pairs = 0 if case.run.train.dtype == "fp64" else case.run.train.batch_pairs // mesh.world.size
    return run_trial(case.alone(microbatch_pairs=pairs), batches, mesh=Mesh.single(), device=device)
