"""The same run on other hosts and ranks than before, and through PMIx."""

from __future__ import annotations

import math

import pytest

from tests.slurm.harness import lines_of
from tests.slurm.runs import RANKS, STEPS, attempts, final_loss, finished, nothing_lost
from tests.slurm.stage import Stage

BEGIN = 300
TOLERANCE = 1e-6
"""Relative, of losses: sums over another number of ranks are rounded elsewhere; 1e-7 was measured over 100 steps."""


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node"), [(1, 2), (2, 1), (4, 2)], ids=["on_one_host", "one_rank_a_host", "on_twice_as_many"]
)
def test_a_run_goes_on_with_another_number_of_ranks(stage: Stage, nodes: int, ranks_per_node: int):
    run = stage.run_left_at(BEGIN)
    job = stage.resume(run, "--requeue", nodes=nodes, ranks_per_node=ranks_per_node)
    state = stage.cluster.wait(job, "COMPLETED")
    assert (state["NumNodes"], state["NumTasks"]) == (str(nodes), str(nodes * ranks_per_node))
    finished(run)
    nothing_lost(run)
    ours, theirs = (lines_of(place / "metrics.jsonl") for place in (run, stage.undisturbed.out))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    # The same batches in the same order; before the restart the same bits.
    assert [line["loss"] for line in ours[:BEGIN]] == [line["loss"] for line in theirs[:BEGIN]]
    assert all(math.isclose(a["loss"], b["loss"], rel_tol=TOLERANCE) for a, b in zip(ours, theirs, strict=True))
    assert math.isclose(final_loss(run), stage.undisturbed.loss(), rel_tol=TOLERANCE)
    stage.note(run, ranks=nodes * ranks_per_node, ranks_before=RANKS)


def test_a_run_finishes_through_pmix(stage: Stage):
    """srun --mpi=pmix sets an MPI's variables too: ranks still meet by Slurm's."""
    run = stage.run_left_at(STEPS - 40)
    job = stage.resume(run, "--env", "SLURM_MPI_TYPE=pmix")
    stage.cluster.wait(job, "COMPLETED")
    assert [line["status"] for line in attempts(run, "end")] == [0]
    stage.is_the_undisturbed_run(run)
