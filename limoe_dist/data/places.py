"""Files by path or by URL (s3://, gs://, https://), all through fsspec; what stores raise becomes a UserError.

A store's own settings come from its usual places: credentials and AWS_ENDPOINT_URL from the environment, FSSPEC_S3_*.
fsspec is imported where a URL is met: local paths need none of it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from limoe_dist.config.errors import UserError

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "abfs": "adlfs", "az": "adlfs"}
"""Who speaks a protocol, where fsspec itself does not."""


def is_remote(place: str) -> bool:
    """Whether this is a URL of a store. file:// is none: see `local`."""
    return "://" in place and not place.startswith("file://")


def local(place: str) -> Path:
    """The path of a local place, with or without file://."""
    return Path(place.removeprefix("file://"))


def join(folder: str, name: str) -> str:
    """The place of a file in a folder; what a web server's URL has behind its ?, a key perhaps, stays there."""
    if not is_remote(folder):
        return str(local(folder) / name)
    path, query = _parts(folder)
    return posixpath.join(path, name) + query


def parent(place: str) -> str:
    """The folder of a file; as for `join`."""
    if not is_remote(place):
        return str(local(place).parent)
    path, query = _parts(place)
    return posixpath.dirname(path) + query


def _parts(url: str) -> tuple[str, str]:
    """The path, and the query with its ?; a store's names may hold a ? themselves."""
    path, mark, query = url.partition("?") if _is_web(url) else (url, "", "")
    return path, mark + query


def name_of(place: str) -> str:
    return posixpath.basename(place.rstrip("/").partition("?")[0]) if is_remote(place) else local(place).resolve().name


def open_binary(place: str, *, block_bytes: int = 4 << 20) -> IO[bytes]:
    """The file, to be read from any offset; block_bytes are read ahead from a store. Raises UserError."""
    if not is_remote(place):
        with failures(place):
            return local(place).open("rb")
    with failures(place):
        fs, path = filesystem(place)
        return fs.open(path, "rb", block_size=block_bytes)  # type: ignore[no-any-return]


def read_small(place: str, *, limit: int = 64 << 20) -> bytes:
    """A whole file. Raises UserError where it cannot be read, or is larger than `limit` bytes."""
    with failures(place), open_binary(place) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{place}: more than {limit} bytes: this is no such file as is expected here")
    return content


def expand(place: str, *, suffixes: Sequence[str] = ()) -> list[str]:
    """The files of a place, sorted: itself, those that a pattern with * ? [] meets, or those of a folder.

    suffixes: of a folder, only the files that end so (".parquet"). Raises UserError where there is none.
    """
    with failures(place):
        fs, path = filesystem(place)
        if not _is_web(path) and any(letter in path for letter in "*?["):
            found = [str(one) for one in fs.glob(path)]
        elif _is_folder(fs, path):
            found = [str(one) for one in fs.find(path, maxdepth=1)]
            found = [one for one in found if not suffixes or one.endswith(tuple(suffixes))]
        elif fs.exists(path):
            return [place]
        else:
            found = []
    if not found:
        what = f" with {' or '.join(suffixes)}" if suffixes else ""
        raise UserError(f"{place}: there is no such file, and no folder or pattern of files{what}")
    return sorted(str(fs.unstrip_protocol(one)) if is_remote(place) else one for one in found)


def is_folder(place: str) -> bool:
    with failures(place):
        fs, path = filesystem(place)
        return _is_folder(fs, path)


def _is_folder(fs: Any, path: str) -> bool:
    # A web server has no folders; asked for one, fsspec fetches the file whole to look for links in it.
    return not _is_web(path) and bool(fs.isdir(path))


def _is_web(path: str) -> bool:
    """Whether this is a web server's: it lists nothing, and a ? begins a query."""
    return path.startswith(("http://", "https://"))


def exists(place: str) -> bool:
    with failures(place):
        fs, path = filesystem(place)
        return bool(fs.exists(path))


def identity(place: str) -> str:
    """Changes where the file does: its size with the store's checksum or its time of change."""
    with failures(place):
        if not is_remote(place):
            found = local(place).stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        fs, path = filesystem(place)
        info = fs.info(path)
        mark = next((info[key] for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if info.get(key)), "")
        return f"{info.get('size')} {mark}"


def filesystem(place: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises UserError for a protocol that nobody speaks."""
    import fsspec

    protocol = place.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(place)  # type: ignore[no-any-return]
    except ImportError:
        package = PACKAGES.get(protocol, f"the package for {protocol}")
        raise UserError(
            f"{place}: {protocol}:// needs {package}, which is not installed: pip install {package}"
        ) from None
    except ValueError as error:
        raise UserError(f"{place}: {error}: paths begin with s3://, gs://, https:// or are local") from None


@contextmanager
def failures(place: str) -> Iterator[None]:
    """Turns what a disk or a store raises into a UserError that names the place."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{place}: there is no such file") from None
    except PermissionError as error:
        raise UserError(f"{place}: may not be read ({_text(error)}): check the rights or the credentials") from None
    except Exception as error:
        # Stores raise of many kinds (botocore, aiohttp), and which ones is known only where their package is imported.
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in STORES:
            raise UserError(f"{place}: cannot be read: {_text(error)}") from None
        raise


STORES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "s3fs", "fsspec", "google", "asyncio")


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
