"""What ranks see apart and act on together: a few numbers a step, summed over all ranks with the gradient's norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from limoe_dist.checkpoint.saver import Flags
from limoe_dist.train.preemption import SIGNALS

WORST = 2
"""A save has failed in no way (0), or in one of so many; see checkpoint/saver.py."""
LENGTH = 1 + len(SIGNALS) + 1 + 1 + WORST


@dataclass(frozen=True)
class Ballot:
    """Of one rank before the vote, and what all ranks do after it."""

    non_finite: bool
    """Before the vote always False here: the device adds whether this rank's loss is finite. After it: of any rank."""
    signal: int
    """The largest that any rank received; 0: none."""
    clock: bool
    """A checkpoint is due by rank 0's clock."""
    saving: Flags
    """How far a save is: whether a rank works on it, and how badly one failed."""

    def numbers(self) -> list[float]:
        """(LENGTH,): sums of these over the ranks say the same as the largest would."""
        working, failed = self.saving
        return [
            float(self.non_finite),
            *(float(self.signal == number) for number in SIGNALS),
            float(self.clock),
            float(working),
            *(float(failed == how) for how in range(1, WORST + 1)),
        ]

    @staticmethod
    def counted(sums: Sequence[float]) -> Ballot:
        """From the sums over all ranks."""
        non_finite, *others = sums
        received, (clock, working, *failures) = others[: len(SIGNALS)], others[len(SIGNALS) :]
        return Ballot(
            non_finite=non_finite > 0,
            signal=max((int(number) for number, count in zip(SIGNALS, received, strict=True) if count), default=0),
            clock=clock > 0,
            saving=(int(working > 0), max((how + 1 for how, count in enumerate(failures) if count), default=0)),
        )


NOBODY = Ballot(non_finite=False, signal=0, clock=False, saving=(0, 0))
