"""The small pieces of a download: headers, opt-outs, order of hosts, memory, locks."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from contextlib import suppress

import pytest
from PIL import Image
from yarl import URL

from data_prep.fetching.addresses import AddressPolicy
from data_prep.fetching.budget import Budget
from data_prep.fetching.fetch import retry_after
from data_prep.fetching.fetch_errors import CLASSES, RETRY_LATER, Failed
from data_prep.fetching.hosts import TOLERATED, Hosts, Job
from data_prep.fetching.picture_header import Header, read_header
from data_prep.fetching.robots_tag import opt_out
from data_prep.fetching.web_address import host_of, literal_refusal, parse_url
from data_prep.lock import Lock
from data_prep.sources.url_list import Row
from limoe_dist.config.errors import UserError
from tests.support.hostile_server import picture_kinds, png_bomb


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("picture", "suffix"),
    [
        (encoded("jpeg"), "jpg"),
        (encoded("jpeg", progressive=True, exif=bytes(40)), "jpg"),
        (encoded("png"), "png"),
        (encoded("webp"), "webp"),
        (encoded("webp", lossless=True), "webp"),
        (encoded("webp", exif=b"Exif\0\0MM\0*"), "webp"),
        (encoded("gif"), "gif"),
        (encoded("bmp"), "bmp"),
        (encoded("tiff"), "tiff"),
        (encoded("tiff", compression="tiff_lzw"), "tiff"),
    ],
)
def test_format_and_size_are_read_from_the_header(picture, suffix):
    assert read_header(picture) == Header(suffix, 300, 200)


@pytest.mark.parametrize("kind", sorted(picture_kinds()))
def test_a_header_that_is_cut_off_anywhere_is_a_reason_and_no_crash(kind):
    whole = picture_kinds()[kind]
    for length in range(len(whole)):
        # Formats whose size stands at the front are read of a part too: never another size, or another error.
        with suppress(ValueError):
            header = read_header(whole[:length])
            assert (header.width, header.height) == (20, 10)


@pytest.mark.parametrize(
    "data",
    [
        b"<!doctype html>",
        b"BM is how this text begins, and no more",
        b"\xff\xd8\xff\xe0\x00\x00" + bytes(100),
        b"\xff\xd8\xff\xd9",
        b"GIF89a\0\0\0\0",
        b"II*\0\x08\0\0\0\xff\xff",
        b"RIFF\0\0\0\0WEBPVP8 " + bytes(20),
        b"",
    ],
)
def test_what_only_looks_like_a_picture_is_refused(data):
    with pytest.raises(ValueError, match=r"header|begins with"):
        read_header(data)


def test_a_header_of_markers_without_end_is_refused():
    with pytest.raises(ValueError, match="more than 10000 markers"):
        read_header(b"\xff\xd8\xff" + b"\xff" * 20_000 + encoded("jpeg")[3:])


def test_a_bomb_is_known_by_its_header():
    assert read_header(png_bomb()) == Header("png", 100_000, 100_000)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["noai"], "noai"),
        (["all", "NoIndex"], "noindex"),
        (["nofollow, noimageindex"], "noimageindex"),
        (["none"], "none"),
        (["limoe-dist: noai"], "noai"),
        (["Limoe-Dist: nofollow, noai"], "noai"),
        (["*: noindex"], "noindex"),
        (["otherbot: noindex"], None),
        (["otherbot: noindex, noai"], None),
        (["otherbot: noindex, limoe-dist: noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Fri, 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
        (["unavailable_after: Friday, 25-Jun-30 15:00:00 PST, noimageai"], "noimageai"),
        (["max-snippet:20, noindex"], "noindex"),
        (["nofollow, nosnippet", ""], None),
    ],
)
def test_opt_outs_count_where_they_address_all_or_us(values, found):
    assert opt_out(values, "limoe-dist") == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.jpg",
        "ftp://example.com/a.jpg",
        "file:///etc/passwd",
        "http://",
        "http://user:secret@example.com/a.jpg",
        "http://user@example.com/a.jpg",
        "http://example.com:99999/a.jpg",
        "http://[::1/a.jpg",
        "http://example.com/" + "a" * 5000,
        "data:image/png;base64,AAAA",
    ],
)
def test_an_address_that_is_none_of_http_is_refused(text):
    with pytest.raises(Failed) as told:
        parse_url(text)
    assert told.value.kind == "bad_url"


@pytest.mark.parametrize("host", ["xn--", "xn--a", "xn--0.example", "xn--a-ecp.ru"])
def test_a_host_that_claims_to_be_encoded_is_asked_for_as_it_is_written(host):
    """The names of IDNA that Python cannot decode: one such row of a stranger's list must not end the run."""
    url = parse_url(f"http://{host}/a.jpg")
    assert host_of(url) == host
    assert literal_refusal(url, AddressPolicy()) is None


def test_a_wait_is_told_in_seconds_or_as_a_date():
    assert retry_after("120", now=0.0) == 120
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=15.0) == 45
    assert retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=100.0) == 0
    assert [retry_after(text, now=0.0) for text in ("", "soon", "-5", "99999-99-99", "²")] == [0] * 5


def test_what_may_heal_is_a_part_of_all_classes():
    assert {*RETRY_LATER} < {*CLASSES}
    assert max(one.retries for one in CLASSES.values()) == 4


def job(host: str, number: int) -> Job:
    return Job(
        Row(number, f"http://{host}/{number}", ""), f"{number:05d}", URL(f"http://{host}/{number}"), host, "part"
    )


def taken(hosts: Hosts, now: float) -> list[Job]:
    found = []
    while (one := hosts.next(now)) is not None:
        found.append(one)
    return found


def test_a_host_has_only_so_many_rows_at_a_time_and_holds_up_no_other():
    hosts = Hosts(per_host=2, patience_s=60)
    for number in range(4):
        hosts.offer(job("a", number))
    hosts.offer(job("b", 4))
    first = taken(hosts, 0.0)
    assert [(one.host, one.row.number) for one in first] == [("a", 0), ("b", 4), ("a", 1)]
    assert hosts.waiting == 2
    hosts.done(first[0], 1.0, began=0.0, error="", retry_after_s=None)
    assert [one.row.number for one in taken(hosts, 1.0)] == [2]


def test_a_host_that_asks_for_time_gets_it_and_twice_as_much_the_next_time():
    hosts = Hosts(per_host=1, patience_s=60)
    for number in range(3):
        hosts.offer(job("a", number))
    (first,) = taken(hosts, 0.0)
    hosts.done(first, 0.0, began=0.0, error="rate_limited", retry_after_s=5.0)
    assert taken(hosts, 4.9) == []
    assert hosts.wake() == 5.0
    (second,) = taken(hosts, 5.0)
    hosts.done(second, 5.0, began=5.0, error="rate_limited", retry_after_s=0.0)
    assert hosts.next(6.9) is None
    assert hosts.next(7.0) is not None


def test_answers_that_were_under_way_do_not_lengthen_the_wait():
    hosts = Hosts(per_host=8, patience_s=60)
    for number in range(9):
        hosts.offer(job("a", number))
    for one in taken(hosts, 0.0):
        hosts.done(one, 1.0, began=0.0, error="rate_limited", retry_after_s=0.0)
    assert hosts.next(1.9) is None
    assert hosts.next(2.0) is not None


def test_a_host_that_fails_again_and_again_is_given_up_with_its_rows():
    hosts, now = Hosts(per_host=1, patience_s=3.0), 0.0
    for number in range(30):
        hosts.offer(job("dead", number))
    hosts.offer(job("alive", 99))
    asked = 0
    given_up: list[Job] = []
    while not given_up:
        for one in taken(hosts, now):
            error = "connect" if one.host == "dead" else ""
            asked += one.host == "dead"
            hosts.done(one, now, began=now, error=error, retry_after_s=None)
        given_up = list(hosts.given_up(now))
        now += 0.5
    # Eight in a row, then after 1 s and 2 s; the next wait, of 4 s, is more than the patience.
    assert asked == TOLERATED + 2
    assert len(given_up) == 30 - asked
    assert hosts.waiting == 0


def test_one_success_forgives_the_failures_before_it():
    hosts = Hosts(per_host=1, patience_s=60)
    for number in range(3 * TOLERATED):
        hosts.offer(job("a", number))
        one = hosts.next(0.0)
        assert one is not None
        error = "timeout" if number % TOLERATED else ""
        hosts.done(one, 0.0, began=0.0, error=error, retry_after_s=None)


def test_a_retry_waits_for_its_time():
    hosts = Hosts(per_host=1, patience_s=60)
    hosts.offer_later(job("a", 0), 3.0)
    assert (hosts.next(2.9), hosts.waiting, hosts.wake()) == (None, 1, 3.0)
    assert hosts.next(3.0) is not None
    assert hosts.waiting == 0


def test_memory_is_given_in_order_and_comes_back_where_a_wait_is_cancelled():
    async def story() -> list[str]:
        told: list[str] = []
        budget = Budget(10)
        await budget.take(8)

        async def want(name: str, size: int) -> None:
            await budget.take(size)
            told.append(name)

        large, small = asyncio.create_task(want("large", 9)), asyncio.create_task(want("small", 1))
        await asyncio.sleep(0)
        # 2 are free, but the large one came first; and nobody passes it by not waiting.
        assert not budget.try_take(1)
        assert told == []
        budget.give(8)
        await asyncio.gather(large, small)
        assert budget.free == 0
        budget.give(10)
        await budget.take(10)
        gone = asyncio.create_task(want("gone", 5))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        budget.give(10)
        assert budget.free == 10
        return told

    assert asyncio.run(story()) == ["large", "small"]


def test_the_second_who_locks_is_told_who_the_first_is(tmp_path):
    path = tmp_path / "lock"
    with (
        Lock(path, "part 3 of out"),
        pytest.raises(UserError, match=r"part 3 of out is being written by process \d+ on"),
    ):
        Lock(path, "part 3 of out", wait_s=0.0)
    assert not path.exists()
    Lock(path, "part 3 of out").close()


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    code = f"import os, pathlib, data_prep.lock as lock; lock.Lock(pathlib.Path({str(path)!r}), 'it'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert path.exists()
    Lock(path, "it").close()
