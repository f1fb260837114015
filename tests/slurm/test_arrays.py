"""Preparation of data as a Slurm array: indices that fail once, or always, and those that are submitted alone later."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from tests.slurm.harness import Cluster, Done, until
from tests.slurm.stage import Stage

UNITS = 3
RESTARTS = 2
"""So often an index that failed is put into the queue again."""


def test_an_index_that_fails_once_is_done_again(stage: Stage):
    out = stage.folder / "packed"
    with Killer(stage.cluster, out, index=1, times=1) as killer:
        report = _array(stage, out)
    assert killer.killed == 1
    assert f"done: {UNITS} of {UNITS} indices" in report
    assert "restart 1 of 2" in (_notes(out) / "001" / "1.log").read_text()
    _others_were_left_alone(out, 1)
    assert _shards(out) == _shards(_packed_here(stage))


def test_an_index_that_always_fails_is_named_and_can_be_submitted_alone(stage: Stage):
    out = stage.folder / "packed"
    with Killer(stage.cluster, out, index=2, times=1 + RESTARTS) as killer:
        report = _array(stage, out)
    assert killer.killed == 1 + RESTARTS
    assert f"failed: 1 of {UNITS} indices: 2" in report
    assert (_notes(out) / "001" / "2").read_text().strip() == "137"
    _others_were_left_alone(out, 2)
    again = re.search(r"again: limoe (.*)", report)
    assert again, report
    report = _array(stage, out, words=again[1].split())
    assert "done: 1 of 1 indices" in report
    assert _shards(out) == _shards(_packed_here(stage))


class Killer:
    """Kills the process of one index as soon as it is there, so many times: as an operating system out of memory."""

    def __init__(self, cluster: Cluster, out: Path, *, index: int, times: int) -> None:
        self.cluster, self.out, self.index, self.times = cluster, out, index, times
        self.killed = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        seen: set[tuple[str, str]] = set()
        while self.killed < self.times and not self._over.wait(0.05):
            for node in self.cluster.run("squeue", "--noheader", "-t", "R", "-o", "%N").stdout.split():
                pattern = f"limoe_dist prep pack .*{self.out} .*--unit {self.index}/"
                for pid in self.cluster.run("pgrep", "-f", pattern, on=node).stdout.split():
                    # One process of an index may have children of the same words.
                    if (node, pid) not in seen and self._kill(node, pid):
                        self.killed += 1
                    seen.add((node, pid))

    def _kill(self, node: str, pid: str) -> bool:
        return self.cluster.run("kill", "-KILL", pid, on=node).status == 0


def _array(stage: Stage, out: Path, words: list[str] | None = None) -> str:
    """Submits the array, or a command line that a report gave, and waits; what its report says."""
    words = words or [
        *("submit-prep", "--time", "10", "--tasks", str(UNITS), "--cpus", "1", "--"),
        *_pack(stage, out),
    ]
    done = stage.cluster.limoe(words[0], "--yes", *words[1:]).expect(0)
    number = _number(done)
    stage.jobs.append(number)
    report = re.search(r"cat (\S+report\.log)\s+\(job (\d+)", done.stdout)
    assert report, done.printed
    state = stage.cluster.wait(report[2], "COMPLETED", "FAILED")
    text = Path(report[1]).read_text()
    # The report fails where an index did, so that others may depend on it.
    assert (state["JobState"] == "COMPLETED") == ("done:" in text), text
    return text


def _number(done: Done) -> str:
    found = re.search(r"submitted array (\d+)", done.stdout)
    assert found, done.printed
    return found[1]


def _pack(stage: Stage, out: Path) -> tuple[str, ...]:
    source = f"shards:{stage.undisturbed.manifest}"
    return ("pack", "--source", source, "--out", str(out), "--group-rows", "64", "--workers", "1")


def _packed_here(stage: Stage) -> Path:
    """The same by one process."""
    out = stage.folder / "alone"
    stage.cluster.limoe("prep", *_pack(stage, out)).expect(0)
    return out


def _others_were_left_alone(out: Path, failed: int) -> None:
    """Starting one index again is no start of the array: its last index has the number of the array itself."""
    for index in {*range(UNITS)} - {failed}:
        assert "CANCELLED" not in (_notes(out) / "001" / f"{index}.log").read_text()


def _notes(out: Path) -> Path:
    return out.with_name(out.name + ".slurm")


def _shards(out: Path) -> dict[str, bytes]:
    until("the manifest", lambda: (out / "manifest.json").exists(), seconds=30)
    return {path.name: path.read_bytes() for path in out.glob("*.arrow")}
