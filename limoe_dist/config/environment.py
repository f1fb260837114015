"""The environment of a start, as far as it says how the run was computed, and without what may be secret."""

from __future__ import annotations

import re
from collections.abc import Mapping

KEPT = (
    "SLURM_",
    "SLURMD_",
    "OMPI_",
    "PMIX_",
    "PMI_",
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "CUDA_",
    "NVIDIA_",
    "TORCH",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "DALI_",
    "DS_",
    "LIMOE_",
    "PYTHON",
    "CONDA_",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
)
"""Beginnings of the names that are kept: only those that are known to matter, so that no stranger's secret slips in."""
KEPT_WHOLE = {"RANK", "WORLD_SIZE", "HOSTNAME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "TMPDIR", "LANG", "TZ"}
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH|JWT|COOKIE|SIGNATURE|PRIVATE|CERT", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_SECRET_IN_VALUE = re.compile(
    r"(?i)((?:key|token|secret|passw(?:or)?d|pwd|credential|auth|signature)[^=:\s]*[=:])[^\s&;,]+"
)
HIDDEN = "(hidden)"
LONGEST = 4096


def captured(environ: Mapping[str, str]) -> dict[str, str]:
    """By name: launchers', schedulers', communication's and Python's variables; what may be secret is `(hidden)`.

    A variable is secret by its name; in a value, what stands before the @ of a URL, and behind key=, token= and such.
    """
    return {
        name: HIDDEN if _SECRET_NAME.search(name) else _without_secrets(value)[:LONGEST]
        for name, value in sorted(environ.items())
        if name in KEPT_WHOLE or name.startswith(KEPT)
    }


def _without_secrets(value: str) -> str:
    return _SECRET_IN_VALUE.sub(rf"\1{HIDDEN}", _USER_IN_URL.sub(f"{HIDDEN}@", value))
