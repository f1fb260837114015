"""What `limoe doctor` looks at, one probe a function, by subject; nothing here needs a package to be imported."""

from launch.probes.cluster import containers, fabric, slurm
from launch.probes.finding import Probe
from launch.probes.machine import cpu, disk, limits, memory, shared_memory
from launch.probes.packages import apex, arrow, dali, deepspeed, installed, mpi, node, python, torch

MACHINE: tuple[Probe, ...] = (cpu, memory, disk, shared_memory, limits)
ALL: tuple[Probe, ...] = (python, torch, dali, arrow, deepspeed, apex, mpi, slurm, containers, fabric, node, *MACHINE)
QUICK: tuple[Probe, ...] = (python, installed, *MACHINE)
"""Looks only: no package is imported, no program started."""
