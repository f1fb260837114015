"""What the machine or the container gives to a run: cores, memory, disk, limits."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from pathlib import Path

from launch.probes.finding import Finding, missing, ok, read

LEAST_FILES = 4096


def cpu() -> list[Finding]:
    usable = len(os.sched_getaffinity(0))
    found = f"{usable} of {os.cpu_count()} cores usable, {cpu_model()}"
    quota, *period = (read("/sys/fs/cgroup/cpu.max") or "max").split()
    if quota != "max" and period:
        found += f", container limit {int(quota) / int(period[0]):.1f}"
    return [ok("CPU", found)]


def cpu_model() -> str:
    """The processor's own name, or the machine's architecture."""
    lines = (read("/proc/cpuinfo") or "").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def memory() -> list[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = (read("/proc/meminfo") or "").splitlines()
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    found = f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB available"
    limit = read("/sys/fs/cgroup/memory.max")
    if limit and limit != "max":
        found += f", container limit {int(limit) / 1e9:.1f} GB"
    if available < 2e9:
        return [missing("memory", found, "two ranks of the preset tiny want about 2 GB: end other programs")]
    return [ok("memory", found)]


def disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 1e9:.1f} GB free in {Path.cwd()}"
    if free < 1e9:
        return [missing("disk", found, "room for checkpoints and shards: free 1 GB, or work elsewhere", needed=True)]
    return [ok("disk", found, needed=True)]


def shared_memory() -> list[Finding]:
    folder = Path("/dev/shm")
    how = "fast exchange between ranks of a node, NCCL's above all: in a container, `docker run --shm-size=8g`"
    if not folder.is_dir():
        return [missing("/dev/shm", "no such folder", how)]
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.2f} GB free"
    return [ok("/dev/shm", found) if free >= 5e8 else missing("/dev/shm", found, how)]


def limits() -> list[Finding]:
    """Files and sockets that one process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= LEAST_FILES:
        return [ok("open files", "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} a process")]
    how = f"ulimit -n {min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536}; docker run --ulimit nofile=65536"
    loss = f"sockets to some hundred ranks beside open shards: {how}"
    return [missing("open files", f"{soft} a process (ulimit -n); {LEAST_FILES} are wanted", loss)]
