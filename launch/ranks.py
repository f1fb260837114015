"""`--ranks N`: starts N ranks of a limoe command on this machine, by torch's elastic launcher, and waits for them.

And what ranks must have been started with alike, whoever started them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping

from limoe_dist.config.errors import UserError
from limoe_dist.config.exit_codes import FAILED
from limoe_dist.config.parse import decisive
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import manifest_place, sha256_of
from limoe_dist.data.places import is_remote, local, read_small


def agreement(run: Run, *, files: Mapping[str, str], options: Mapping[str, object]) -> dict[str, str]:
    """By name, the text of what must be the same on all ranks: settings, options, and the content of files.

    files: paths or URLs by name; a folder stands for its manifest.json. Of `data` only what decides the order of the
    rows: paths and threads may differ from host to host, and only rank 0 writes what `log` is about.
    """
    content = run.model_dump(mode="json", exclude={"data", "log", "preset"})
    settings = {f"{section}.{name}": value for section, fields in content.items() for name, value in fields.items()}
    settings |= {name: value for name, value in decisive(run).items() if name.startswith("data.")}
    words = {name: json.dumps(value) for name, value in {"preset": run.preset, **settings, **options}.items()}
    return words | {f"sha256 of {name}": _checksum(path) for name, path in files.items()}


def _checksum(path: str) -> str:
    if not path:
        return "none given"
    if is_remote(path):
        return _remote_checksum(path)
    file = local(manifest_place(path))
    return sha256_of(file) if file.is_file() else "not there"


def _remote_checksum(url: str) -> str:
    """A URL does not tell whether it is a folder, whose manifest.json counts, or a file such as a vocabulary."""
    for place in dict.fromkeys((manifest_place(url), url)):
        try:
            return hashlib.sha256(read_small(place)).hexdigest()
        except UserError:
            continue
    return "not there"


def run_local(command: list[str], *, ranks: int, threads: int, grace_s: float) -> int:
    """Runs `python -m limoe_dist COMMAND` on `ranks` ranks; returns its exit status.

    On SIGTERM or Ctrl-C every rank gets the signal and `grace_s` seconds to save before it is killed;
    the status is then 128 + the signal's number. Otherwise it is the status of the first rank that failed; one that
    was ended by a signal cannot say so, and is named here.
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
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        cause = ": the system does that where memory runs out" if name == "SIGKILL" else ""
        print(f"limoe: error: rank {rank} was ended by signal {-failure.exitcode} ({name}){cause}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


def main(words: list[str]) -> int:
    """`python -m launch.ranks RANKS GRACE_S COMMAND...`: the launcher that launch/launchers.py calls torchrun."""
    threads = int(os.environ["OMP_NUM_THREADS"])
    status = run_local(words[2:], ranks=int(words[0]), threads=threads, grace_s=float(words[1]))
    # Of a signal that ended a rank it has told.
    return FAILED if status > 128 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
