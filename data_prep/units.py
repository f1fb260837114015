"""Who does which share of a command's work: one process, ranks of mpirun, tasks of a Slurm array, or `--unit I/N`.

Unit i of n does the pieces i, i + n, i + 2n, ...; nothing else about the work depends on i and n.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from limoe_dist.config.errors import UserError

Result = TypeVar("Result")
MPI_RANKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Set by Open MPI's mpirun, and by those of MPICH and Intel."""
ARRAY = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Unit:
    index: int
    count: int
    how: str = ""
    """What chose it, for people; empty: it is all the work there is."""

    def share(self, pieces: int) -> range:
        return range(self.index, pieces, self.count)

    def __str__(self) -> str:
        return f"unit {self.index} of {self.count}" + (f" ({self.how})" if self.how else "")


WHOLE = Unit(0, 1)


class Meeting:
    """Where units that were started together meet; here those of one process, which has nobody to meet."""

    rank, size = 0, 1

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """Rank 0 does it before the others do, so that they find what it left on disk. All raise, or none."""
        return work()

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """Every rank does it; where one raises UserError all raise it, when all have come to the end."""
        return work()


ALONE = Meeting()


class Ranks(Meeting):
    """The ranks of mpirun."""

    def __init__(self) -> None:
        """Raises UserError where mpi4py does not import."""
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UserError(f"started by mpirun, but mpi4py does not import ({error}): pip install mpi4py") from None
        self._world: Any = MPI.COMM_WORLD
        self.rank, self.size = int(self._world.rank), int(self._world.size)

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        if self.rank == 0:
            try:
                result = work()
            except UserError as error:
                self._world.bcast(str(error))
                raise UserError(str(error), told_by=0) from None
            except BaseException:
                self._abort()
                raise
            self._world.bcast(None)
        elif (told := self._world.bcast(None)) is not None:
            raise UserError(told, told_by=0)
        return self.all_or_none((lambda: result) if self.rank == 0 else work)

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        result, told = None, None
        try:
            result = work()
        except UserError as error:
            told = str(error)
        except BaseException:
            self._abort()
            raise
        errors = self._world.allgather(told)
        first = next((rank for rank, error in enumerate(errors) if error is not None), None)
        if first is not None:
            raise UserError(errors[first], told_by=first)
        return result  # type: ignore[return-value]

    def _abort(self) -> None:
        """The other ranks would wait for this one for ever."""
        traceback.print_exc()
        self._world.Abort(1)


def find_meeting(environment: Mapping[str, str] = os.environ) -> Meeting:
    """The ranks of mpirun where it started this process with others."""
    return Ranks() if any(_number(environment.get(name, "")) > 1 for name in MPI_RANKS) else Meeting()


def find_unit(given: str, meeting: Meeting, environment: Mapping[str, str] = os.environ) -> Unit:
    """The unit of this process. given: `--unit`, as "0/8"; empty: from Slurm's array, and the ranks of `meeting`.

    Ranks divide a task's share further. Raises UserError for a unit that is none.
    """
    unit = _written(given) if given else _array_task(environment)
    if meeting.size == 1:
        return unit
    how = f"{unit.how}, mpirun" if unit.how else "mpirun"
    return Unit(unit.index * meeting.size + meeting.rank, unit.count * meeting.size, how)


def _written(given: str) -> Unit:
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", given)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--unit={given}: must be I/N with 0 <= I < N, as 0/8 for the first of eight")
    return Unit(int(found[1]), int(found[2]), "--unit")


def _array_task(environment: Mapping[str, str]) -> Unit:
    if ARRAY + "ID" not in environment:
        return WHOLE
    values = [_number(environment.get(ARRAY + name, default)) for name, default in _ARRAY_PARTS]
    task, first, count, last, step = values
    index, left = divmod(task - first, max(step, 1))
    if min(values) < 0 or left or not 0 <= index < count or first + step * (count - 1) != last:
        told = ", ".join(f"{ARRAY}{name}={environment.get(ARRAY + name, '')}" for name, _ in _ARRAY_PARTS)
        raise UserError(
            f"the tasks of this Slurm array are not evenly spaced ({told}): "
            "use sbatch --array=0-7, or name the unit: --unit I/N"
        )
    return Unit(index, count, f"task {task} of a Slurm array")


_ARRAY_PARTS = (("ID", ""), ("MIN", ""), ("COUNT", ""), ("MAX", ""), ("STEP", "1"))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1
