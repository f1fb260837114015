"""The files of a source of several, what they are called in keys, and what was learned about them, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.sources.columns import key_problem
from data_prep.sources.source import License
from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import write_atomically
from limoe_dist.data import places

SOURCES_FILE = "sources.json"
MOST_BRACES = 100_000
REMOTE_THREADS = 8


def files_of(place: str, *, suffix: str) -> list[str]:
    """The files of a place, sorted; {00000..00099} in it counts, as in WebDataset's own patterns.

    Raises UserError where there is none.
    """
    found: list[str] = []
    for one in _unbraced(place):
        found += places.expand(one, suffixes=(suffix,))
    return sorted(set(found))


def _unbraced(place: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", place)
    if not match:
        return [place]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MOST_BRACES:
        raise UserError(f"{place}: {match[0]} counts from the smaller to the larger, at most {MOST_BRACES} numbers")
    numbers = [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    head, tail = place[: match.start()], place[match.end() :]
    return [head + number + rest for number in numbers for rest in _unbraced(tail)]


def labels_of(files: Sequence[str], *, suffix: str) -> list[str]:
    """What keys call each file: its name without the ending, or where names repeat its path below what all share.

    A label has no slash, so that what follows the first slash of a key is the row's own. Raises UserError where two
    files would still be called the same.
    """
    names = [posixpath.basename(file.partition("?")[0]).removesuffix(suffix) for file in files]
    if len(set(names)) < len(names):
        # Not the rest behind so many letters: commonpath makes s3:/ of s3://.
        shared = os.path.commonpath(files)
        names = [posixpath.relpath(file, shared).removesuffix(suffix).replace("/", "+") for file in files]
    if twice := [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []:
        raise UserError(f"{files[names.index(twice[0])]}: another file has the same name in keys, {twice[0]}")
    for name, file in zip(names, files, strict=True):
        if problem := key_problem(name):
            raise UserError(f"{file!r}: {problem}, and keys hold the names of files: rename it")
    return names


def learned(
    files: Sequence[str],
    learn: Callable[[str], Any],
    *,
    what: str,
    index: Path | None,
    progress: Callable[[str, int, int], None],
) -> list[tuple[str, Any]]:
    """(identity, learn(file)) of each file; from the folder `index` where the same file was learned about before.

    learn returns what JSON can hold. what: names its kind and version. Processes that learn at the same time begin at
    different files, and find the others' work. Raises one UserError that counts all broken files.
    """
    done: dict[int, tuple[str, Any]] = {}
    broken: list[str] = []

    def one(number: int) -> None:
        try:
            done[number] = _learned(files[number], learn, what, index)
        except UserError as error:
            broken.append(str(error))
        progress(what, len(done) + len(broken), len(files))

    start = os.getpid() * 7919 % len(files) if index else 0
    order = [(start + number) % len(files) for number in range(len(files))]
    if places.is_remote(files[0]):
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            for _ in pool.map(one, order):
                pass
    else:
        for number in order:
            one(number)
    if broken:
        also = f" ({len(broken)} of {len(files)} files are broken)" if len(broken) > 1 else ""
        raise UserError(sorted(broken)[0] + also)
    return [done[number] for number in range(len(files))]


def _learned(file: str, learn: Callable[[str], Any], what: str, index: Path | None) -> tuple[str, Any]:
    identity = places.identity(file)
    if index is None:
        return identity, learn(file)
    name = hashlib.sha256(f"{what}\0{file}\0{identity}".encode("utf-8", "surrogatepass")).hexdigest()[:40]
    kept = index / f"{name}.json"
    try:
        note = json.loads(kept.read_text(encoding="utf-8"))
        if note["of"] == [what, file, identity]:
            return identity, note["learned"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not learned yet, or cut off
    result = learn(file)
    try:
        index.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps({"of": [what, file, identity], "learned": result}))
    except OSError as error:
        raise UserError(f"{index}: what is learned about {file} cannot be kept there: {error}") from None
    return identity, result


def fingerprint_of(parts: Iterable[str]) -> str:
    """sha256 over texts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def licenses_beside(folder: str) -> dict[str, License]:
    """What sources.json in the folder says: a list of objects with `name`, `license` and `attribution`.

    Raises UserError where the file is there and broken.
    """
    place = places.join(folder, SOURCES_FILE)
    if not places.exists(place):
        return {}
    try:
        listed = json.loads(places.read_small(place, limit=16 << 20))
        return {one["name"]: License(str(one["license"]), str(one.get("attribution", ""))) for one in listed}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{place}: must be a list of objects with "name" and "license": {error!r}') from None


def block_runs(counts: Iterable[int], rows: int) -> Iterator[tuple[int, int, int]]:
    """(file, first, rows): files of `counts` rows, in runs of at most `rows`."""
    for file, count in enumerate(counts):
        for first in range(0, count, rows):
            yield file, first, min(rows, count - first)
