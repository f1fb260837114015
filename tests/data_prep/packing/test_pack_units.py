"""The same bytes whoever does the work: one process, a pool, units, ranks of mpirun; killed or failed anywhere."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.cli import main
from data_prep.imaging.pictures import Caps
from data_prep.imaging.transform import Transform
from data_prep.packing.claims import claim, door
from data_prep.packing.pack import PackSettings, pack
from data_prep.sources.opening import open_sources
from data_prep.sources.source import Block, License, Source
from data_prep.units import WHOLE, Meeting, Unit
from limoe_dist.config.errors import UserError
from tests.data_prep.pictures_of import encoded, folder_source, noisy
from tests.support.pack_faults import with_fault

SETTINGS = PackSettings("test", Transform(Caps(1_000_000, 100_000)), shard_bytes=2_000, group_rows=12)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Four folders of 12 rows, each a block, one of them broken: four groups."""
    folder = tmp_path_factory.mktemp("sources")
    return [_source(folder / name, seed) for seed, name in enumerate(("a", "b", "c", "d"))]


def _source(folder, seed):
    rows = [{"image": f"{n}.png", "caption": f"picture {n} of {folder.name}"} for n in range(12)]
    pictures = {f"{n}.png": encoded(noisy(100 * seed + n)) for n in range(11)}
    return folder_source(folder, rows, pictures | {"11.png": b"no picture"})


@pytest.fixture(scope="module")
def one_process(sources, tmp_path_factory):
    """What one process packs, by file."""
    out = tmp_path_factory.mktemp("one") / "out"
    packed = run(sources, out)
    assert (packed.manifest.rows, packed.rejected, packed.groups) == (44, 4, 4)
    assert len(packed.manifest.shards) == 4 * 4
    return content(out)


def run(sources, out, *, unit=WHOLE, workers=1, settings=SETTINGS):
    console = Console(file=io.StringIO())
    return pack(lambda: open_sources(sources), out, settings, unit=unit, workers=workers, console=console)


def content(out):
    """Every file of a packed set by name, but its notes."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}


def command(sources, out, *more, shard_mb="0.002"):
    words = ["prep", "pack", "--source", *map(str, sources), "--out", str(out), "--name", "test"]
    words += ["--shard-mb", shard_mb, "--group-rows", "12", "--max-image-mb", "1", "--max-megapixels", "0.1", *more]
    return [sys.executable, "-m", "limoe_dist", *words]


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "SLURM_"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def test_a_pool_of_three_gives_the_bytes_of_one_process(sources, one_process, tmp_path):
    run(sources, tmp_path / "out", workers=3)
    assert content(tmp_path / "out") == one_process


def test_units_in_any_order_give_the_bytes_of_one_process(sources, one_process, tmp_path):
    out = tmp_path / "out"
    first = run(sources, out, unit=Unit(1, 2))
    assert (first.manifest, first.done, first.groups) == (None, 2, 4)
    assert not (out / "manifest.json").exists()
    assert run(sources, out, unit=Unit(1, 2)).manifest is None
    assert run(sources, out, unit=Unit(0, 2)).manifest.rows == 44
    assert content(out) == one_process
    assert run(sources, out, unit=Unit(1, 2)).skipped


def test_ranks_of_mpirun_give_the_bytes_of_one_process_and_one_of_them_tells(sources, one_process, tmp_path):
    out = tmp_path / "out"
    done = _mpirun(3, command(sources, out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("44 rows in 16 shards") == 1
    assert content(out) == one_process


def _mpirun(ranks, words):
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert mpirun, "mpirun is part of the requirements"
    words = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), *words]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("how", ["kill before", "kill within"])
def test_killed_at_any_operation_and_begun_again_gives_the_same_bytes(sources, one_process, tmp_path, how):
    operations = with_fault(lambda: run(sources, tmp_path / "count"), -1, how)
    assert content(tmp_path / "count") == one_process
    assert operations > 100
    # All of them: python -m tests.soak.pack_kill. The last two are the manifest's.
    for at in (0, 1, operations // 2, operations - 2, operations - 1):
        out = tmp_path / str(at)
        assert with_fault(lambda out=out: run(sources, out), at, how) is None
        run(sources, out)
        assert content(out) == one_process, f"killed at operation {at} of {operations}"


def test_a_full_disk_is_told_and_what_is_done_is_kept(sources, one_process, tmp_path):
    operations = with_fault(lambda: run(sources, tmp_path / "count"), -1, "ENOSPC")
    for at in (3, operations // 2):
        out = tmp_path / str(at)
        told = with_fault(lambda out=out: run(sources, out), at, "ENOSPC")
        assert f"--out {out}: cannot be written: No space left on device" in told
        assert not (out / "manifest.json").exists()
        done = {file: file.stat().st_mtime_ns for file in out.glob("groups/group-*.json")}
        assert bool(done) == (at > 3)
        run(sources, out)
        assert content(out) == one_process
        assert {file: file.stat().st_mtime_ns for file in done} == done


def test_a_write_that_the_system_cuts_off_is_one_line_and_status_2(sources, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))

    words = command(sources, tmp_path / "out", "--workers", "1")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"limoe: error: --out {tmp_path / 'out'}: cannot be written: File too large")
    assert not list((tmp_path / "out").glob("*.arrow"))


def test_an_output_that_cannot_be_made_is_one_line(sources, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        run(sources, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="is a file: name a folder"):
        run(sources, tmp_path / "file")


def test_the_command_is_killed_with_its_pool_and_goes_on(tmp_path):
    rows = [{"image": f"{n}.png", "caption": f"picture {n}"} for n in range(36)]
    large = encoded(noisy(1, size=(150, 150)))
    sources = [folder_source(tmp_path / name, rows, {row["image"]: large for row in rows}) for name in ("a", "b", "c")]
    out = tmp_path / "out"
    words = command(sources, out, "--workers", "2", shard_mb="1")
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    _wait(lambda: list(out.glob("groups/group-*.json")) or process.poll() is not None)
    process.kill()
    process.wait()
    # The workers see that their parent is gone: none of that session is left.
    _wait(lambda: not _session(process.pid))
    assert not (out / "manifest.json").exists()
    subprocess.run(words, env=environment(), stdout=subprocess.DEVNULL, check=True, timeout=60)
    settings = PackSettings("test", Transform(Caps(1_000_000, 100_000)), shard_bytes=1_000_000, group_rows=12)
    run(sources, tmp_path / "undisturbed", settings=settings)
    assert content(out) == content(tmp_path / "undisturbed")


def _wait(until, *, limit_s=30.0):
    end = time.monotonic() + limit_s
    while not until():
        assert time.monotonic() < end
        time.sleep(0.005)


def _session(leader):
    """Live processes of the session that `leader` began."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == leader and state != "Z":
            found.append(process.name)
    return found


def test_a_drop_list_that_one_rank_cannot_read_is_told_to_all_ranks(sources, tmp_path, monkeypatch):
    """A rank that ended alone would leave the others waiting for it at their first meeting."""
    told = []

    class Meets(Meeting):
        def all_or_none(self, work):
            try:
                return work()
            except UserError as error:
                told.append(str(error))
                raise

    monkeypatch.setattr("data_prep.units.find_meeting", Meets)
    with pytest.raises(UserError, match="absent"):
        main(["pack", "--source", str(sources[0]), "--out", str(tmp_path / "out"), "--drop", "absent.txt"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        main(["pack", "--source", str(sources[0]), "--out", str(tmp_path / "file")])
    assert [error.partition(":")[0] for error in told] == ["absent.txt", f"--out {tmp_path / 'file'}"]


def test_a_second_packer_of_the_same_unit_is_refused(sources, tmp_path):
    out = tmp_path / "out"
    run(sources, out, unit=Unit(0, 2))
    with door(out / "groups"):
        held = claim(out / "groups", Unit(1, 2), "x")
    with held:
        with pytest.raises(
            UserError, match=r"unit 1 of 2 is being written by process \d+ on .*: wait for it, or stop it"
        ):
            run(sources, out, unit=Unit(1, 2))
        with pytest.raises(UserError, match="unit 1 of 2 is being packed there now, and unit 0 of 1 would do some"):
            run(sources, out)
        other = PackSettings("test", SETTINGS.transform, seed=1)
        with pytest.raises(UserError, match="other inputs or settings are being packed there now"):
            run(sources, out, settings=other)
        assert run(sources, out, unit=Unit(0, 2)).manifest is None
    assert run(sources, out, unit=Unit(1, 2)).manifest.rows == 44


@dataclass(frozen=True)
class Faulty:
    """A source of four blocks; the third cannot be read."""

    good: Source
    fault: Callable[[], None]
    name: str = "faulty"
    licenses: dict[str, License] = field(default_factory=dict)
    blocks: tuple[Block, ...] = tuple(Block(0, 3 * n, 3) for n in range(4))

    def fingerprint(self):
        return "always"

    def read(self, block):
        if block.first == 6:
            self.fault()
        return self.good.read(block)


def vanish():
    raise UserError("s3://bucket/part.tar: there is no such file")


def die():
    time.sleep(0.5)  # the other worker has done its groups by then
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "workers", "told"),
    [
        (vanish, 1, "part.tar: there is no such file"),
        (vanish, 2, "part.tar: there is no such file"),
        (die, 2, "--workers=2: a worker was killed, perhaps because memory ran out: groups that are done are kept"),
    ],
)
def test_a_source_that_vanishes_and_a_worker_that_dies_are_told_and_what_is_done_is_kept(
    sources, tmp_path, fault, workers, told
):
    (good,) = open_sources(sources[:1])
    settings, out, console = replace(SETTINGS, group_rows=3), tmp_path / "out", Console(file=io.StringIO())
    with pytest.raises(UserError, match=told):
        pack(lambda: [Faulty(good, fault)], out, settings, workers=workers, console=console)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("groups/group-*.json")}
    assert not (out / "manifest.json").exists()
    if fault is die:
        assert len(kept) == 3
    packed = pack(lambda: [Faulty(good, time.time)], out, settings, console=console)
    assert (packed.manifest.rows, packed.groups) == (11, 4)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
