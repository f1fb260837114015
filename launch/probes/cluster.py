"""What of a cluster is in reach: Slurm and its controller, containers, the fabric between nodes."""

from __future__ import annotations

import os
import re
import resource
import shutil
from pathlib import Path

from launch.probes.finding import Finding, ProbeFailed, missing, ok, output_of, read

CLIENTS = ("sbatch", "srun", "squeue", "scontrol")
"""What `limoe submit` and `limoe status` call."""
CONTROLLER_S = 5.0
"""How long the controller may take to answer: one that hangs must not hold the doctor."""
RUNTIMES = ("enroot", "apptainer", "singularity", "docker", "podman")
CONTAINER_FILES = {"/.dockerenv": "docker", "/run/.containerenv": "podman", "/.singularity.d": "apptainer"}
INFINIBAND = Path("/sys/class/infiniband")


def slurm() -> list[Finding]:
    programs = {name: shutil.which(name) for name in CLIENTS}
    lacking = [name for name, path in programs.items() if path is None]
    if lacking:
        found = f"{', '.join(lacking)}: not on PATH"
        return [missing("Slurm", found, "jobs on a cluster: log in to one, or sudo apt install slurm-client")]
    where = f"at {programs['sbatch']}"
    try:
        found = f"{output_of([str(programs['sbatch']), '--version'], timeout_s=CONTROLLER_S)} {where}"
        answer = output_of([str(programs["scontrol"]), "ping"], timeout_s=CONTROLLER_S)
    except ProbeFailed as error:
        return [_unusable(f"its programs are {where}; {error}")]
    if not re.search(r"\bis UP\b", answer):
        return [
            _unusable(f"{found}; its controller does not answer: {answer.splitlines()[0] if answer else 'nothing'}")
        ]
    return [ok("Slurm", f"{found}; its controller answers")]


def _unusable(found: str) -> Finding:
    how = "jobs on a cluster: ask its administrators (slurm.conf or SLURM_CONF, and a slurmctld that is up)"
    return missing("Slurm", found, how)


def containers() -> list[Finding]:
    """Runtimes of container images that jobs can run in; pyxis is a plugin of srun, told by the option it adds."""
    found = [f"{name} at {path}" for name in RUNTIMES if (path := shutil.which(name))]
    if _has_pyxis():
        found.insert(0, "pyxis (srun --container-image)")
    inside = surrounding()
    if inside:
        found.insert(0, f"this is a container ({inside})")
    if found:
        return [ok("containers", ", ".join(found))]
    loss = (
        "jobs in an image: apptainer, or enroot with pyxis, by the cluster's administrators; jobs without one need none"
    )
    return [missing("containers", f"{', '.join(RUNTIMES)}: not on PATH; srun has no pyxis", loss)]


def _has_pyxis() -> bool:
    program = shutil.which("srun")
    try:
        return program is not None and "--container-image" in output_of([program, "--help"], timeout_s=CONTROLLER_S)
    except ProbeFailed:
        return False


def surrounding(root: Path = Path("/")) -> str | None:
    """The kind of container that this process is in, or None."""
    # systemd's convention, in small letters, which podman and enroot follow too.
    if kind := os.environ.get("container"):  # noqa: SIM112
        return kind
    return next((kind for file, kind in CONTAINER_FILES.items() if (root / file[1:]).exists()), None)


def fabric() -> list[Finding]:
    """InfiniBand or RoCE between nodes, by the kernel's word, and the memory that it may lock."""
    ports = [port for device in _listed(INFINIBAND) for port in _listed(device / "ports")]
    loss = "the fast network between nodes: ranks use TCP; nothing on one node"
    if not ports:
        how = "; in a container, give it /dev/infiniband" if surrounding() else ""
        return [missing("InfiniBand", f"no device in {INFINIBAND}", loss + how)]
    told = [_told(port) for port in ports]
    if not any("ACTIVE" in one for one in told):
        return [missing("InfiniBand", "; ".join(told), f"{loss}; no port is ACTIVE: ask the administrators")]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY:
        how = "ulimit -l unlimited; for jobs, LimitMEMLOCK=infinity of slurmd; docker run --ulimit memlock=-1"
        found = f"{'; '.join(told)}; but only {limit / 1e6:.1f} MB may be locked"
        return [missing("InfiniBand", found, f"NCCL's transfers may fail or go by TCP: {how}")]
    return [ok("InfiniBand", "; ".join(told))]


def _told(port: Path) -> str:
    """`mlx5_0/1 ACTIVE, 400 Gb/sec (4X NDR), InfiniBand`."""
    state = (read(port / "state") or "?").partition(": ")[2]
    facts = [fact for name in ("rate", "link_layer") if (fact := read(port / name))]
    return f"{port.parents[1].name}/{port.name} {', '.join([state or 'unknown', *facts])}"


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
