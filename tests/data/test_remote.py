"""One shard from a store that fails in every way, over HTTP and S3."""

from __future__ import annotations

import hashlib
import io
import socket
import threading
from collections.abc import Iterator

import pytest

from limoe_dist.config.errors import UserError
from limoe_dist.data import remote
from limoe_dist.data.fetchers import Wanted
from limoe_dist.data.remote import CHANGED_TRIES, Patience, Stopped, UnreachableError, fetch
from tests.support.s3 import s3_server
from tests.support.store import Store, shard_bytes

QUICK = Patience(retries=4, backoff_s=0.001, stall_s=0.4)
CONTENT = shard_bytes(100_000, 1)


@pytest.fixture(scope="module")
def open_store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


@pytest.fixture
def store(open_store: Store) -> Store:
    open_store.asked.clear()
    open_store.faults.clear()
    return open_store


def fetched(wanted: Wanted, patience: Patience = QUICK, stopped: threading.Event | None = None) -> bytes:
    file = io.BytesIO()
    fetch(
        wanted.url,
        file,
        size_bytes=wanted.bytes,
        sha256=wanted.sha256,
        patience=patience,
        stopped=stopped or threading.Event(),
    )
    return file.getvalue()


def refusal(wanted: Wanted) -> str:
    with pytest.raises(UserError) as raised:
        fetched(wanted)
    return str(raised.value)


def test_a_shard_that_comes_takes_one_request(store):
    assert fetched(store.put("a", CONTENT)) == CONTENT
    assert store.asked == [("a", "")]


@pytest.mark.parametrize("fault", ["429", "500", "503", "cut", "corrupt", "hang", "reset"])
def test_what_fails_twice_is_fetched_at_the_third_try(store, fault):
    wanted = store.put("a", CONTENT)
    store.faults["a"] = [fault, fault]
    assert fetched(wanted) == CONTENT
    assert store.requests("a") == 3


def test_different_faults_one_after_the_other_are_survived(store):
    wanted = store.put("a", CONTENT)
    store.faults["a"] = ["500", "500", "cut", "corrupt", "reset"]
    assert fetched(wanted) == CONTENT
    assert store.requests("a") == 6


def test_a_stream_that_broke_goes_on_where_it_was(store, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    wanted = store.put("a", CONTENT)
    store.faults["a"] = ["cut", "cut"]
    assert fetched(wanted) == CONTENT
    starts = [int(asked.removeprefix("bytes=").partition("-")[0] or 0) for _, asked in store.asked]
    # Half of 100,000 bytes, then half of what was left: less at most the last chunk.
    assert len(starts) == 3
    assert starts[0] == 0
    assert 49_000 <= starts[1] <= 50_000
    assert 73_000 <= starts[2] <= 75_000


def test_a_server_without_ranges_begins_anew(store, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 1000)
    wanted = store.put("a", CONTENT)
    store.faults["a"] = ["cut", "whole"]
    assert fetched(wanted) == CONTENT
    assert store.asked[1][1]
    assert len(store.asked) == 2


def test_a_store_that_goes_on_failing_is_given_up_after_the_retries(store):
    wanted = store.put("a", CONTENT)
    store.faults["a"] = ["503"] * 20
    with pytest.raises(UnreachableError, match=r"/a: not fetched at 5 tries, the last failed with: status 503"):
        fetched(wanted)
    assert store.requests("a") == 1 + QUICK.retries


def test_a_host_where_nobody_listens_is_tried_again(store):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UnreachableError, match="Connect"):
        fetched(Wanted(f"http://127.0.0.1:{port}/a", 1, "0" * 64))


def test_a_missing_shard_is_asked_for_once(store):
    assert "there is no such file: upload the whole folder" in refusal(Wanted(store.url("none"), 1, "0" * 64))
    assert store.requests("none") == 1


def test_a_forbidden_shard_is_asked_for_once(store):
    wanted = store.put("a", CONTENT)
    store.faults["a"] = ["403"]
    assert "may not be read (Forbidden): check the rights and the credentials" in refusal(wanted)
    assert store.requests("a") == 1


def test_a_changed_shard_is_read_three_times_and_refused(store):
    wanted = store.put("a", CONTENT)
    store.put("a", CONTENT[:-1] + b"x")
    told = refusal(wanted)
    assert told.startswith(f"{wanted.url}: its checksum is not the one in the manifest, at 3 tries")
    assert "changed after packing" in told
    assert store.requests("a") == CHANGED_TRIES


def test_a_shard_that_became_shorter_is_refused_with_both_sizes(store):
    wanted = store.put("a", CONTENT)
    store.put("a", CONTENT[:60_000])
    assert "60000 bytes, but the manifest says 100000" in refusal(wanted)


def test_no_more_is_taken_than_the_manifest_says(store):
    wanted = store.put("a", CONTENT)
    store.put("a", CONTENT + CONTENT)
    # The first bytes are those of the manifest, by their checksum.
    assert fetched(wanted) == CONTENT


def test_a_fetch_that_hangs_can_be_stopped(store):
    wanted = store.put("a", CONTENT)
    store.faults["a"] = ["hang"]
    stopped = threading.Event()
    threading.Timer(0.1, stopped.set).start()
    with pytest.raises(Stopped):
        fetched(wanted, Patience(stall_s=60), stopped)


def test_a_disk_that_fails_is_no_failure_of_the_store(store):
    class Full(io.BytesIO):
        def write(self, chunk: object) -> int:
            raise OSError(28, "No space left on device")

    wanted = store.put("a", CONTENT)
    with pytest.raises(OSError, match="No space left"):
        fetch(
            wanted.url,
            Full(),
            size_bytes=wanted.bytes,
            sha256=wanted.sha256,
            patience=QUICK,
            stopped=threading.Event(),
        )
    assert store.requests("a") == 1


def test_stores_without_coroutines_are_read_too():
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/set/a.arrow", CONTENT)
    wanted = Wanted("memory://set/a.arrow", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert fetched(wanted) == CONTENT


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The bucket `set` on a real S3 server."""
    with s3_server() as client:
        client.create_bucket(Bucket="set")
        client.put_object(Bucket="set", Key="a.arrow", Body=CONTENT)
        yield "s3://set"


def test_a_shard_comes_from_s3_in_ranges(bucket, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK_BYTES", 50_000)
    digest = hashlib.sha256(CONTENT).hexdigest()
    s3 = Patience(retries=0, stall_s=20)
    assert fetched(Wanted(f"{bucket}/a.arrow", len(CONTENT), digest), s3) == CONTENT
    # The object ends where a range begins, and amid one.
    for range_bytes in (50_000, 70_000):
        monkeypatch.setattr(remote, "CHUNK_BYTES", range_bytes)
        with pytest.raises(UserError, match="100000 bytes, but the manifest says 120000"):
            fetched(Wanted(f"{bucket}/a.arrow", 120_000, digest), s3)


@pytest.mark.parametrize("place", ["s3://set/none.arrow", "s3://no-such-bucket/a.arrow"])
def test_a_missing_object_or_bucket_is_refused_at_once(bucket, place):
    with pytest.raises(UserError, match="there is no such file") as raised:
        fetched(Wanted(place, 10, "0" * 64), Patience(retries=0, stall_s=20))
    assert not isinstance(raised.value, UnreachableError)
