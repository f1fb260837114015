"""Addresses of http and https as strangers write them: parsed once, by the parser that the connection is made with."""

from __future__ import annotations

from yarl import URL

from data_prep.fetching.addresses import AddressPolicy
from data_prep.fetching.fetch_errors import Failed
from data_prep.sources.url_columns import LONGEST_URL


def parse_url(text: str) -> URL:
    """Raises Failed bad_url, as for what is no address of http."""
    if len(text) > LONGEST_URL:
        raise Failed("bad_url", f"has more than {LONGEST_URL:,} characters")
    try:
        url = URL(text)
    except (ValueError, TypeError) as error:
        raise Failed("bad_url", f"cannot be read: {error}") from None
    if problem := url_problem(url):
        raise Failed("bad_url", problem)
    return url


def url_problem(url: URL) -> str | None:
    if url.scheme not in ("http", "https"):
        return f"scheme {url.scheme[:20]!r} is neither http nor https"
    if not host_of(url):
        return "has no host"
    if url.user is not None or url.password is not None:
        return "holds a user name or password"
    try:
        port = url.port
    except ValueError:
        return "has no such port"
    return None if port else "has no such port"


def literal_refusal(url: URL, policy: AddressPolicy) -> str | None:
    """Why an address written in digits is refused, before anything is asked; None for names."""
    host = host_of(url)
    return policy.refusal(host, url.port or 0) if is_literal(host) else None


def host_of(url: URL) -> str:
    """As it is asked for. yarl's `host` would decode xn-- labels, and raises for those that are none."""
    return url.raw_host or ""


def is_literal(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


def joined(url: URL, target: str) -> URL:
    if len(target) > LONGEST_URL:
        raise Failed("redirects", f"to an address of {len(target)} characters")
    try:
        joined = url.join(URL(target))
    except (ValueError, TypeError) as error:
        raise Failed("redirects", f"to what is no address: {error}") from None
    if problem := url_problem(joined):
        raise Failed("redirects", f"to {str(joined)[:200]}, which {problem}")
    return joined.with_fragment(None)
