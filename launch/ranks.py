"""`--ranks N`: starts N ranks of a limoe command on this machine, by torch's elastic launcher, and waits for them."""

from __future__ import annotations

import logging
import os
import sys
import uuid


def run_local(command: list[str], *, ranks: int, threads: int, grace_s: float) -> int:
    """Runs `python -m limoe_dist COMMAND` on `ranks` ranks; returns its exit status.

    On SIGTERM or Ctrl-C every rank gets the signal and `grace_s` seconds to save before it is killed;
    the status is then 128 + the signal's number. Otherwise it is the status of the first rank that failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say themselves what went wrong; the launcher's own account of it is no use to a reader.
    logging.disable(logging.ERROR)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=int(grace_s),
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "limoe_dist", *command)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        status: int = failed.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    return 0
