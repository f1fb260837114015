"""One try at one address: what comes with names, and how much is held in memory. Kinds of answers: test_download.py."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from yarl import URL

from data_prep.fetching import addresses
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


def self_signed(folder: Path) -> ssl.SSLContext:
    """Of a certificate for 127.0.0.1 that nobody else has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + ONE_HOUR)
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
    file, form = folder / "both.pem", serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    file.write_bytes(secret + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


ONE_HOUR = datetime.timedelta(hours=1)


def test_a_certificate_that_nobody_knows_is_tls_and_taken_where_that_is_ignored(tmp_path):
    with HostileServer(tls=self_signed(tmp_path)) as server:
        (refused,) = fetched(server, server.url("ok", 3))
        (taken,) = fetched(server, server.url("ok", 3), verify_tls=False)
    assert (refused.error, refused.body) == ("tls", b"")
    assert "CERTIFICATE_VERIFY_FAILED" in refused.message
    assert (taken.error, taken.body) == ("", server.pictures[3])


def test_a_host_whose_name_cannot_be_decoded_is_asked_for(server):
    names = {"xn--a.example": ["127.0.0.1"]}
    server.targets["encoded"] = f"http://xn--a.example:{server.port}/ok/3"
    answers = fetched(server, server.targets["encoded"], server.url("to", "encoded"), names=names)
    assert [(one.error, one.body) for one in answers] == [("", server.pictures[3])] * 2


def test_connections_to_hosts_that_come_once_do_not_stay_open(monkeypatch):
    monkeypatch.setattr(addresses, "KEEP_ALIVE_S", 0.05)

    async def fetch(server: HostileServer) -> list[int]:
        policy = AddressPolicy(parse_allowed([f"127.0.0.0/8:{server.port}"]))
        async with Fetcher(Limits(), policy, Budget(1 << 22), 4) as fetcher:
            for number in range(8):
                await fetcher.fetch(URL(server.url("ok", number)), 0)
            kept = [server.open]
            await asyncio.sleep(0.2)
            return [*kept, server.open]

    with HostileServer(hosts=8) as server:
        assert asyncio.run(fetch(server)) == [8, 0]


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


def test_what_is_promised_and_does_not_come_takes_no_memory_from_others(server):
    async def fetch() -> list[int]:
        policy = AddressPolicy(parse_allowed([f"127.0.0.1:{server.port}"]))
        budget = Budget(1 << 20)
        async with Fetcher(Limits(deadline_s=0.1), policy, budget, 4) as fetcher:
            task = asyncio.create_task(fetcher.fetch(URL(server.url("promise")), 0))
            await asyncio.sleep(0.05)
            meanwhile = budget.free
            assert (await task).error == "timeout"
        return [meanwhile, budget.free]

    assert asyncio.run(fetch()) == [(1 << 20) - GUESS_BYTES, 1 << 20]


def test_a_body_that_grows_between_two_tries_is_given_up_with_the_whole_cap(server):
    async def fetch() -> int:
        policy = AddressPolicy(parse_allowed([f"127.0.0.1:{server.port}"]))
        async with Fetcher(Limits(), policy, Budget(350_000), 4) as fetcher:
            with pytest.raises(Crowded) as crowded:
                await fetcher.fetch(URL(server.url("known", 400_000)), 300_000)
        return crowded.value.needs

    assert asyncio.run(fetch()) == Limits().max_bytes


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
