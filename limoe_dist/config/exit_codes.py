"""How a command ended, for scripts and job schedulers: whether going on helps."""

from __future__ import annotations

DONE = 0
"""All that was asked for is there: train.steps are done, or the step of --stop-after."""
FAILED = 1
"""A fault: a crash, a host or rank that died or hangs. What was saved stands; starting again may help."""
MEND = 2
"""A setting, a file or a disk that a person can mend; starting again does not help."""
GUARDED = 3
"""The run stopped itself over its own numbers (guard.*); starting again does not help: look at RUN/guard.jsonl."""
GO_ON = 75
"""SIGUSR1 or SIGUSR2: the time of this job is up. Saved; to be gone on with (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""Ctrl-C (SIGINT). Of training: saved."""
TERMINATED = 143
"""SIGTERM. Of training: saved, where RUN/ended.json says so."""
