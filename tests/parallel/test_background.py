"""Long work in a thread: results and errors come back, and ranks that are done wait in votes that do not time out."""

from __future__ import annotations

import time
import weakref

import pytest
import torch

from limoe_dist.parallel import background
from limoe_dist.parallel.background import Job, patiently
from limoe_dist.parallel.mesh import Mesh
from tests.support.ranks import RanksPool

CPU = torch.device("cpu")


def test_results_and_errors_come_back() -> None:
    assert patiently(lambda: 7, Mesh.single().world, CPU) == 7
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 // 0, Mesh.single().world, CPU)


def slow_on_rank_1() -> tuple[int, int]:
    mesh = Mesh.build(tp=1, ep=1)
    background.PATIENCE_S = 0.05
    mesh.world.traffic.reset()
    found = patiently(lambda: time.sleep(0.5 * mesh.rank) or mesh.rank, mesh.world, CPU)
    return found, sum(volume.calls for volume in mesh.world.traffic.counts().values())


def test_a_rank_that_is_done_joins_short_votes_until_all_are(ranks2: RanksPool) -> None:
    (first, votes), (second, same) = ranks2.run(slow_on_rank_1)
    assert (first, second) == (0, 1)
    # One vote would wait as long as the slowest rank works, and could run into its time limit.
    assert votes == same > 3


class Held:
    pass


def test_a_job_that_is_over_holds_nothing_of_its_work() -> None:
    held = Held()
    seen = weakref.ref(held)
    job = Job(lambda kept=held: str(type(kept)), "test")  # type: ignore[misc]
    job.join()
    del held
    # The thread itself would drop it last, perhaps while the interpreter ends.
    assert seen() is None
    assert "Held" in job.result()
