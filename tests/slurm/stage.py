"""What one scenario has: runs, jobs, and the evidence where it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.slurm.figures import note
from tests.slurm.harness import Cluster, lines_of, until
from tests.slurm.runs import Undisturbed, attempts, finished, newest_step, nothing_lost

SHOWN = 80
"""Lines of a log."""


class Stage:
    def __init__(self, folder: Path, cluster: Cluster, undisturbed: Undisturbed) -> None:
        self.folder, self.cluster, self.undisturbed = folder, cluster, undisturbed
        folder.mkdir(parents=True)
        self.runs: list[Path] = []
        self.jobs: list[str] = []
        self._undo: list[Callable[[], None]] = []

    def run_left_at(self, step: int, name: str = "run") -> Path:
        """A run that stands at this step; 0: there is none yet, only its name."""
        run = self.folder / name
        self.runs.append(run)
        return self.undisturbed.left_at(step, run) if step else run

    def resume(self, run: Path, *words: str, nodes: int = 2, ranks_per_node: int = 2, time: str = "10") -> str:
        """Submits what goes on with a run, on CPU ranks; the number of the job."""
        return self.submit(run, "--resume", str(run), *words, nodes=nodes, ranks_per_node=ranks_per_node, time=time)

    def submit(self, run: Path, *words: str, nodes: int = 2, ranks_per_node: int = 2, time: str = "10") -> str:
        job = self.cluster.submit(run, *words, *shape(nodes=nodes, ranks_per_node=ranks_per_node, time=time))
        self.jobs.append(job)
        return job

    def trains_beyond(self, run: Path, step: int) -> int:
        """Waits until metrics.jsonl has a line of a later step; that step."""
        return until(f"step {step + 1} of {run.name}", lambda: max(0, newest_step(run) - step)) + step

    def trains_beyond_again(self, run: Path, step: int, start: int) -> None:
        """Waits until the attempt number `start` has done a step that is later than `step`."""
        began = attempts(run, "begin")[start - 1]["time"]
        until(
            f"start {start} does a step",
            lambda: any(line["step"] > step and line["time"] > began for line in lines_of(run / "metrics.jsonl")),
        )

    def is_the_undisturbed_run(self, run: Path, **figures: object) -> None:
        """The run is done, its figures and weights are those of the run that nobody disturbed, and no row was lost."""
        finished(run)
        assert self.undisturbed.differences(run) == []
        nothing_lost(run)
        self.note(run, **figures)

    def note(self, run: Path, **figures: object) -> None:
        """For docs/measured/slurm.json, when that is being made."""
        note(self.folder.name, run, self.undisturbed, figures)

    def power_cut(self, node: str) -> None:
        """The host is on again at the end of the test at the latest."""
        self._undo.append(lambda: self.cluster.revive(node))
        self.cluster.power_cut(node)

    def prepared_power_cut(self, node: str) -> Callable[[], None]:
        """A power cut within milliseconds of the call."""
        self._undo.append(lambda: self.cluster.revive(node))
        return self.cluster.prepared_power_cut(node)

    def partition(self, name: str, size: int) -> list[str]:
        """A partition of so many hosts that are idle now; their names."""
        idle = self.cluster.run("sinfo", "--noheader", "-N", "-t", "idle", "-p", "main", "-o", "%n").stdout.split()
        hosts = idle[-size:]
        self.cluster.run("scontrol", "create", f"PartitionName={name}", f"Nodes={','.join(hosts)}").expect(0)
        self._undo.append(lambda: self._drop(name))
        return hosts

    def _drop(self, partition: str) -> None:
        self.cluster.run("scontrol", "delete", f"PartitionName={partition}")

    def unplug(self, node: str) -> None:
        self._undo.append(lambda: self.cluster.plug(node))
        self.cluster.unplug(node)

    def log(self, run: Path) -> str:
        """What the run's jobs have printed."""
        return "\n".join(file.read_text(errors="replace") for file in sorted((run / "slurm").glob("job-*.log")))

    def close(self) -> None:
        for job in self.jobs:
            self.cluster.run("scancel", "--quiet", job)
        for undo in reversed(self._undo):
            with suppress(RuntimeError):
                undo()

    def evidence(self) -> list[tuple[str, str]]:
        """Sections for the report of a test that failed."""
        found = []
        for run in self.runs:
            for file in sorted((run / "slurm").glob("*")):
                found.append((f"{run.name}/slurm/{file.name}", _end_of(file)))
            found += [(f"{run.name}/{file.name}", _end_of(file)) for file in sorted(run.glob("*.json*")) if _told(file)]
        found += [(f"job {job}", self.cluster.run("scontrol", "show", "job", job).printed) for job in self.jobs]
        found.append(("hosts and queue", self.cluster.run("sinfo", "-N", "-l").printed + self._queue()))
        return [*found, ("end of slurmctld.log", self.cluster.log())]

    def _queue(self) -> str:
        return self.cluster.run("squeue", "--all").printed


def shape(*, nodes: int, ranks_per_node: int, time: str) -> tuple[str, ...]:
    """Of a job on CPU ranks, in words of `limoe submit`. time: minutes."""
    return (
        *("--nodes", str(nodes), "--ranks-per-node", str(ranks_per_node), "--gpus-per-node", "0"),
        *("--time", time, "--cpus-per-rank", "1"),
    )


def _told(file: Path) -> bool:
    """Short files alone: metrics.jsonl says little to the eye."""
    return file.name not in ("metrics.jsonl", "positions.jsonl", "run.json")


def _end_of(file: Path) -> str:
    try:
        return "\n".join(file.read_text(errors="replace").splitlines()[-SHOWN:])
    except OSError as error:
        return str(error)
