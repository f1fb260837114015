"""Looks after a run's own numbers: what is not finite, losses that leap, experts and modalities that die.

Whether a step counts is decided on the device, before anybody could read it there: `judge` gives a scalar `keep`, 0 or
1, that the optimizer is multiplied with. The host reads the verdict after the update, with the votes of all ranks, in
the one transfer of a step, and decides what to do about it; every number is a sum over all ranks, so that all decide
alike, and the same on any number of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from limoe_dist.checkpoint.state import Watched
from limoe_dist.config import schema
from limoe_dist.train.ledger import Event, Kind, finite
from limoe_dist.train.metrics import success
from limoe_dist.train.votes import LENGTH, Ballot

NORMAL = 1.4826
"""Median distance from the median, times this, is the standard deviation of normal numbers."""
LEAST_SCALE = 1e-3
"""Of the median: a loss that hardly moves would else find a spike in its rounding."""
LEAST_LOSSES = 8


@dataclass(frozen=True)
class Verdict:
    """Of one step, on the device."""

    keep: Tensor
    """Scalar, 1, or 0: the step is left out."""
    numbers: Tensor
    """(LENGTH + 6,) float64: votes, loss, norm; whether it is not finite, a spike; how far from the median; `keep`."""


@dataclass(frozen=True)
class Judged:
    """The verdict, read."""

    ballot: Ballot
    kept: bool
    kind: Kind | Literal[""]
    """Empty where the step is like others."""
    loss: float
    grad_norm: float
    z: float
    """NaN where there are too few losses to compare with."""


class Guard:
    """One for each start of a run."""

    def __init__(self, settings: schema.Guard, device: torch.device) -> None:
        self.settings = settings
        self._losses_W = torch.full((settings.spike_window,), torch.nan, dtype=torch.float64, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._skipped = 0
        self._bad_lines = 0
        self._went_back: dict[int, int] = {}
        """By the step of a checkpoint, how often the run went back to it."""

    @torch.no_grad()
    def judge(self, votes: Tensor, norm: Tensor) -> Verdict:
        """votes: (LENGTH + 1,) sums over all ranks, the last the loss of the global batch; norm: of its gradient."""
        loss, settings = votes[-1], self.settings
        broken = ~(torch.isfinite(norm) & torch.isfinite(loss)) | (votes[0] > 0)
        median = self._losses_W.nanmedian()
        spread = NORMAL * (self._losses_W - median).abs().nanmedian()
        z = (loss - median) / torch.maximum(spread, LEAST_SCALE * median.abs())
        enough = self._count[0] >= max(LEAST_LOSSES, settings.spike_window // 4)
        spike = enough & (z >= settings.spike_z) & ~broken
        left_out = broken | spike if settings.spike in ("skip", "rollback", "stop") else broken
        self._take_in(loss, ~left_out)
        z = torch.where(enough, z, torch.nan)
        return Verdict((~left_out).double(), torch.cat([votes, torch.stack([norm, broken, spike, z, ~left_out])]))

    def _take_in(self, loss: Tensor, kept: Tensor) -> None:
        slot = self._count % len(self._losses_W)
        before = self._losses_W.gather(0, slot)
        self._losses_W.scatter_(0, slot, torch.where(kept, loss, before))
        self._count += kept

    def watched(self) -> Watched:
        """What it compares with, losses oldest first: with it in a checkpoint, a replay judges alike."""
        count = int(self._count.item())
        found: list[float] = self._losses_W.roll(-(count % len(self._losses_W))).tolist()
        return Watched(losses=tuple(found[max(0, len(found) - count) :]), bad_lines=self._bad_lines)

    def remember(self, watched: Watched) -> None:
        """Goes on from what `watched` gave, perhaps with another window."""
        self._bad_lines = watched.bad_lines
        losses = watched.losses[-len(self._losses_W) :]
        self._losses_W.fill_(torch.nan)
        self._losses_W[: len(losses)] = torch.tensor(losses, dtype=torch.float64)
        self._count.fill_(len(losses))

    def read(self, verdict: Verdict) -> Judged:
        """Waits for the device: the one place in a step that does."""
        numbers = verdict.numbers.tolist()
        loss, grad_norm, broken, spike, z, kept = numbers[LENGTH:]
        return Judged(
            ballot=Ballot.counted(numbers[:LENGTH]),
            kept=bool(kept),
            kind="non_finite" if broken else "spike" if spike and self.settings.spike != "off" else "",
            loss=loss,
            grad_norm=grad_norm,
            z=z,
        )

    def decide(self, judged: Judged, *, step: int) -> Event | None:
        """What to do about the step of this number, from 1; None where it is like others."""
        if judged.kept:
            self._skipped = 0
        if not judged.kind:
            return None
        action = self.settings.non_finite if judged.kind == "non_finite" else self.settings.spike
        assert action != "off"
        loss, grad_norm, z = (finite(number) for number in (judged.loss, judged.grad_norm, judged.z))
        event = Event(judged.kind, action, step, f"step {step}: {_what(judged)}", loss=loss, grad_norm=grad_norm, z=z)
        return self.skipped(event) if action == "skip" else event

    def skipped(self, event: Event) -> Event:
        """Counts a batch that is about to be left out: the event, or the end of the run where it is one too many."""
        self._skipped += 1
        if self._skipped < self.settings.max_skips:
            return replace(event, action="skip")
        more = (
            f"guard.max_skips={self.settings.max_skips} batches in a row were of no use, and a resumed run begins "
            "with the last of them again"
        )
        return event.told(more, action="stop")

    def goes_back(self, *, to_step: int) -> str:
        """Notes a rollback; why it should not be made, or empty."""
        self._bad_lines = 0
        self._went_back[to_step] = self._went_back.get(to_step, 0) + 1
        if self._went_back[to_step] <= self.settings.max_rollbacks:
            return ""
        return f"the run went back to step {to_step} guard.max_rollbacks={self.settings.max_rollbacks} times already"

    def look(self, figures: dict[str, Any], *, step: int) -> Event | None:
        """At a line of metrics, which is the same on all ranks: whether experts or a modality have collapsed."""
        problem = "" if self.settings.collapse == "off" else self._collapsed(figures)
        self._bad_lines = self._bad_lines + 1 if problem else 0
        action, lines = self.settings.collapse, self._bad_lines
        # A note comes once, and again only after it was well in between; of the others each time counts from one.
        if (
            action == "off"
            or lines < self.settings.collapse_lines
            or (action == "note" and lines > self.settings.collapse_lines)
        ):
            return None
        if action != "note":
            self._bad_lines = 0
        return Event("collapse", action, step, f"step {step}: for {lines} lines of metrics {problem}")

    def _collapsed(self, figures: dict[str, Any]) -> str:
        least, most = self.settings.min_success, self.settings.max_dead_frac
        for modality in ("image", "text"):
            rate = success(figures, modality)
            if rate is not None and rate < least:
                return f"{rate:.0%} of the {modality} tokens got a slot in some block (guard.min_success={least:g})"
        for block, about in figures["blocks"].items():
            dead = [sum(kept) == 0 for kept in about["kept"]]
            if sum(dead) > most * len(dead):
                experts = f"{sum(dead)} of {len(dead)} experts of block {block}"
                return f"{experts} got no token (guard.max_dead_frac={most:g})"
        return ""


def _what(judged: Judged) -> str:
    if judged.kind == "non_finite":
        return f"the {'gradient' if finite(judged.loss) is not None else 'loss'} is not finite"
    return f"the loss {judged.loss:.4g} leaps: {judged.z:.1f} robust standard deviations above the last ones"
