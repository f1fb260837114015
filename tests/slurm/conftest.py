"""One cluster for all scenarios of a test run, and what a failure shows.

Under pytest-xdist its workers share the cluster, which the process that they belong to starts and stops.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from tests.slurm.harness import SCRIPT, Cluster
from tests.slurm.runs import Undisturbed
from tests.slurm.stage import Stage

NODES = 12
PLACE = "LIMOE_SLURM_PLACE"
"""The folder that the workers of one test run share; set by the first process."""
OWNER = "LIMOE_SLURM_OWNER"
"""The process that stops the cluster at its end."""
DAEMONS = ("slurmctld", "slurmd", "sbatch", "munged")


def _missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if _is_worker() and PLACE not in os.environ:
        return "workers share a cluster where tests/slurm is named: `python -m pytest tests/slurm -n 4`"
    if absent := [name for name in DAEMONS if shutil.which(name, path=path) is None]:
        return f"{', '.join(absent)}: not installed; `{SCRIPT} install --mpi`, as root on Debian, installs Slurm"
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"this machine makes no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def _is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure(config: pytest.Config) -> None:
    """Names the shared folder before workers start; they find it in their environment."""
    config.addinivalue_line("markers", "core: a scenario that every push runs")
    if _is_worker() or PLACE in os.environ or config.option.collectonly:
        return
    os.environ[PLACE] = tempfile.mkdtemp(prefix="limoe-slurm-", dir="/tmp")
    os.environ[OWNER] = str(os.getpid())
    signal.signal(signal.SIGTERM, _as_interrupt)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    if not ours or not (missing := _missing()):
        return
    if os.environ.get("LIMOE_SLURM") == "required":
        raise pytest.UsageError(f"LIMOE_SLURM=required, but {missing}")
    for item in ours:
        item.add_marker(pytest.mark.skip(reason=missing))


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM would end this process at once, and leave the cluster."""
    raise KeyboardInterrupt


def pytest_unconfigure() -> None:
    if _is_worker() or PLACE not in os.environ:
        return
    place = Path(os.environ.pop(PLACE))
    if (place / "cluster").exists():
        Cluster(place / "cluster").stop()
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    return Path(os.environ[PLACE])


@pytest.fixture(scope="session")
def cluster(shared: Path) -> Cluster:
    found = Cluster(shared / "cluster")
    with _alone(shared / "cluster.lock") as first:
        if first:
            _stop_when_we_are_gone(shared)
            found.start(NODES)
    return found


@pytest.fixture(scope="session")
def undisturbed(shared: Path) -> Undisturbed:
    with _alone(shared / "undisturbed.lock"):
        return Undisturbed.make(shared)


@pytest.fixture
def stage(request: pytest.FixtureRequest, shared: Path, cluster: Cluster, undisturbed: Undisturbed) -> Iterator[Stage]:
    """The cluster, the undisturbed run, and a folder of the test's own; jobs that are left at its end are cancelled."""
    name = re.sub(r"\W+", "_", request.node.name.removeprefix("test_")).strip("_")
    made = Stage(shared / name, cluster, undisturbed)
    request.node.stage = made
    yield made
    made.close()


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """One process of the test run at a time; True for the first that comes, until one has come to its end."""
    done = lock.with_suffix(".done")
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        first = not done.exists()
        yield first
        done.touch()


def _stop_when_we_are_gone(place: Path) -> None:
    """Should the test run be killed, hosts and daemons must not stay."""
    watch = (
        'while kill -0 "$1" 2>/dev/null && [[ -d $2 ]]; do sleep 1; done; '
        'if [[ -d $2/cluster ]]; then SLURM_CLUSTER_DIR=$2/cluster "$3" stop --purge; fi; rm -rf "$2"'
    )
    subprocess.Popen(
        ["bash", "-c", watch, "watch", os.environ[OWNER], str(place), str(SCRIPT)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A scenario that failed shows the job's log, what Slurm says of the job, and what the run noted."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    stage = getattr(item, "stage", None)
    if report.when == "call" and report.failed and stage is not None:
        report.sections += stage.evidence()
