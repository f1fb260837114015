from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from data_prep.fetching.addresses import (
    AddressPolicy,
    AddressRefused,
    CheckedResolver,
    checked_connector,
    parse_allowed,
)
from limoe_dist.config.errors import UserError

PUBLIC = ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808")
NOT_PUBLIC = {
    "127.0.0.1": "loopback",
    "127.255.0.1": "loopback",
    "10.0.0.1": "private",
    "172.16.0.1": "private",
    "192.168.1.1": "private",
    "169.254.169.254": "link-local",
    "100.64.0.1": "a carrier's own",
    "0.0.0.0": "unspecified",
    "0.1.2.3": "unspecified",
    "224.0.0.1": "multicast",
    "240.0.0.1": "private",
    "::1": "loopback",
    "::": "unspecified",
    "fe80::1%eth0": "link-local",
    "fc00::1": "private",
    "fec0::1": "private",
    "ff02::1": "multicast",
    "2001:db8::1": "private",
    "::ffff:127.0.0.1": "disguise",
    "::ffff:8.8.8.8": "disguise",
    "::7f00:1": "disguise",
    "2002:7f00:1::": "disguise",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2": "disguise",
    "64:ff9b:1::a00:1": "disguise",
    "64:ff9b::a00:1": "leads to 10.0.0.1, which is private",
    "192.0.0.192": "a cloud's own",
    "168.63.129.16": "a cloud's own",
    "fd00:ec2::254": "a cloud's own",
    "192.0.0.8": "reserved",
    "192.88.99.1": "reserved",
    "3fff::1": "reserved",
    "not-an-address": "no address",
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_pass(address):
    assert AddressPolicy().refusal(address, 443) is None


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_other_addresses_are_refused_with_the_reason(address):
    assert NOT_PUBLIC[address] in AddressPolicy().refusal(address, 80)


def test_named_networks_and_ports_pass_and_no_others():
    policy = AddressPolicy(parse_allowed(["10.1.0.0/16", "127.0.0.1:8080", "[::1]:8080", "fd00::/8"]))
    allowed = [("10.1.2.3", 80), ("127.0.0.1", 8080), ("::1", 8080), ("fd00::7", 1)]
    assert [policy.refusal(*one) for one in allowed] == [None] * 4
    refused = [("10.2.0.1", 80), ("127.0.0.1", 8081), ("127.0.0.2", 8080), ("::1", 80), ("::ffff:127.0.0.1", 8080)]
    assert all(policy.refusal(*one) for one in refused)


def test_no_width_of_network_opens_the_addresses_of_clouds_metadata():
    policy = AddressPolicy(parse_allowed(["0.0.0.0/0", "::/0"]))
    assert policy.refusal("10.0.0.1", 80) is None
    for address in ("169.254.169.254", "fe80::1", "0.0.0.0", "224.0.0.1", "100.100.100.200", "fd00:ec2::254"):
        assert policy.refusal(address, 80)
    # The same in disguise: mapped, 6to4, compatible, translated, through NAT64 and a local NAT64.
    for head in ("::ffff:a9fe:a9fe", "2002:a9fe:a9fe::", "::a9fe:a9fe", "::ffff:0:a9fe:a9fe", "64:ff9b::a9fe:a9fe"):
        assert policy.refusal(head, 80)
    assert policy.refusal("64:ff9b:1::a9fe:a9fe", 80)


@pytest.mark.parametrize("text", ["example.com", "10.0.0.0/40", "127.0.0.1:http", "[::1"])
def test_what_is_no_network_is_named(text):
    with pytest.raises(UserError, match=r"--allow-private .*: must be addresses such as"):
        parse_allowed([text])


def resolver(answers: list[list[str]], **options) -> tuple[CheckedResolver, list[str]]:
    asked: list[str] = []

    async def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        await asyncio.sleep(0)
        if not answers:
            raise OSError("unknown name")
        return answers.pop(0)

    return CheckedResolver(AddressPolicy(), lookup=lookup, **options), asked


def test_one_private_address_among_public_ones_refuses_the_name():
    names, _ = resolver([["8.8.8.8", "10.0.0.1"]])
    with pytest.raises(AddressRefused, match=r"two.example: 10.0.0.1 is private"):
        asyncio.run(names.resolve("two.example", 80))


def test_a_name_is_asked_once_by_all_that_want_it_and_its_addresses_kept():
    names, asked = resolver([["8.8.8.8", "2606:4700::1111"], ["10.0.0.1"]])

    async def many() -> list:
        first = await asyncio.gather(*[names.resolve("one.example", port) for port in (80, 443, 80)])
        return [*first, await names.resolve("one.example", 80)]

    found = asyncio.run(many())
    # The second answer, a private address, is never asked for: rebinding within the time that is kept has no effect.
    assert asked == ["one.example"]
    assert [[one["host"] for one in hosts] for hosts in found] == [["8.8.8.8", "2606:4700::1111"]] * 4


def test_an_answer_that_has_aged_is_asked_for_and_checked_again():
    names, asked = resolver([["8.8.8.8"], ["127.0.0.1"]], keep_s=0.0)

    async def twice() -> None:
        await names.resolve("rebinding.example", 80)
        with pytest.raises(AddressRefused):
            await names.resolve("rebinding.example", 80)

    asyncio.run(twice())
    assert len(asked) == 2


def test_an_unknown_name_stays_unknown_for_a_while():
    names, asked = resolver([])

    async def twice() -> None:
        for _ in range(2):
            with pytest.raises(OSError, match="unknown name") as told:
                await names.resolve("nobody.example", 80)
            assert not isinstance(told.value, AddressRefused)

    asyncio.run(twice())
    assert asked == ["nobody.example"]


def test_a_look_up_that_nobody_answered_is_made_again():
    asked: list[str] = []

    async def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        if len(asked) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return ["8.8.8.8"]

    async def twice() -> list:
        names = CheckedResolver(AddressPolicy(), lookup=lookup)
        with pytest.raises(OSError, match="Temporary failure"):
            await names.resolve("later.example", 80)
        return await names.resolve("later.example", 80)

    assert [one["host"] for one in asyncio.run(twice())] == ["8.8.8.8"]


def test_names_whose_servers_are_silent_hold_up_no_other(monkeypatch):
    told = threading.Event()

    def answer(host: str, port: int, **named) -> list:
        if host.startswith("silent"):
            told.wait(10)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", port))]

    async def ask() -> list:
        names = CheckedResolver(AddressPolicy())
        silent = [asyncio.create_task(names.resolve(f"silent-{number}.example", 80)) for number in range(100)]
        try:
            await asyncio.sleep(0)
            return await asyncio.wait_for(names.resolve("other.example", 80), 2)
        finally:
            told.set()
            await asyncio.gather(*silent)
            await names.close()

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert [one["host"] for one in asyncio.run(ask())] == ["8.8.8.8"]


def test_the_socket_itself_is_refused_for_an_address_that_nobody_checked():
    async def make() -> None:
        names, _ = resolver([])
        connector = checked_connector(AddressPolicy(), names, connections=1)
        with pytest.raises(AddressRefused, match=r"10.0.0.1 is private"):
            connector._socket_factory((2, 1, 6, "", ("10.0.0.1", 80)))
        await connector.close()

    asyncio.run(make())
