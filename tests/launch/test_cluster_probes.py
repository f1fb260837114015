"""The doctor on clusters and in containers: programs on a PATH made for the test, devices in folders made for it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.probes import cluster, machine
from launch.probes.finding import ok

Put = Callable[[str, str], None]
UP = "echo 'Slurmctld(primary) at controller is UP'"
VERSION = 'case "$1" in --version) echo slurm 23.11.4 ;; esac'


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts a program with this shell text on a PATH where nothing else is."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("container", raising=False)
    monkeypatch.setattr(cluster, "CONTAINER_FILES", {})

    def put(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    return put


def test_slurm_is_missing_where_one_of_its_programs_is(put: Put, tmp_path: Path) -> None:
    for name in cluster.CLIENTS:
        (finding,) = cluster.slurm()
        assert finding.status == "missing"
        assert name in finding.found
        put(name, UP if name == "scontrol" else VERSION)
    assert cluster.slurm() == [ok("Slurm", f"slurm 23.11.4 at {tmp_path}/sbatch; its controller answers")]


def test_slurm_without_a_configuration_says_what_sbatch_says(put: Put) -> None:
    for name in cluster.CLIENTS:
        put(name, "echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1")
    (finding,) = cluster.slurm()
    assert finding.status == "missing"
    assert "Could not establish a configuration source" in finding.found
    assert "SLURM_CONF" in finding.loss


def test_a_controller_that_is_down_is_told_from_one_that_hangs(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cluster.CLIENTS:
        put(name, VERSION)
    put("scontrol", "echo 'Slurmctld(primary) at controller is DOWN'")
    assert "controller is DOWN" in cluster.slurm()[0].found
    monkeypatch.setattr(cluster, "CONTROLLER_S", 0.2)
    put("scontrol", "exec /bin/sleep 30")
    began = time.monotonic()
    assert "timed out" in cluster.slurm()[0].found
    assert time.monotonic() - began < 5


def test_pyxis_is_known_by_the_option_that_it_adds_to_srun(put: Put, tmp_path: Path) -> None:
    put("srun", "echo '  -n, --ntasks=ntasks  number of tasks to run'")
    assert cluster.containers()[0].status == "missing"
    put("srun", "echo '      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH'")
    put("enroot", "")
    assert cluster.containers() == [ok("containers", f"pyxis (srun --container-image), enroot at {tmp_path}/enroot")]


def test_a_container_knows_that_it_is_one(put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.surrounding(tmp_path) is None
    monkeypatch.setattr(cluster, "CONTAINER_FILES", {"/.dockerenv": "docker"})
    (tmp_path / ".dockerenv").touch()
    assert cluster.surrounding(tmp_path) == "docker"
    monkeypatch.setenv("container", "podman")
    assert cluster.containers() == [ok("containers", "this is a container (podman)")]


def _port(folder: Path, device: str, state: str) -> None:
    port = folder / device / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in {"state": state, "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}.items():
        (port / name).write_text(f"{text}\n")


def test_infiniband_wants_an_active_port_and_memory_to_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "INFINIBAND", tmp_path)
    allowed = resource.RLIM_INFINITY
    monkeypatch.setattr(cluster.resource, "getrlimit", lambda _: (allowed, allowed))
    assert "no device" in cluster.fabric()[0].found
    _port(tmp_path, "mlx5_0", "1: DOWN")
    assert "no port is ACTIVE" in cluster.fabric()[0].loss
    _port(tmp_path, "mlx5_1", "4: ACTIVE")
    (finding,) = cluster.fabric()
    assert finding.status == "ok"
    assert "mlx5_0/1 DOWN" in finding.found
    assert "mlx5_1/1 ACTIVE, 400 Gb/sec (4X NDR), InfiniBand" in finding.found
    allowed = 8_388_608
    (finding,) = cluster.fabric()
    assert finding.status == "missing"
    assert "8.4 MB may be locked" in finding.found


@pytest.mark.parametrize(("soft", "status"), [(1024, "missing"), (4096, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_few_open_files_are_told_with_the_way_to_more(soft: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (soft, 16384))
    (finding,) = machine.limits()
    assert finding.status == status
    assert ("ulimit -n 16384" in finding.loss) == (status == "missing")


def test_a_container_with_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 67_108_864  # what docker gives without --shm-size

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage)
    (finding,) = machine.shared_memory()
    assert (finding.status, finding.found) == ("missing", "0.07 GB free")
    assert "--shm-size" in finding.loss
