"""The cache of shards: fetched once, never over its limit, never removed while it is read, whoever dies."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Data
from limoe_dist.data import cache as cache_module
from limoe_dist.data import file_locks, remote
from limoe_dist.data.cache import CacheClosedError, LocalShard, ShardCache, Wanted, open_cache
from limoe_dist.data.remote import Patience
from tests.support.store import Store, shard_bytes

SIZE = 100_000
QUICK = Patience(retries=2, backoff_s=0.001, stall_s=20)


@pytest.fixture(scope="module")
def open_store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


@pytest.fixture
def store(open_store: Store) -> Iterator[Store]:
    open_store.asked.clear()
    open_store.faults.clear()
    open_store.most_at_once = 0
    yield open_store
    open_store.gate.set()
    open_store.latency_s, open_store.bytes_per_s = 0.0, float("inf")


@pytest.fixture
def shards(store: Store) -> list[Wanted]:
    return [store.put(f"{i}.arrow", shard_bytes(SIZE, i)) for i in range(6)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., ShardCache]]:
    """make(shards): a cache with room for so many; each call is what another process would have."""
    made: list[ShardCache] = []

    def one(room: float = 10, *, folder: Path = tmp_path / "cache", patience: Patience = QUICK) -> ShardCache:
        made.append(ShardCache(folder, limit_bytes=int(room * SIZE), patience=patience, reserve_bytes=0))
        return made[-1]

    yield one
    for cache in made:
        cache.close()


def take(cache: ShardCache, wanted: Wanted) -> LocalShard:
    return cache.local_path(wanted.url, bytes=wanted.bytes, sha256=wanted.sha256)


def is_whole(path: Path, wanted: Wanted) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == wanted.sha256


def eventually(holds: Callable[[], bool], limit_s: float = 10) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def here(tmp_path: Path, shards: list[Wanted]) -> list[int]:
    """The numbers of the shards that are in the cache, whole."""
    return [i for i, wanted in enumerate(shards) if (tmp_path / "cache" / f"{wanted.sha256}.arrow").exists()]


def test_a_shard_is_fetched_once_and_found_after_that(store, shards, make, tmp_path):
    cache = make()
    for _ in range(3):
        with take(cache, shards[0]) as shard:
            assert is_whole(shard.path, shards[0])
    with take(make(), shards[0]):
        assert store.requests("0.arrow") == 1
    counts = cache.counts
    assert (counts.hits, counts.waits, counts.fetched, counts.fetched_bytes) == (2, 1, 1, SIZE)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f"{shards[0].sha256}.arrow", "room.lock"]


def test_another_manifest_with_the_same_shard_shares_it(store, shards, make):
    again = store.put("elsewhere.arrow", store.files["0.arrow"])
    cache = make()
    take(cache, shards[0]).release()
    take(cache, again).release()
    assert store.requests("elsewhere.arrow") == 0


def test_what_is_wanted_is_fetched_before_it_is_asked_for(store, shards, make, tmp_path):
    cache = make()
    cache.want(shards[:4])
    eventually(lambda: here(tmp_path, shards) == [0, 1, 2, 3])
    asked = len(store.asked)
    assert asked == 4
    for wanted in shards[:4]:
        with take(cache, wanted) as shard:
            assert is_whole(shard.path, wanted)
    assert len(store.asked) == asked
    assert cache.counts.waits == 0


def test_two_fetchers_work_at_once(store, shards, make, tmp_path):
    store.gate.clear()
    make().want(shards[:3])
    eventually(lambda: store.most_at_once == 2)
    assert {path for path, _ in store.asked} == {"0.arrow", "1.arrow"}
    store.gate.set()
    eventually(lambda: here(tmp_path, shards) == [0, 1, 2])


def test_a_new_wish_replaces_the_old_one(store, shards, make, tmp_path):
    store.gate.clear()
    cache = make()
    cache.want(shards[:4])
    eventually(lambda: len(store.asked) == 2)
    cache.want([shards[5]])
    store.gate.set()
    # The two that had been begun are brought to their end; 2 and 3 are nobody's wish.
    eventually(lambda: here(tmp_path, shards) == [0, 1, 5])
    assert {path for path, _ in store.asked} == {"0.arrow", "1.arrow", "5.arrow"}


def test_three_processes_fetch_each_shard_once(store, shards, tmp_path):
    listed = json.dumps([[one.url, one.bytes, one.sha256] for one in shards])
    readers = [_reader(tmp_path / "cache", 10 * SIZE, listed) for _ in range(3)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    store.latency_s = 0.05  # time enough for all to ask for the same
    answers = [reader.communicate("\n", timeout=30)[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert sorted(path for path, _ in store.asked) == [f"{i}.arrow" for i in range(6)]
    assert sum(json.loads(answer)["fetched"] for answer in answers) == 6


def test_when_the_process_that_fetches_is_killed_another_takes_over(store, shards, make, tmp_path):
    store.gate.clear()
    listed = json.dumps([[shards[0].url, SIZE, shards[0].sha256]])
    reader = _reader(tmp_path / "cache", 10 * SIZE, listed)
    reader.stdin.write("\n")
    reader.stdin.flush()
    eventually(lambda: len(store.asked) == 1)
    taken: list[LocalShard] = []
    waiting = threading.Thread(target=lambda: taken.append(take(make(), shards[0])))
    waiting.start()
    time.sleep(0.1)
    assert len(store.asked) == 1
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    eventually(lambda: len(store.asked) == 2)
    store.gate.set()
    waiting.join(timeout=10)
    assert is_whole(taken[0].path, shards[0])
    assert not list((tmp_path / "cache").glob("*.part"))


def _reader(folder: Path, limit_bytes: int, listed: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.shard_reader", str(folder), str(limit_bytes), listed],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_folder_is_never_larger_than_its_limit(store, shards, make, tmp_path):
    caches = [make(room=2.5), make(room=2.5)]
    most, ended = [0], threading.Event()

    def watch() -> None:
        folder = tmp_path / "cache"
        while not ended.is_set():
            # Looked at in one moment: nothing comes or goes while somebody has this lock.
            if held := file_locks.try_lock(folder / "room.lock", "exclusive", create=False):
                with held:
                    most[0] = max(most[0], sum(path.stat().st_size for path in folder.glob("*.[ap]*")))
            time.sleep(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for round_ in range(3):
        for cache in caches:
            cache.want(shards[round_:])
        for wanted in shards[round_:]:
            for cache in caches:
                take(cache, wanted).release()
    ended.set()
    watcher.join()
    assert 2 * SIZE <= most[0] <= 2.5 * SIZE


def test_the_shard_that_was_used_least_recently_goes_first(shards, make, tmp_path):
    cache = make(room=3.5)
    for number in (0, 1, 2, 0, 3):
        take(cache, shards[number]).release()
    assert here(tmp_path, shards) == [0, 2, 3]


def test_a_shard_that_is_read_stays(shards, make, tmp_path):
    cache = make(room=2.5)
    held = take(cache, shards[0])
    for number in (1, 2, 3):
        take(cache, shards[number]).release()
    assert here(tmp_path, shards) == [0, 3]
    assert is_whole(held.path, shards[0])
    held.release()
    for number in (4, 5):
        take(cache, shards[number]).release()
    assert here(tmp_path, shards) == [4, 5]


def test_where_all_room_is_in_use_the_error_says_what_is_needed(shards, make, tmp_path):
    cache = make(room=2.5)
    held = [take(cache, wanted) for wanted in shards[:2]]
    (tmp_path / "cache" / "notes.txt").write_bytes(b"x" * 1000)
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        take(cache, shards[2])
    assert time.monotonic() - start < 5  # nobody else could release anything
    told = str(raised.value)
    assert told.startswith(f"{shards[2].url}: data.cache_gb=0.00025 is too small for a shard of 100000 bytes")
    assert "reading shards of 200000 bytes" in told
    assert "and 1000 bytes are of other files" in told
    assert "at least 0.001" in told  # 0.3 MB, rounded up to whole ones
    held[0].release()
    held[0].release()
    take(cache, shards[2]).release()


def test_room_that_another_rank_has_is_waited_for_a_while(shards, make, monkeypatch):
    monkeypatch.setattr(cache_module, "ROOM_POLL_S", 0.01)
    held = take(make(room=1.5), shards[0])
    threading.Timer(0.1, held.release).start()
    mine = take(make(room=1.5), shards[1])
    monkeypatch.setattr(cache_module, "ROOM_S", 0.1)
    with pytest.raises(UserError, match="reading shards of 100000 bytes"):
        take(make(room=1.5), shards[2])
    mine.release()


def test_a_limit_below_a_single_shard_is_refused_at_once(store, shards, make):
    with pytest.raises(UserError, match=r"data.cache_gb=9e-05 is too small for a shard of 100000 bytes"):
        take(make(room=0.9), shards[0])
    assert store.asked == []


def test_a_shard_that_does_not_fit_removes_no_other(shards, make, tmp_path):
    cache = make(room=2.5)
    held = take(cache, shards[0])
    take(cache, shards[1]).release()
    with pytest.raises(UserError, match="too small"):
        cache.local_path(shards[2].url, bytes=2 * SIZE, sha256=shards[2].sha256)
    assert here(tmp_path, shards) == [0, 1]
    held.release()


def test_a_wish_does_not_remove_the_wish_of_another_process(store, shards, make, tmp_path):
    first, second = make(room=2.5), make(room=2.5)
    first.want(shards[:2])
    eventually(lambda: here(tmp_path, shards) == [0, 1])
    second.want(shards[2:4])
    time.sleep(0.2)
    assert here(tmp_path, shards) == [0, 1]
    # What is read now comes before what is wished for; of the wishes the later one goes.
    held = take(second, shards[4])
    assert len(here(tmp_path, shards)) == 2
    assert store.requests("2.arrow") == 0
    held.release()
    eventually(lambda: 2 in here(tmp_path, shards))
    first.want([])
    eventually(lambda: here(tmp_path, shards) == [2, 3])


def test_a_cache_that_is_full_of_wishes_goes_on_when_they_are_read(shards, make):
    cache = make(room=2.5)
    cache.want(shards)
    for wanted in shards:
        with take(cache, wanted) as shard:
            assert is_whole(shard.path, wanted)
    assert cache.counts.fetched == len(shards)


@pytest.mark.parametrize("held", [False, True])
def test_a_shard_that_somebody_cut_off_is_fetched_again(store, shards, make, held):
    reading = take(make(), shards[0])
    os.truncate(reading.path, SIZE // 2)
    if not held:
        reading.release()
    with take(make(), shards[0]) as shard:
        assert is_whole(shard.path, shards[0])
    assert store.requests("0.arrow") == 2


def test_a_changed_shard_leaves_nothing_behind(store, shards, make, tmp_path):
    store.files["0.arrow"] = bytes(SIZE)
    with pytest.raises(UserError, match="changed after packing"):
        take(make(), shards[0])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["room.lock"]


def test_what_stopped_the_background_is_raised_where_the_shard_is_asked_for(store, shards, make):
    cache = make()
    store.faults["0.arrow"] = ["403"]
    cache.want(shards[:2])
    eventually(lambda: shards[0].sha256 in cache._fetchers._failed)
    # By now the store would give it.
    with pytest.raises(UserError, match=r"0\.arrow: may not be read"):
        take(cache, shards[0])
    assert store.requests("0.arrow") == 1
    # The next shard was fetched nevertheless, and a second call tries anew.
    take(cache, shards[1]).release()
    take(cache, shards[0]).release()


def test_a_fault_of_ours_in_the_background_is_not_lost(shards, make, monkeypatch):
    def broken(*given: object, **named: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(remote, "fetch", broken)
    cache = make()
    cache.want(shards[:1])
    eventually(lambda: bool(cache._fetchers._failed))
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError, match="ours"):
        take(cache, shards[0])


def test_a_store_that_was_down_in_the_background_is_asked_again(store, shards, make):
    cache = make()
    store.faults["0.arrow"] = ["503"] * (1 + QUICK.retries)
    cache.want(shards[:1])
    eventually(lambda: shards[0].sha256 in cache._fetchers._failed)
    with take(cache, shards[0]) as shard:
        assert is_whole(shard.path, shards[0])


def test_close_ends_whoever_fetches_or_waits_at_once(store, shards, make, tmp_path):
    store.gate.clear()
    cache, ended = make(), []

    def wait(number: int) -> None:
        try:
            take(cache, shards[number])
        except CacheClosedError as error:
            ended.append(error)

    cache.want(shards[:2])
    eventually(lambda: len(store.asked) == 2)
    waiting = [threading.Thread(target=wait, args=(number,)) for number in (0, 4)]
    for thread in waiting:
        thread.start()
    eventually(lambda: len(store.asked) == 3)
    start = time.monotonic()
    cache.close()
    for thread in waiting:
        thread.join(timeout=5)
    assert time.monotonic() - start < 2
    assert len(ended) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("limoe-shards")]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["room.lock"]


def test_an_interruption_ends_who_waits_and_others_read_and_wish_after_it(store, shards, make, tmp_path):
    store.gate.clear()
    cache, ended = make(), []

    def wait() -> None:
        with pytest.raises(CacheClosedError):
            take(cache, shards[4])
        # As long as it lasts nothing can be begun again.
        with pytest.raises(CacheClosedError):
            take(cache, shards[5])
        ended.append(True)

    cache.want(shards[:2])
    waiting = threading.Thread(target=wait)
    waiting.start()
    eventually(lambda: len(store.asked) == 3)
    with cache.interrupted():
        waiting.join(timeout=5)
        assert ended
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("limoe-shards")]
    store.gate.set()
    with take(cache, shards[4]) as shard:
        assert is_whole(shard.path, shards[4])
    cache.want(shards[2:4])
    eventually(lambda: here(tmp_path, shards) == [2, 3, 4])


def test_an_interruption_does_not_open_a_closed_cache(shards, make):
    cache = make()
    cache.close()
    with cache.interrupted():
        pass
    with pytest.raises(CacheClosedError):
        take(cache, shards[0])


def test_half_a_shard_of_a_dead_process_is_removed_for_room(shards, make, tmp_path):
    cache = make(room=1.5)
    left = tmp_path / "cache" / f"{shards[5].sha256}.part"
    left.write_bytes(bytes(SIZE))
    take(cache, shards[0]).release()
    assert not left.exists()


def test_a_disk_that_is_full_gives_room_by_removing_more(shards, make, tmp_path, monkeypatch):
    cache = make()
    for wanted in shards[:3]:
        take(cache, wanted).release()
    real, full = os.posix_fallocate, [2]

    def allocate(fd: int, offset: int, size_bytes: int) -> None:
        if full[0]:
            full[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    take(cache, shards[3]).release()
    assert here(tmp_path, shards) == [2, 3]
    full[0] = 100
    with pytest.raises(UserError, match=r"its disk has no room for a shard of 100000 bytes .* give another folder"):
        take(cache, shards[4])
    assert not list((tmp_path / "cache").glob("*.part"))


def test_what_must_stay_free_of_the_disk_is_a_limit_too(store, shards, tmp_path):
    cache = ShardCache(tmp_path / "cache", limit_bytes=10 * SIZE, reserve_bytes=1 << 60)
    with pytest.raises(
        UserError, match=r"no room for a shard of 100000 bytes beside 1152921504606846976 that stay free"
    ):
        take(cache, shards[0])
    assert store.asked == []


def test_a_checksum_that_is_a_path_is_refused(tmp_path):
    for name in ("../" * 20 + "etc/x", "A" * 64, "0" * 63, ""):
        with pytest.raises(UserError, match="is no SHA-256"):
            Wanted("https://example.org/a.arrow", 1, name)


def test_a_link_in_the_place_of_a_shard_is_not_followed(store, shards, make, tmp_path):
    cache = make()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(store.files["0.arrow"])
    (tmp_path / "cache" / f"{shards[0].sha256}.arrow").symlink_to(elsewhere)
    with pytest.raises(UserError, match="cannot be used as the cache of shards"):
        take(cache, shards[0])


def test_a_file_where_the_folder_should_be_is_refused(make, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: cannot be used .*: File exists: give a folder .* as data\.cache"):
        make(folder=tmp_path / "file")


@contextmanager
def as_somebody_else(user: int = 65534) -> Iterator[None]:
    """The superuser, who may do all, becomes nobody; who is somebody stays it."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(was)


def test_a_folder_that_cannot_be_written_is_refused(make):
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "cache"
        folder.mkdir()
        if os.geteuid() == 0:
            os.chown(folder, 65534, -1)
        Path(top).chmod(0o755)
        folder.chmod(0o555)
        with as_somebody_else(), pytest.raises(UserError, match="Permission denied: give a folder that can be written"):
            make(folder=folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="a folder is given to another user by the superuser alone")
def test_the_folder_of_another_user_is_refused(make):
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o777)
        with as_somebody_else(), pytest.raises(UserError, match="belongs to another user"):
            make(folder=Path(top))


@pytest.mark.skipif(os.geteuid() != 0, reason="about the superuser, who may use any folder")
def test_root_uses_no_folder_of_another_user_where_everybody_makes_folders(make, tmp_path):
    for mode, name in ((0o755, "given"), (0o1777, "anybody's")):
        (tmp_path / name / "cache").mkdir(parents=True)
        os.chown(tmp_path / name / "cache", 65534, -1)
        (tmp_path / name).chmod(mode)
    make(folder=tmp_path / "given" / "cache")
    with pytest.raises(UserError, match="belongs to another user"):
        make(folder=tmp_path / "anybody's" / "cache")


def test_a_file_system_without_locks_is_refused_before_anything_is_fetched(make, monkeypatch):
    def none(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(file_locks.fcntl, "flock", none)
    with pytest.raises(UserError, match="No locks available: its file system may know no locks"):
        make()


def test_a_lock_on_a_file_that_was_replaced_meanwhile_is_not_taken(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    real, replaced = fcntl.flock, []

    def late(fd: int, operation: int) -> None:
        if not replaced:
            path.unlink()
            path.write_text("longer")
            replaced.append(fd)
        real(fd, operation)

    monkeypatch.setattr(file_locks.fcntl, "flock", late)
    with file_locks.try_lock(path, "exclusive", create=False) as held:
        assert held.size_bytes == len("longer")


def test_a_long_wait_for_another_process_is_told(store, shards, make, monkeypatch, capsys):
    monkeypatch.setattr(cache_module, "TELL_S", 0.05)
    first, second = make(), make()
    store.gate.clear()
    first.want(shards[:1])
    eventually(lambda: len(store.asked) == 1)
    threading.Timer(0.3, store.gate.set).start()
    take(second, shards[0]).release()
    assert capsys.readouterr().err.count("another process of this host fetches it") == 1


def test_the_settings_name_the_folder_and_its_limit(tmp_path, monkeypatch):
    cache = open_cache(Data(cache=str(tmp_path / "here"), cache_gb=0.5))
    assert (tmp_path / "here").is_dir()
    assert cache._folder.limit_bytes == 500_000_000
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_module.cache_folder(Data()) == tmp_path / f"limoe-shards-{os.getuid()}"
    assert stat_mode(tmp_path / "here") == 0o700


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777
