"""What every file of figures says about where it comes from: command, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import torch

from launch.probes.machine import cpu_model


def origin(module: str) -> dict[str, Any]:
    """command: that of this process, which runs `python -m MODULE`."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "limoe-dist": version("limoe-dist"),
        },
        "machine": {"cores": len(os.sched_getaffinity(0)), "cpu": cpu_model()},
    }
