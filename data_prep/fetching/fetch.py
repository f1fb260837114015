"""One try at one address: an answer that is whole and within its limits, or the class of its failure.

Redirects are followed here and not by aiohttp, so that each address on the way is checked as the first one was. No
content encoding is asked for and none is undone: a body is never larger in memory than it was on the wire.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
from yarl import URL

from data_prep.fetching.addresses import AddressPolicy, AddressRefused, CheckedResolver, Lookup, checked_connector
from data_prep.fetching.budget import Budget
from data_prep.fetching.fetch_errors import Failed
from data_prep.fetching.robots_tag import opt_out
from data_prep.fetching.web_address import joined, literal_refusal, url_problem

GUESS_BYTES = 256 << 10
"""Set aside for an answer before its length is known."""
REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Limits:
    deadline_s: float = 30.0
    """Of one try, redirects and all."""
    connect_s: float = 10.0
    max_bytes: int = 20_000_000
    max_redirects: int = 5
    user_agent: str = "limoe-dist/1.0"
    """Its part before the slash is the name that X-Robots-Tag may call."""
    obey_robots: bool = True
    verify_tls: bool = True


class Crowded(Exception):
    """The body is larger than what was set aside for it, and memory is short: to be tried again with so many bytes."""

    def __init__(self, needs: int) -> None:
        super().__init__(needs)
        self.needs = needs


@dataclass(slots=True)
class Answer:
    """What one try brought; `held` bytes of the budget are the receiver's to give back."""

    error: str = ""
    """Empty: `body` is whole."""
    message: str = ""
    http_status: int = 0
    final_url: str = ""
    body: bytes | bytearray = b""
    held: int = 0
    retry_after_s: float | None = None
    """The host asks to be left alone, for so long; 0: it does not say how long."""


@dataclass
class Fetcher:
    limits: Limits
    policy: AddressPolicy
    budget: Budget
    connections: int
    lookup: Lookup | None = None
    """Of names, for tests; None: the system's."""
    _session: aiohttp.ClientSession = field(init=False)
    _resolver: CheckedResolver = field(init=False)

    async def __aenter__(self) -> Fetcher:
        self._resolver = CheckedResolver(self.policy, lookup=self.lookup)
        connector = checked_connector(
            self.policy, self._resolver, connections=self.connections, verify_tls=self.limits.verify_tls
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={
                "User-Agent": self.limits.user_agent,
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
            },
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_s),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._resolver.close()

    async def fetch(self, url: URL, reserve: int) -> Answer:
        """Raises Crowded, with nothing held; nothing else but cancellation.

        reserve: bytes to set aside at first; 0: a guess. The wait for them is before the deadline begins.
        """
        answer = Answer()
        answer.held = reserve or min(GUESS_BYTES, self.limits.max_bytes)
        await self.budget.take(answer.held)
        whole = False
        try:
            async with asyncio.timeout(self.limits.deadline_s):
                await self._follow(url, answer)
            whole = True
        except Crowded:
            if reserve:
                # It has grown since it was last asked for: the whole cap is set aside, so that there is no third time.
                raise Crowded(self.limits.max_bytes) from None
            raise
        except Exception as error:
            answer.error, answer.message = _classed(error, self.limits)
        finally:
            if not whole:
                self.budget.give(answer.held)
                answer.held, answer.body = 0, b""
        self._keep_only(answer, len(answer.body))
        return answer

    def _keep_only(self, answer: Answer, size: int) -> None:
        if answer.held > size:
            self.budget.give(answer.held - size)
            answer.held = size

    async def _follow(self, url: URL, answer: Answer) -> None:
        seen: list[URL] = []
        while True:
            self._check(url)
            seen.append(url)
            answer.http_status, answer.final_url = 0, str(url)
            async with self._session.get(url, allow_redirects=False) as response:
                answer.http_status = response.status
                target = await self._taken(response, answer)
            if target is None:
                return
            url = joined(url, target)
            if url in seen or len(seen) > self.limits.max_redirects:
                what = "a circle" if url in seen else f"more than {self.limits.max_redirects}"
                raise Failed("redirects", f"{what}: {' -> '.join(str(one) for one in seen)}"[:500])

    def _check(self, url: URL) -> None:
        """What can be seen of an address without a look-up; names are checked as they are looked up."""
        if problem := url_problem(url):
            raise Failed("bad_url", problem)
        if why := literal_refusal(url, self.policy):
            raise Failed("private_address", why)

    async def _taken(self, response: aiohttp.ClientResponse, answer: Answer) -> str | None:
        """Reads the body into `answer`; where the answer is a redirect, its target instead."""
        status = response.status
        if self.limits.obey_robots and "X-Robots-Tag" in response.headers:
            name = self.limits.user_agent.partition("/")[0].strip()
            if directive := opt_out(response.headers.getall("X-Robots-Tag"), name):
                raise _closed(response, "robots", f"X-Robots-Tag: {directive}")
        if status == 200:
            await self._read(response, answer)
            return None
        if status in REDIRECTS and (target := response.headers.get("Location")):
            response.close()
            return target
        if status in (429, 503):
            answer.retry_after_s = retry_after(response.headers.get("Retry-After", ""), time.time())
        if status == 429:
            kind = "rate_limited"
        elif status in REDIRECTS:
            kind = "redirects"
        else:
            kind = {4: "http_4xx", 5: "http_5xx"}.get(status // 100, "http_other")
        raise _closed(response, kind, f"status {status}")

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        largest, length = self.limits.max_bytes, response.content_length
        if length is not None and length > largest:
            raise _closed(response, "too_large", f"Content-Length: {length}")
        whole, size = largest if length is None else length, 0
        while chunk := await response.content.readany():
            size += len(chunk)
            if size > largest:
                raise _closed(response, "too_large", f"more than {largest} bytes")
            # As it comes, not as it is promised: a promise and silence would take the memory from all others.
            if size > answer.held:
                self._extend(response, answer, min(whole, max(size, 2 * answer.held)), whole)
            if not answer.body:
                # One piece is the usual case: it is kept as it came.
                answer.body = chunk
                continue
            if isinstance(answer.body, bytes):
                answer.body = bytearray(answer.body)
            answer.body += chunk
        if size == 0:
            raise Failed("empty", "no bytes")

    def _extend(self, response: aiohttp.ClientResponse, answer: Answer, needs: int, whole: int) -> None:
        if not self.budget.try_take(needs - answer.held):
            response.close()
            raise Crowded(whole)
        answer.held = needs


def _closed(response: aiohttp.ClientResponse, kind: str, text: str) -> Failed:
    """The body is not read to its end: the connection is of no further use."""
    response.close()
    return Failed(kind, text)


def retry_after(text: str, now: float) -> float:
    """Seconds from a Retry-After of seconds or of a date; 0 where it says nothing that can be read."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError, OSError):
        return 0.0


def _classed(error: Exception, limits: Limits) -> tuple[str, str]:
    """(class, message) of what a try raised."""
    match error:
        case Failed(kind=kind):
            return kind, str(error)
        case aiohttp.ConnectionTimeoutError():
            return "timeout", f"no connection in {limits.connect_s:g} s"
        case TimeoutError():
            return "timeout", f"not whole in {limits.deadline_s:g} s"
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError() | ssl.SSLError():
            return "tls", _line(error)
        case aiohttp.ClientConnectorError(os_error=AddressRefused() as refused):
            return "private_address", str(refused)
        case aiohttp.ClientConnectorDNSError():
            return "dns", _line(error.os_error)
        case aiohttp.ClientConnectorError():
            return "connect", _line(error)
        case aiohttp.InvalidURL():
            return "bad_url", _line(error)
        case aiohttp.ClientResponseError() | aiohttp.http_exceptions.HttpProcessingError():
            return "bad_http", _line(error)
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError() | OSError():
            return "broken_off", _line(error)
        case UnicodeError():
            return "bad_url", _line(error)
    return "other", _line(error)


def _line(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
