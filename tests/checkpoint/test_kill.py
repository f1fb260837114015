"""Runs that are killed, and disks that fail, at every point of a save: nothing is lost but the step that was not saved.

The full figure is `make soak-kill`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from limoe_dist.checkpoint.catalog import checkpoint_folder, leftovers
from limoe_dist.config.schema import Run
from tests.soak.victim import (
    Victim,
    deaths_at_points,
    failed_at_points,
    frequent_run,
    killed_at_points,
    killed_at_random,
    undisturbed_run,
    write_points,
)
from tests.support.faults import ERRORS, Point
from tests.support.mortal_ranks import Nursery
from tests.support.shards import write_shards
from tests.support.undisturbed import Undisturbed, newest_whole

KILLS, UNTIL, SEED = 10, 8, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def nursery(folder: Path) -> Iterator[Nursery]:
    with Nursery(folder / "lives") as nursery:
        yield nursery


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return write_shards(folder / "shards", rows=64)


@pytest.fixture(scope="module")
def points(nursery: Nursery, folder: Path, data: Path) -> list[Point]:
    return write_points(nursery.live, frequent_run(data, steps=3), folder / "recorded")


@pytest.fixture(scope="module")
def run(data: Path, points: list[Point]) -> Run:
    """With steps for an error of each kind at each point, and a good save after them."""
    return frequent_run(data, steps=2 + (len(ERRORS) + 1) * len(points))


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, folder: Path, run: Run, data: Path) -> Undisturbed:
    return undisturbed_run(nursery.live, frequent_run(data, steps=run.train.steps, keep_all=True), folder / "through")


def test_a_name_is_given_only_to_what_is_on_the_disk(points: list[Point]) -> None:
    # A power cut, unlike a kill, loses what was written and not synced: no test can cut the power, so the order counts.
    names = [point.name for point in points if point.rank == 0]
    files = ["rank-00000.safetensors", "state.json", "manifest.json"]
    written = [f"{operation} {file}" for file in files for operation in ("create", "write", "sync", "close")]
    named = ["sync .saving", "rename .saving to step", "sync checkpoints", "sync RUN"]
    assert names[: len(written) + len(named) + 1] == ["make_folder .saving", *written, *named]
    # What is older goes after that.
    assert names[-1] == "remove .removing"
    file = "rank-00001.safetensors"
    assert [point.name for point in points if point.rank == 1] == [
        "make_folder .saving",
        *(f"{operation} {file}" for operation in ("create", "write", "sync", "close")),
    ]


def test_killed_at_every_write_point_a_run_goes_on_as_if_it_had_not_been(
    nursery: Nursery, folder: Path, run: Run, points: list[Point], undisturbed: Undisturbed
) -> None:
    victim = Victim(nursery.live, run, folder / "killed", undisturbed)
    # Death after a point is death before the next one, but for the last.
    ways = [*deaths_at_points(points, ("before", "within")), *deaths_at_points(points[-1:], ("after",))]
    deaths = list(killed_at_points(victim, ways))
    assert victim.differences == []
    assert len(deaths) == len(ways)
    assert {death.stage for death in deaths} >= {"write", "commit", "read back", "retire"}
    assert leftovers(victim.out) == []


def test_an_error_of_the_disk_at_any_write_point_costs_a_warning_and_that_checkpoint(
    nursery: Nursery, folder: Path, run: Run, points: list[Point], undisturbed: Undisturbed
) -> None:
    victim = Victim(nursery.live, run, folder / "failed", undisturbed)
    faults = failed_at_points(victim, points)
    assert victim.differences == []
    assert len(faults) == 2 * len(points)
    # Nothing of the saves that failed is left.
    assert [path.name for path in (victim.out / "checkpoints").iterdir()] == [f"step-{run.train.steps:08d}"]


def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(
    nursery: Nursery, folder: Path, run: Run, undisturbed: Undisturbed
) -> None:
    lives = list(
        killed_at_random(nursery.live, run, folder, undisturbed, kills=KILLS, until=UNTIL, chance=random.Random(SEED))
    )
    assert [victim.differences for victim, _ in lives] == [[]] * len(lives)
    assert sum(death is not None for _, death in lives) == KILLS


def test_what_a_kill_must_not_leave_behind_is_seen(undisturbed: Undisturbed, tmp_path: Path) -> None:
    def left(name: str) -> Path:
        """What a run leaves that was killed after it had saved step 3."""
        for step in (2, 3):
            folder = checkpoint_folder(undisturbed.out, step)
            shutil.copytree(folder, checkpoint_folder(tmp_path / name, step))
        for lines in ("metrics.jsonl", "positions.jsonl"):
            shutil.copy(undisturbed.out / lines, tmp_path / name)
        assert undisturbed.differences(tmp_path / name, at_least=3) == []
        return tmp_path / name

    lost = left("lost")
    (found,) = undisturbed.differences(lost, at_least=4)
    assert "the newest whole checkpoint is of step 3, but that of 4 was told" in found

    half = left("half")
    (checkpoint_folder(half, 3) / "manifest.json").unlink()
    (found,) = undisturbed.differences(half, at_least=2)
    assert "has no manifest" in found

    flipped = left("flipped")
    file = checkpoint_folder(flipped, 3) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    (found,) = undisturbed.differences(flipped, at_least=2)
    assert "rank-00001.safetensors was changed after it was written" in found
    assert newest_whole(flipped) == 2

    other = left("other")
    lines = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(lines.replace('"step": 3,', '"step": 3, "more": 1,'))
    (found,) = undisturbed.differences(other, at_least=3)
    assert "metrics.jsonl: lines up to step 3 differ" in found
