"""What is compared between a layout and one process, how an error is measured, and how large it may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limoe_dist.parallel.collectives import max_over
from limoe_dist.parallel.placement import Shard
from limoe_dist.train.parity.along import Followed, Stage
from limoe_dist.train.parity.boxes import KEY_BIAS, KEY_ROW, errors_of_boxes, labels_of, told_numbers
from limoe_dist.train.parity.trial import Pass, Trial

START, DECISIONS, OUTPUTS = "weights at the start", "routing decisions", "outputs of modules"
CONTRASTIVE, AUXILIARY = "contrastive loss", "auxiliary losses"
GRADIENTS, NORM, STATE, WEIGHTS = "gradients", "gradient norm", "optimizer state", "weights"
CHECKS = (START, DECISIONS, OUTPUTS, CONTRASTIVE, AUXILIARY, GRADIENTS, NORM, STATE, WEIGHTS)
"""In the order in which a defect spreads: the first that fails is the nearest to it."""

MODEL, MOMENTUM = "model/", "adafactor/momentum/"
"""Prefixes of weights, and of the state that was divided by a gradient's size, as updates are."""


@dataclass(frozen=True)
class Tolerance:
    gradient: float
    """Of outputs and gradients; twice as much for the optimizer's moments."""
    loss: float
    """Of losses and the norm."""
    margin: float
    """Between two gates, or two priorities, that rounding may exchange."""
    weights: float
    """Of updates, and of Adafactor's momentum, where they are determined."""
    determined: float
    """That is: where some gradient so far was at least this share of the parameter's largest."""


# An update is a gradient divided by its own size: where that is `determined` times the largest one, an error that the
# gradient may have is gradient / determined of it.
TOLERANCES = {
    "fp64": Tolerance(gradient=1e-9, loss=1e-9, margin=1e-6, weights=1e-7, determined=0.01),
    "fp32": Tolerance(gradient=1e-5, loss=1e-5, margin=1e-6, weights=1e-3, determined=0.01),
    "bf16": Tolerance(gradient=5e-2, loss=2e-2, margin=5e-2, weights=0.5, determined=0.1),
}


@dataclass(frozen=True)
class Check:
    what: str
    """One of CHECKS."""
    step: str
    """Of the optimizer, and what its batch held, as `step 1: pairs`."""
    error: float
    tolerance: float
    place: str
    """Where the error is the largest."""
    failed: tuple[str, ...] = ()
    """All places beyond the tolerance, in the order in which a defect spreads."""
    note: str = ""

    @staticmethod
    def of(what: str, step: str, errors: Mapping[str, float], tolerance: float, *, note: str = "") -> Check:
        place = max(errors, key=lambda name: errors[name])
        failed = tuple(name for name, error in errors.items() if not error <= tolerance)
        return Check(what, step, errors[place], tolerance, place, failed, note)

    @property
    def passed(self) -> bool:
        return not self.failed


def checks_of(stage: Stage, followed: Followed, tolerance: Tolerance) -> list[Check]:
    """All checks of all steps of a trial. A collective."""
    found = followed.trial
    checks = [_start(stage, found)]
    for number in range(len(stage.batches)):
        checks += _decisions(stage, followed, number, tolerance) if stage.case.run.moe.blocks else []
        checks.append(_outputs(stage, found, number, tolerance))
        checks += _numbers(stage, found, number, tolerance)
        checks.append(_gradients(stage, found, number, tolerance))
        checks.append(_state(stage, found, number, tolerance))
        checks.append(_weights(stage, found, number, tolerance))
    return checks


def _start(stage: Stage, found: Trial) -> Check:
    wanted = {} if stage.wanted is None else _tensors(stage.wanted.start)
    return Check.of(START, stage.label(0), _plain(_errors(stage, found.start, wanted)), 0.0)


def _outputs(stage: Stage, found: Trial, number: int, tolerance: Tolerance) -> Check:
    """Of each module, relative to its largest number; the modules in the order of the forward pass."""
    heard = found.passes[number].outputs
    parts = [part for both in heard.values() for part in both]
    wholes: list[Tensor | None] = [None] * len(parts)
    if stage.wanted is not None:
        wholes = [part for name in heard for part in stage.wanted.passes[number].outputs[name]]
    theirs = iter(stage.mine(wholes, parts))
    wanted = {name: torch.cat([next(theirs), next(theirs)]) for name in heard}
    largest_N = max_over(torch.stack([whole.abs().max() for whole in wanted.values()]), stage.mesh.world)
    errors = {
        # A module that gives zeros alone has none to differ by.
        name: (torch.cat(heard[name]) - whole).abs().max() / largest.clamp(min=torch.finfo(largest.dtype).tiny)
        for (name, whole), largest in zip(wanted.items(), largest_N, strict=True)
    }
    return Check.of(OUTPUTS, stage.label(number), _worst(stage, errors), tolerance.gradient)


def _decisions(stage: Stage, followed: Followed, number: int, tolerance: Tolerance) -> list[Check]:
    """The largest margin that rounding would have had to cross, by MoE block."""
    here = {block: flips for (at, block), flips in followed.flips.items() if at == number}
    margins = {
        f"blocks.{block}.moe": here[block].margin if block in here else 0.0 for block in stage.case.run.moe.blocks
    }
    choices, slots = sum(flips.choices for flips in here.values()), sum(flips.slots for flips in here.values())
    note = f"flips: {choices} of choices, {slots} of slots" if here else ""
    return [Check.of(DECISIONS, stage.label(number), margins, tolerance.margin, note=note)]


def _numbers(stage: Stage, found: Trial, number: int, tolerance: Tolerance) -> list[Check]:
    """Losses in nats, relative where they are above 1; the norm, relative."""
    mine = _figures(found, number)
    theirs = None if stage.wanted is None else list(_figures(stage.wanted, number).values())
    told = told_numbers(theirs, len(mine), mesh=stage.mesh, device=stage.device)
    errors: dict[str, Tensor] = {}
    for (name, value), wanted in zip(mine.items(), told, strict=True):
        scale = (wanted or 1.0) if name == NORM else max(1.0, abs(wanted))
        errors[name] = torch.tensor(abs(value - wanted) / scale, dtype=torch.float64, device=stage.device)
    worst = _worst(stage, errors)
    label, limit = stage.label(number), tolerance.loss
    checks = [Check.of(name, label, {name: worst.pop(name)}, limit) for name in (CONTRASTIVE, NORM)]
    return [*checks, Check.of(AUXILIARY, label, worst, limit)] if stage.case.run.moe.blocks else checks


def _figures(trial: Trial, number: int) -> dict[str, float]:
    one = trial.passes[number]
    losses = {CONTRASTIVE if name == "contrastive" else name: value for name, value in one.losses.items()}
    return {NORM: one.norm} | losses


def _gradients(stage: Stage, found: Trial, number: int, tolerance: Tolerance) -> Check:
    wanted = {} if stage.wanted is None else _tensors(stage.wanted.passes[number].gradients)
    errors = _errors(stage, found.passes[number].gradients, wanted)
    # The backward pass comes to the temperature and the projections first, then to the blocks from the last.
    forward = [name.removeprefix(MODEL) for name in found.start]
    order = [name for name in forward if "." not in name] + [name for name in reversed(forward) if "." in name]
    errors = {name: errors[name] for name in labels_of(order)}
    return Check.of(GRADIENTS, stage.label(number), errors, tolerance.gradient)


def _state(stage: Stage, found: Trial, number: int, tolerance: Tolerance) -> Check:
    """The optimizer's moments: sums of gradients, or of their squares, whose error is twice as large."""
    state = found.passes[number].state
    mine = {name: shard for name, shard in state.items() if not name.startswith((MODEL, MOMENTUM))}
    wanted = {} if stage.wanted is None else _tensors(stage.wanted.passes[number].state)
    return Check.of(STATE, stage.label(number), _errors(stage, mine, wanted), 2 * tolerance.gradient)


def _weights(stage: Stage, found: Trial, number: int, tolerance: Tolerance) -> Check:
    """Every rank's weights, the masters and Adafactor's momentum; relative to the largest update, or momentum.

    In bf16 the masters alone: an update is less than the last bit of most weights.
    """
    one = found.passes[number]
    masters = {name: shard for name, shard in one.state.items() if name.startswith((MODEL, MOMENTUM))}
    wanted, spread, masks, compared = {}, {}, {}, None
    if stage.wanted is not None:
        wanted, before = _tensors(stage.wanted.passes[number].state), _before(stage.wanted, number)
        spread = {name: wanted[name] - before[name] if name.startswith(MODEL) else wanted[name] for name in masters}
        known = determined(stage.wanted.passes[: number + 1], tolerance.determined)
        compared = [sum(int(mask.sum()) for mask in known.values()) / sum(mask.numel() for mask in known.values())]
        masks = {name: known[name.removeprefix(MODEL).removeprefix(MOMENTUM)] for name in masters}
    errors = {
        f"{name} (master)" if name.startswith(MODEL) else name: error
        for name, error in _errors(stage, masters, wanted, spread=spread, masks=masks).items()
    }
    if stage.case.run.train.dtype != "bf16":
        errors |= _errors(stage, one.weights, wanted, spread=spread, masks=masks)
    (share,) = told_numbers(compared, 1, mesh=stage.mesh, device=stage.device)
    note = f"{share:.0%} compared"
    return Check.of(WEIGHTS, stage.label(number), _plain(errors), tolerance.weights, note=note)


def _before(trial: Trial, number: int) -> dict[str, Tensor]:
    return _tensors(trial.passes[number - 1].state if number else trial.start)


def determined(passes: Sequence[Pass], share: float) -> dict[str, Tensor]:
    """By parameter, where its update is known well: where some gradient was large enough, or none ever came.

    Elsewhere a gradient may be rounding alone, and divided by its own size it is an update of any sign: that of a key
    bias always is. None ever came to a row of zeros, as of an idle expert; a zero among others may be rounding's too.
    """
    masks = {}
    for name in passes[0].gradients:
        size = torch.stack([one.gradients[name].tensor.abs() for one in passes]).amax(0)
        none = (size == 0).all(-1, keepdim=True) if size.dim() else size == 0
        masks[name] = ((size > 0) & (size >= share * size.max())) | none
        if name.endswith(KEY_BIAS):
            masks[name][KEY_ROW] = False
    return masks


def _tensors(shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    return {name: shard.tensor for name, shard in shards.items()}


def _plain(errors: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(MODEL): error for name, error in errors.items()}


def _errors(
    stage: Stage,
    found: Mapping[str, Shard],
    wanted: Mapping[str, Tensor],
    *,
    spread: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    return errors_of_boxes(found, wanted, mesh=stage.mesh, device=stage.device, spread=spread, masks=masks)


def _worst(stage: Stage, errors: Mapping[str, Tensor]) -> dict[str, float]:
    """Of all ranks; inf where a number is not finite."""
    numbers = torch.stack([error.double() for error in errors.values()]).nan_to_num(nan=torch.inf)
    return dict(zip(errors, max_over(numbers, stage.mesh.world).tolist(), strict=True))
