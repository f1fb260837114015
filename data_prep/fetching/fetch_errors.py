"""Every way in which a row of a list can fail, and how often each is tried again.

The class is a word of the ledger's column `error`; `limoe prep retry-failed --classes` takes these words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ErrorClass:
    about: str
    retries: int
    """Times that the same command tries the URL again; --retries may lower it."""
    of_host: bool = False
    """It says something about the host: many in a row, and the host is left alone for a while."""


CLASSES = {
    "bad_url": ErrorClass("no address of http or https, one of more than 4,096 characters, or with a password", 0),
    "private_address": ErrorClass("the host is, or leads to, an address that is not public", 0),
    "dns": ErrorClass("the host's name is not known", 1, of_host=True),
    "connect": ErrorClass("nobody answers at the address", 1, of_host=True),
    "tls": ErrorClass("the certificate is not good, or no encryption was agreed on", 0, of_host=True),
    "timeout": ErrorClass("not whole before the deadline: a silent host or a slow drip", 1, of_host=True),
    "broken_off": ErrorClass("the connection ended before the body did", 2),
    "bad_http": ErrorClass("the answer is not HTTP", 0),
    "redirects": ErrorClass("too many redirects, a circle of them, or one to nowhere", 0),
    "rate_limited": ErrorClass("status 429", 4, of_host=True),
    "http_4xx": ErrorClass("another status from 400 to 499", 0),
    "http_5xx": ErrorClass("a status from 500 to 599; 503 counts as a wish to be left alone", 2),
    "http_other": ErrorClass("a status that brings no picture", 0),
    "host_backed_off": ErrorClass("not asked: the host failed or limited us so long that waiting was given up", 0),
    "robots": ErrorClass("X-Robots-Tag asks not to take it", 0),
    "empty": ErrorClass("no bytes", 1),
    "too_large": ErrorClass("more bytes than --max-mb", 0),
    "not_a_picture": ErrorClass("neither JPEG, PNG, WebP, GIF, BMP nor TIFF, or one with a broken header", 0),
    "too_many_pixels": ErrorClass("its header declares more pixels than --max-megapixels", 0),
    "other": ErrorClass("something that nobody foresaw; the column `message` has it", 0),
}

RETRY_LATER = ("dns", "connect", "timeout", "broken_off", "rate_limited", "http_5xx", "host_backed_off")
"""What time may heal: the classes that `retry-failed` takes where none are named."""


class Failed(Exception):
    """One try came to nothing."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        assert kind in CLASSES, kind
        self.kind = kind
