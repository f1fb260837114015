"""Which addresses may be connected to, and a connector that connects to no other.

Names are looked up here and nowhere else. All addresses of a name are checked, and those that were checked are handed
to the socket: a name server that answers otherwise the second time is not asked a second time. The socket itself is
made only for an address that passes, whichever way it came.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from limoe_dist.config.errors import UserError

Address = IPv4Address | IPv6Address
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]

SHARED = IPv4Network("100.64.0.0/10")
"""Carriers' own (CGNAT): not private by Python's book, and not public either."""
THIS_NETWORK = IPv4Network("0.0.0.0/8")
SPECIAL = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"), IPv6Network("3fff::/20"))
"""Of protocols, of 6to4's relays, for documentation: later than the books of some versions of Python."""
METADATA = frozenset(
    ip_address(text) for text in ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
)
"""Where Azure, Alibaba, Oracle, Amazon and Google answer a machine's questions, beside 169.254.169.254."""
NAT64 = IPv6Network("64:ff9b::/96")
"""How networks of IPv6 alone reach hosts of IPv4: the address in its last 32 bits must be public."""
DISGUISES = tuple(
    IPv6Network(text)
    for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
)
"""Compatible, mapped, translated, local NAT64, 6to4 and Teredo: no public host has such an address alone."""
A_CLOUDS_OWN, DISGUISED = "a cloud's own", "an IPv4 address in disguise"
LOOKUP_THREADS = 256
"""As many as there are connections, usually: names whose servers are silent hold a thread for seconds."""
PASSING = (socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM)
"""Of a look-up: nobody answered. Not kept, for the row's second try would be told the same."""
LARGEST_CACHE = 100_000
KEEP_ALIVE_S = 2.0
"""For a host's next row. Most hosts of a list come once: aiohttp's 15 s would keep thousands of sockets open."""


class AddressRefused(OSError):
    """An OSError, because aiohttp lets only those through from a resolver and a socket."""


@dataclass(frozen=True)
class Allowed:
    """An exception for addresses that are not public."""

    network: IPv4Network | IPv6Network
    port: int | None = None
    """None: any."""


@dataclass(frozen=True)
class AddressPolicy:
    """Public addresses pass; others only where they are named."""

    also: tuple[Allowed, ...] = ()

    def refusal(self, text: str, port: int) -> str | None:
        """Why this address is not connected to; None where it may be."""
        try:
            address = ip_address(text.partition("%")[0])
        except ValueError:
            return f"{text} is no address"
        if why := _not_public(address):
            return None if self._named(address, port, why) else f"{text} is {why}"
        if address in NAT64:
            behind = IPv4Address(int(address) & 0xFFFFFFFF)
            if (why := _not_public(behind)) and not self._named(behind, port, why):
                return f"{text} leads to {behind}, which is {why}"
        return None

    def _named(self, address: Address, port: int, why: str) -> bool:
        # Where clouds keep a machine's credentials: no network that somebody names too widely opens it, in no disguise.
        if why in ("link-local", "multicast", "unspecified", A_CLOUDS_OWN, DISGUISED):
            return False
        return any(address in one.network and one.port in (None, port) for one in self.also)


def parse_allowed(texts: Sequence[str]) -> tuple[Allowed, ...]:
    """10.1.0.0/16, 127.0.0.1, 127.0.0.1:8080, fd00::/8 or [::1]:8080. Raises UserError."""
    return tuple(_allowed(text) for text in texts)


def _allowed(text: str) -> Allowed:
    network, port = text, ""
    if text.startswith("[") and "]:" in text:
        network, _, port = text[1:].partition("]:")
    elif text.count(":") == 1:
        network, _, port = text.partition(":")
    try:
        return Allowed(ip_network(network, strict=False), int(port) if port else None)
    except ValueError:
        raise UserError(
            f"--allow-private {text}: must be addresses such as 10.1.0.0/16, 127.0.0.1:8080, fd00::/8 or [::1]:8080"
        ) from None


def _not_public(address: Address) -> str | None:
    if address in METADATA:
        return A_CLOUDS_OWN
    if address.is_unspecified or address in THIS_NETWORK:
        return "unspecified"
    for name in ("loopback", "link_local", "multicast"):
        if getattr(address, f"is_{name}"):
            return name.replace("_", "-")
    if isinstance(address, IPv6Address) and any(address in network for network in DISGUISES):
        return DISGUISED
    if address in SHARED:
        return "a carrier's own"
    if address.is_private or (isinstance(address, IPv6Address) and address.is_site_local):
        return "private"
    if any(address in network for network in SPECIAL) or address.is_reserved or not address.is_global:
        # Python counts the whole of ::/8 as reserved, and NAT64's prefix lies in it.
        return None if address in NAT64 else "reserved"
    return None


@dataclass
class _Known:
    until: float
    addresses: Sequence[str]
    error: str


class CheckedResolver(AbstractResolver):
    """Looks a name up once in `keep_s` seconds, by threads; raises AddressRefused where ONE address is not allowed."""

    def __init__(self, policy: AddressPolicy, *, lookup: Lookup | None = None, keep_s: float = 300.0) -> None:
        self._policy, self._keep_s = policy, keep_s
        self._threads = _LookupThreads()
        self._lookup = lookup or self._threads.lookup
        self._known: dict[str, _Known] = {}
        self._asked: dict[str, asyncio.Task[_Known]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        known = await self.addresses(host, port)
        if known.error:
            raise OSError(known.error)
        for address in known.addresses:
            if why := self._policy.refusal(address, port):
                raise AddressRefused(f"{host}: {why}")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in known.addresses
        ]

    async def addresses(self, host: str, port: int) -> _Known:
        now = asyncio.get_running_loop().time()
        known = self._known.get(host)
        if known and known.until > now:
            return known
        if (task := self._asked.get(host)) is None:
            task = asyncio.create_task(self._ask(host, port))
            self._asked[host] = task
            task.add_done_callback(lambda _: self._asked.pop(host, None))
        # Shielded: where one fetch meets its deadline, the others still want to know.
        return await asyncio.shield(task)

    async def _ask(self, host: str, port: int) -> _Known:
        addresses: Sequence[str] = ()
        error, keep_s = "", self._keep_s
        try:
            addresses = await self._lookup(host, port)
        except (OSError, ValueError) as failure:
            error = str(failure) or "not known"
            if isinstance(failure, socket.gaierror) and failure.errno in PASSING:
                keep_s = 0.0
        if not addresses and not error:
            error = "has no address"
        known = _Known(asyncio.get_running_loop().time() + keep_s, addresses, error)
        if len(self._known) >= LARGEST_CACHE:
            self._known.clear()
        self._known[host] = known
        return known

    async def close(self) -> None:
        for task in list(self._asked.values()):
            task.cancel()
        self._threads.close()


class _LookupThreads:
    """The system's look-up, which blocks. Daemons: one that hangs does not hold up the end of the command."""

    def __init__(self) -> None:
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._started = self._unanswered = 0

    async def lookup(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        question = _Question(host, port, loop, loop.create_future())
        self._unanswered += 1
        if self._started < min(self._unanswered, LOOKUP_THREADS):
            self._started += 1
            threading.Thread(target=self._work, name="dns", daemon=True).start()
        self._questions.put(question)
        try:
            return await question.answer
        finally:
            self._unanswered -= 1

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            try:
                found = socket.getaddrinfo(question.host, question.port, type=socket.SOCK_STREAM)
                answer: Sequence[str] | Exception = tuple(dict.fromkeys(str(one[4][0]) for one in found))
            except (OSError, ValueError) as error:
                answer = error
            with suppress(RuntimeError):  # the loop has ended meanwhile
                question.loop.call_soon_threadsafe(question.settle, answer)

    def close(self) -> None:
        for _ in range(self._started):
            self._questions.put(None)


@dataclass
class _Question:
    host: str
    port: int
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Sequence[str]]

    def settle(self, answer: Sequence[str] | Exception) -> None:
        if self.answer.done():
            return
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


def checked_connector(
    policy: AddressPolicy, resolver: CheckedResolver, *, connections: int, verify_tls: bool = True
) -> aiohttp.TCPConnector:
    """aiohttp's connector with this resolver, and a last look at each address where its socket is made."""

    def checked_socket(info: tuple) -> socket.socket:  # type: ignore[type-arg]
        family, kind, protocol, _, where = info
        if why := policy.refusal(str(where[0]), int(where[1])):
            raise AddressRefused(why)
        return socket.socket(family=family, type=kind, proto=protocol)

    return aiohttp.TCPConnector(
        limit=connections,
        resolver=resolver,
        use_dns_cache=False,
        ssl=verify_tls,
        socket_factory=checked_socket,
        keepalive_timeout=KEEP_ALIVE_S,
    )
