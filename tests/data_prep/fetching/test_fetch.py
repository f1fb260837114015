"""One try at one address: what comes with names, and how much is held in memory. Kinds of answers: test_download.py."""

from __future__ import annotations

import asyncio

import pytest
from yarl import URL

from data_prep.fetching.addresses import AddressPolicy, parse_allowed
from data_prep.fetching.budget import Budget
from data_prep.fetching.fetch import GUESS_BYTES, Answer, Crowded, Fetcher, Limits
from tests.support.hostile_server import HostileServer


@pytest.fixture(scope="module")
def server():
    with HostileServer() as one:
        yield one


def fetched(server: HostileServer, *urls: str, names: dict[str, list[str]] | None = None, **options) -> list[Answer]:
    """One behind the other, by one fetcher. names: what the name server answers, in turn; empty: an error."""

    async def lookup(host: str, port: int) -> list[str]:
        answers = (names or {}).get(host, [])
        if not answers:
            raise OSError("no such name")
        return [answers.pop(0)] if len(answers) > 1 else answers

    async def fetch() -> list[Answer]:
        policy = AddressPolicy(parse_allowed([f"127.0.0.1:{server.port}"]))
        budget = Budget(1 << 20)
        async with Fetcher(Limits(**options), policy, budget, 4, lookup) as fetcher:
            answers = [await fetcher.fetch(URL(url), 0) for url in urls]
        assert budget.free + sum(one.held for one in answers) == 1 << 20
        assert all(one.held == len(one.body) for one in answers)
        return answers

    return asyncio.run(fetch())


def test_a_name_is_connected_to_at_the_address_that_was_checked(server):
    url = f"http://pictures.example:{server.port}/ok/3"
    # A second look-up would bring another address, on which nobody listens.
    (answer, again) = fetched(server, url, url, names={"pictures.example": ["127.0.0.1", "127.0.0.9"]})
    assert (answer.error, answer.body, answer.final_url) == ("", server.pictures[3], url)
    assert again.error == ""


def test_a_name_of_a_private_address_is_refused_at_first_and_behind_a_redirect(server):
    with HostileServer() as private:
        names = {"inside.example": ["127.0.0.1"]}
        server.targets["inside"] = f"http://inside.example:{private.port}/ok/1"
        answers = fetched(server, server.targets["inside"], server.url("to", "inside"), names=names)
        assert [one.error for one in answers] == ["private_address"] * 2
        assert "127.0.0.1 is loopback" in answers[0].message
        assert private.connections == 0


def test_a_name_that_nobody_knows_is_dns(server):
    (answer,) = fetched(server, "http://nobody.example/a.jpg")
    assert (answer.error, answer.http_status) == ("dns", 0)


def test_a_port_that_nobody_listens_on_is_connect():
    with HostileServer() as gone:
        url = gone.url("ok", 1)
    assert fetched(gone, url)[0].error == "connect"


def test_a_server_without_tls_is_tls(server):
    assert fetched(server, server.url("ok", 1).replace("http:", "https:"))[0].error == "tls"


def test_the_opt_out_may_be_ignored_by_option(server):
    url = server.url("robots", "noai")
    assert fetched(server, url)[0].error == "robots"
    assert fetched(server, url, obey_robots=False)[0].error == ""


def test_a_gzipped_body_stays_as_it_came(server):
    (answer,) = fetched(server, server.url("gzip"))
    assert answer.body[:2] == b"\x1f\x8b"
    assert len(answer.body) < 20_000


def test_a_body_that_finds_no_memory_is_given_up_with_what_it_needs(server):
    async def fetch() -> tuple[int, int]:
        policy = AddressPolicy(parse_allowed([f"127.0.0.1:{server.port}"]))
        budget = Budget(GUESS_BYTES)
        async with Fetcher(Limits(), policy, budget, 4) as fetcher:
            with pytest.raises(Crowded) as crowded:
                await fetcher.fetch(URL(server.url("endless")), 0)
        return crowded.value.needs, budget.free

    # Its length is unknown: the next try sets the whole cap aside, and nothing is held meanwhile.
    assert asyncio.run(fetch()) == (Limits().max_bytes, GUESS_BYTES)


def test_a_stopped_fetch_holds_nothing(server):
    async def fetch() -> int:
        policy = AddressPolicy(parse_allowed([f"127.0.0.1:{server.port}"]))
        budget = Budget(GUESS_BYTES)
        async with Fetcher(Limits(), policy, budget, 4) as fetcher:
            task = asyncio.create_task(fetcher.fetch(URL(server.url("silent")), 0))
            await asyncio.sleep(0.05)
            assert budget.free == 0
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return budget.free

    assert asyncio.run(fetch()) == GUESS_BYTES
