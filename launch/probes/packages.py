"""What of Python and its packages is there: what computes, what reads data, what starts ranks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from typing import Any

from launch.probes.finding import SETUP, Finding, ProbeFailed, ask_python, find_program, missing, ok, output_of
from limoe_dist.parallel.apex import HOW, shortfall

NEEDED = {"torch": "torch", "DALI": "nvidia.dali", "Arrow": "pyarrow", "SentencePiece": "sentencepiece"}
"""Modules without which training cannot run."""


def python() -> list[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    # Not sys.version_info: checkers know that this project requires 3.11, its user may not.
    if tuple(int(part) for part in platform.python_version_tuple()[:2]) >= (3, 11):
        return [ok("Python", found, needed=True)]
    return [missing("Python", found, "3.11 or newer is needed: sudo apt install python3.11-venv", needed=True)]


def installed() -> list[Finding]:
    """For `--quick`: the packages that training needs are there; torch alone takes a second to import."""
    return [_findable(name, module) for name, module in NEEDED.items()]


def _findable(name: str, module: str) -> Finding:
    try:
        there = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # The package above it is not there either.
        there = False
    if there:
        return ok(name, "installed (not imported)", needed=True)
    return missing(name, f"no module {module}", f"training: {SETUP}", needed=True)


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


def node() -> list[Finding]:
    how = f"`limoe prep fetch-demo`: {SETUP}, or sudo apt install npm"
    programs = {name: find_program(name) for name in ("node", "npm")}
    lacking = [name for name, path in programs.items() if path is None]
    if lacking:
        return [missing("Node.js", f"{' and '.join(lacking)}: not on PATH nor beside this Python", how)]
    versions = [f"{name} {output_of([str(path), '--version']).removeprefix('v')}" for name, path in programs.items()]
    return [ok("Node.js", f"{', '.join(versions)} at {programs['npm']}")]
