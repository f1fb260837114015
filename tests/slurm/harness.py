"""The cluster of tests/slurm/cluster from Python: hosts, their power and cables, jobs, and waiting for things."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster")
SUBNET = "10.213.31"
RATE = "16mbit"
"""What a host may send in a second. A step then takes about 0.2 s, most of it waiting for the network: as long on a
fast machine as on a slow one, never shorter, and scenarios that overlap hardly disturb each other."""
LIMIT_S = 600.0
"""Within which what a test waits for comes, on a machine with other things to do."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")


def until(what: str, found: Callable[[], T], *, seconds: float = LIMIT_S, every: float = 0.25) -> T:
    """What `found` returns as soon as that is true. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(every)
    return result


@dataclass(frozen=True)
class Cluster:
    folder: Path
    """Of its daemons: sockets below it make a short path necessary."""

    def start(self, nodes: int) -> None:
        """Two CPUs a host, so that a job of two ranks a host shares none with another. Raises RuntimeError."""
        self._verb("start", "--nodes", str(nodes), "--cpus", "2", "--gpus", "0", "--mem", "100000")
        for number in range(nodes):
            self._slow_down(f"n{number + 1}")

    def stop(self) -> None:
        self._verb("stop", "--purge")

    def power_cut(self, node: str) -> None:
        self._verb("kill-node", node)

    def prepared_power_cut(self, node: str) -> Callable[[], None]:
        """A power cut that takes milliseconds, for the middle of something short: cable first, then every process."""
        pids = {name: (self.folder / "run" / f"{name}.init").read_text().split()[0] for name in ("ctl", node)}

        def cut() -> None:
            subprocess.run(["nsenter", "-t", pids["ctl"], "-n", "ip", "link", "set", f"v-{node}", "down"], check=True)
            os.kill(int(pids[node]), signal.SIGKILL)
            self.power_cut(node)

        return cut

    def revive(self, node: str) -> None:
        self._verb("revive-node", node)
        self._slow_down(node)

    def unplug(self, node: str) -> None:
        self._verb("net-down", node)

    def plug(self, node: str) -> None:
        self._verb("net-up", node)

    def run(self, *command: str, on: str = "ctl", environ: Mapping[str, str] | None = None) -> Done:
        """A command on one of the hosts, to its end."""
        words = [str(SCRIPT), "exec", "--on", on, "--", *command]
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=self._environ | dict(environ or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=LIMIT_S,
        )
        return Done(command, done.returncode, done.stdout, done.stderr)

    def limoe(self, *words: str, environ: Mapping[str, str] | None = None) -> Done:
        """`limoe ...` on the host of the controller, which stands for a login node."""
        return self.run(sys.executable, "-m", "limoe_dist", *words, environ=environ)

    def submit(self, run: Path, *words: str) -> str:
        """`limoe submit ... --yes`; the number of the job. The first one, where it is a chain."""
        self.limoe("submit", *words, "--yes").expect(0)
        return str(lines_of(run / "slurm" / "submissions.jsonl")[-1]["jobs"][0])

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by name: JobState, Restarts, NodeList, ExitCode, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait(self, job: str, *states: str, restarts: int | None = None, seconds: float = LIMIT_S) -> dict[str, str]:
        """The job's state once it is one of these. A job that ends in another state is an AssertionError at once."""

        def there() -> dict[str, str]:
            state = self.state(job)
            now = state.get("JobState", "")
            if now in states and (restarts is None or int(state["Restarts"]) == restarts):
                return state
            # A job that Slurm or its script puts back goes through such a state for a moment.
            if now in ENDED and now not in states and not _comes_back(self, job):
                raise AssertionError(f"job {job} is {now}, which is none of {', '.join(states)}")
            return {}

        return until(f"job {job}: {' or '.join(states)}", there, seconds=seconds)

    def nodes(self, job: str) -> list[str]:
        """The hosts of a job that runs, the first one first."""
        names = self.state(job)["NodeList"]
        return self.run("scontrol", "show", "hostnames", names).stdout.split()

    def ranks(self, run: Path, node: str) -> dict[int, int]:
        """The processes that train in `run` on a host: by rank, their numbers there."""
        listed = self.run("pgrep", "-f", f"limoe_dist train .*{run}", on=node).stdout.split()
        found: dict[int, int] = {}
        for pid in sorted(map(int, listed)):
            # The batch script's srun has the same words; it is no task.
            words = self.run("cat", f"/proc/{pid}/environ", on=node).stdout.split("\0")
            environ = dict(word.partition("=")[::2] for word in words)
            if "SLURM_STEP_NUM_TASKS" in environ:
                found.setdefault(int(environ["SLURM_PROCID"]), pid)
        return found

    def signal(self, name: str, pid: int, *, on: str) -> None:
        self.run("kill", f"-{name}", str(pid), on=on).expect(0)

    @contextmanager
    def frozen_file(self, file: Path, node: str) -> Iterator[None]:
        """On that host alone a process that opens the file waits for ever, as on a mount whose server has gone."""
        fifo = self.folder / f"frozen-{node}-{file.name}"
        os.mkfifo(fifo)
        self.run("mount", "--bind", str(fifo), str(file), on=node).expect(0)
        try:
            yield
        finally:
            self.run("umount", str(file), on=node)
            fifo.unlink()

    def log(self, lines: int = 60) -> str:
        """The end of the controller's log."""
        try:
            return "\n".join((self.folder / "log" / "slurmctld.log").read_text().splitlines()[-lines:])
        except OSError as error:
            return str(error)

    @property
    def _environ(self) -> dict[str, str]:
        ours = {"SLURM_CLUSTER_DIR": str(self.folder), "SLURM_CLUSTER_SUBNET": SUBNET, "OMP_NUM_THREADS": "1"}
        # What a job inherits from the shell that submits: not this test run's own.
        return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | ours

    def _verb(self, *words: str) -> None:
        done = subprocess.run([SCRIPT, *words], env=self._environ, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode:
            raise RuntimeError(f"cluster {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")

    def _slow_down(self, node: str) -> None:
        bucket = ("tbf", "rate", RATE, "burst", "32k", "latency", "2s")
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", *bucket, on=node).expect(0)


def _comes_back(cluster: Cluster, job: str) -> bool:
    """Whether a job that seemed to have ended is in the queue again a moment later."""
    time.sleep(3.0)
    return cluster.state(job).get("JobState", "") not in ENDED


@dataclass(frozen=True)
class Done:
    command: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    @property
    def printed(self) -> str:
        return self.stdout + self.stderr

    def expect(self, *statuses: int) -> Done:
        """Itself. Raises AssertionError, with what it printed, where it ended otherwise."""
        assert self.status in statuses, f"{' '.join(self.command)}: status {self.status}\n{self.printed}"
        return self


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; none where it is not there."""
    found = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def one_line_error(done: Done, *, status: int, says: Sequence[str]) -> None:
    """The command ended with one readable line that holds all of `says`, and no traceback."""
    done.expect(status)
    told = [line for line in done.stderr.splitlines() if line.startswith("limoe: error:")]
    assert len(told) == 1, done.printed
    assert "Traceback" not in done.printed, done.printed
    for text in says:
        assert text in told[0], done.printed
