"""One shard from a store into a file: checked by size and checksum, tried again after what passes.

http and https are one stream, which goes on at the byte where it broke; other stores are read in ranges.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import os
import random
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from limoe_dist.config.errors import UserError
from limoe_dist.data import places

CHUNK_BYTES = 8 << 20
CHANGED_TRIES = 3
"""A shard of the wrong size or checksum is read so often from its beginning: a proxy or a cable may have done it."""
PASSING = {408, 409, 425, 429}
"""Statuses below 500 that another try may not meet: timeouts, conflicts and throttling."""
LASTING = {501, 505}
NEVER = {
    "ClientConnectorCertificateError",
    "InvalidURL",
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
}
"""Errors of aiohttp and botocore that are the same at the next try; by name, since neither is imported here."""

T = TypeVar("T")


class Stopped(Exception):
    """Whoever waited for the shard does not want it any more."""


class UnreachableError(UserError):
    """The store failed at every try; it may answer later."""


@dataclass(frozen=True)
class Patience:
    """How long a store may take, and how often it may fail."""

    retries: int = 5
    """Of one shard, after timeouts, resets, throttling and statuses from 500 on."""
    backoff_s: float = 0.5
    """Before the first retry, and twice as long before each further one; jitter makes it 0.5 to 1.5 times as long."""
    longest_backoff_s: float = 30.0
    stall_s: float = 60.0
    """Longest wait for the next CHUNK_BYTES."""


def fetch(
    url: str, file: IO[bytes], *, size_bytes: int, sha256: str, patience: Patience, stopped: threading.Event
) -> None:
    """Writes the shard to the beginning of `file`: exactly `size_bytes`, with that checksum.

    Raises UserError where it is missing, forbidden or another one; UnreachableError, which is one too, after all
    retries; Stopped soon after `stopped` was set; OSError where `file` cannot be written.
    """
    arrived = _Arrived(file)
    failed = changed = 0
    while True:
        try:
            for offset, chunk in _chunks(url, arrived.size_bytes, size_bytes, patience.stall_s, stopped):
                arrived.take(offset, chunk)
        except _FailureError as failure:
            if not failure.passes:
                raise UserError(f"{url}: {failure.reason}") from None
            failed += 1
            if failed > patience.retries:
                raise UnreachableError(
                    f"{url}: not fetched at {failed} tries, the last failed with: {failure.reason}: "
                    "check the store and the network of this host, then start again: training goes on where it was"
                ) from None
            _wait(patience, failed, stopped)
            continue
        if arrived.size_bytes == size_bytes and arrived.digest.hexdigest() == sha256:
            return
        changed += 1
        if changed == CHANGED_TRIES:
            raise UserError(f"{url}: {_difference(arrived.size_bytes, size_bytes)}")
        arrived.restart()


def _difference(found: int, size_bytes: int) -> str:
    what = "its checksum is not the one in the manifest"
    if found != size_bytes:
        what = f"{found} bytes, but the manifest says {size_bytes}"
    return (
        f"{what}, at {CHANGED_TRIES} tries: the shard was changed after packing, or not uploaded whole: "
        "upload the whole folder again, the manifest last"
    )


def _wait(patience: Patience, failed: int, stopped: threading.Event) -> None:
    longest = min(patience.backoff_s * 2 ** (failed - 1), patience.longest_backoff_s)
    # Ranks that a store turned away together must not come back together.
    if stopped.wait(longest * random.uniform(0.5, 1.5)):
        raise Stopped


class _Arrived:
    """What has come of a shard, and its checksum so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size_bytes, self.digest = file, 0, hashlib.sha256()

    def take(self, offset: int, chunk: bytes) -> None:
        """offset: of the chunk in the shard; 0 where a server began anew, though it was asked to go on."""
        if offset != self.size_bytes:
            self.restart()
        self.file.write(chunk)
        self.digest.update(chunk)
        self.size_bytes += len(chunk)

    def restart(self) -> None:
        self.file.seek(0)
        self.size_bytes, self.digest = 0, hashlib.sha256()


class _FailureError(Exception):
    """Of a store, never of the disk."""

    def __init__(self, reason: str, *, passes: bool) -> None:
        super().__init__(reason)
        self.reason, self.passes = reason, passes


def _chunks(url: str, start: int, end: int, stall_s: float, stopped: threading.Event) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) from `start` on, in order, never beyond `end`; ends early where the shard does."""
    try:
        fs, path = places.filesystem(url)
        calls = _Calls(fs, stall_s, stopped)
        if not getattr(fs, "async_impl", False):
            yield from _blocks(fs, path, start, end, stopped)
        elif url.startswith(("http://", "https://")):
            yield from _stream(calls, path, start, end)
        else:
            yield from _ranges(calls, path, start, end)
    except (UserError, Stopped):
        raise
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in places.STORES:
            raise _FailureError(_reason(error), passes=_passes(error)) from None
        raise


class _Calls:
    """Runs the coroutines of a file system in its loop, for a thread that can be stopped while it waits."""

    def __init__(self, fs: Any, stall_s: float, stopped: threading.Event) -> None:
        self.fs, self.stall_s, self.stopped = fs, stall_s, stopped

    def wait(self, call: Coroutine[Any, Any, T]) -> T:
        """What the call returns or raises. Raises TimeoutError after stall_s, Stopped; both end the call."""
        future = asyncio.run_coroutine_threadsafe(call, self.fs.loop)
        deadline = time.monotonic() + self.stall_s
        while not future.done():
            if self.stopped.is_set():
                future.cancel()
                raise Stopped
            if time.monotonic() > deadline:
                future.cancel()
                raise TimeoutError(f"nothing came for {self.stall_s:g} s")
            concurrent.futures.wait([future], timeout=0.1)
        return future.result()


def _stream(calls: _Calls, url: str, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """One request for all. fsspec's ranges would ask for the size first, where every failure becomes a missing file."""
    import aiohttp

    if start >= end:
        return
    options = dict(calls.fs.kwargs)
    # identity: else bytes and offsets would be those of a compressed stream.
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"}
    if start:
        options["headers"]["Range"] = f"bytes={start}-{end - 1}"
    # aiohttp's own limit is 5 minutes for the whole body: too few for a large shard.
    options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=calls.stall_s, sock_read=calls.stall_s)
    answer = calls.wait(_answer(calls.fs, url, options))
    try:
        if start and answer.status != 206:
            start = 0  # the server knows no ranges, and sends all of it
        while chunk := calls.wait(_full_chunk(answer.content, min(CHUNK_BYTES, end - start))):
            yield start, chunk
            start += len(chunk)
    finally:
        calls.fs.loop.call_soon_threadsafe(answer.close)


async def _answer(fs: Any, url: str, options: dict[str, Any]) -> Any:
    # Not fs.open_async: its files forget all options, headers and timeouts included.
    session = await fs.set_session()
    answer = await session.get(fs.encode_url(url), **options)
    answer.raise_for_status()
    return answer


async def _full_chunk(stream: Any, size_bytes: int) -> bytes:
    """size_bytes, fewer at the end. A single read returns what has just come: a change of threads for every packet."""
    parts: list[bytes] = []
    while size_bytes > 0 and (part := await stream.read(size_bytes)):
        parts.append(part)
        size_bytes -= len(part)
    return b"".join(parts)


def _ranges(calls: _Calls, path: str, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    while start < end:
        stop = min(start + CHUNK_BYTES, end)
        try:
            chunk = calls.wait(calls.fs._cat_file(path, start=start, end=stop))
        except Exception as error:
            if _status(error) == 416:
                return  # nothing there: the file ends before
            raise
        chunk = chunk[: stop - start]
        yield start, chunk
        if len(chunk) < stop - start:
            return
        start = stop


def _blocks(fs: Any, path: str, start: int, end: int, stopped: threading.Event) -> Iterator[tuple[int, bytes]]:
    """Of file systems without coroutines (sftp, memory): a read that hangs cannot be stopped."""
    with fs.open(path, "rb", block_size=CHUNK_BYTES) as file:
        file.seek(start)
        while start < end and (chunk := file.read(min(CHUNK_BYTES, end - start))):
            if stopped.is_set():
                raise Stopped
            yield start, chunk
            start += len(chunk)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, gcsfs or adlfs, or of botocore, which s3fs keeps as the cause."""
    for name in ("status", "code", "status_code"):
        if isinstance(found := getattr(error, name, None), int):
            return found
    # Only botocore's answer counts of a cause: aiohttp tells a broken body by a cause with a 400 of its own.
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    return None


def _passes(error: BaseException) -> bool:
    """Whether another try may succeed. What is not known here may: a retry costs seconds, a stop costs the run."""
    if type(error).__name__ in NEVER or isinstance(error, FileNotFoundError | PermissionError):
        return False
    status = _status(error)
    # S3 tells a request that came too slowly by 400 RequestTimeout.
    if status is None or isinstance(error, TimeoutError):
        return True
    return status in PASSING or (status >= 500 and status not in LASTING)


def _reason(error: BaseException) -> str:
    status = _status(error)
    text = str(getattr(error, "message", None) or error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and not status:
        text = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
    text = " ".join(text.split())[:300]
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file: upload the whole folder of the manifest, or give the manifest's new place"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"may not be read ({text}): check the rights and the credentials of this host"
    return f"status {status} ({text})" if status else text
