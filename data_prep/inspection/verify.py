"""`limoe prep verify`: is a packed set what its manifest says, and can training read it?

Always, of every shard: its size and sha256, the columns' names and types, every offset and UTF-8 text, its rows, keys
unique over the whole set, the header of every picture against the columns width and height, the rows of each source
and of one modality against the manifest; the tokenizer's checksum; Arrow files beside that the manifest does not name.
Of a sample, or of all rows: the bytes of the picture against the column sha256, and its pixels decoded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.inspection.findings import Findings, printable
from data_prep.inspection.packed_sets import PackedSet, batches, open_set
from data_prep.inspection.repeats import Repeats
from data_prep.inspection.shard_check import ShardResult, ShardTask, check_shard
from data_prep.watched import Advance
from data_prep.worker_pool import worker_pool
from limoe_dist.config.errors import UserError
from limoe_dist.data import places

_MODEL_BYTES = 64 << 20


@dataclass
class Verified:
    packed: PackedSet
    findings: Findings = field(default_factory=Findings)
    bytes: int = 0
    rows: int = 0
    decoded: int = 0

    def to_json(self) -> dict[str, Any]:
        manifest = self.packed.manifest
        return {
            "result": "wrong" if self.findings else "ok",
            "manifest": self.packed.place,
            "name": manifest.name,
            "declared": {"shards": len(manifest.shards), "rows": manifest.rows},
            "checked": {
                "shards": len(manifest.shards),
                "bytes": self.bytes,
                "rows": self.rows,
                "decoded_pictures": self.decoded,
            },
            "findings": self.findings.to_json(),
        }


def verify(packed: PackedSet, *, sample: int | None, seed: int, workers: int, advance: Advance) -> Verified:
    """Everything that is wrong with the set, in an order that does not depend on `workers`.

    sample: pictures to decode, spread over all shards, at least one of each; None: all. advance: called with rows.
    workers: processes; 1: this process alone, which a picture that crashes its decoder would end.
    """
    done = Verified(packed)
    manifest = packed.manifest
    _check_manifest(packed, done.findings)
    tasks = [
        ShardTask(packed.place_of(shard), shard, number, _sampled(shard.rows, manifest.rows, sample, [seed, number]))
        for number, shard in enumerate(manifest.shards)
    ]
    keys, counted = Repeats(), _Counted()
    results: dict[int, Findings] = {}
    for result in _results(tasks, workers):
        shard = manifest.shards[result.number]
        results[result.number] = result.findings
        done.bytes, done.rows = done.bytes + result.bytes, done.rows + result.rows
        done.decoded += result.decoded
        counted.include(result)
        # Rows are numbered by shard and place: their own number is unknown where a shard has other rows than declared.
        keys.add(bytes(result.keys), np.array(result.key_rows, dtype=np.int64) + (result.number << _SHARD_SHIFT))
        advance(shard.rows)
    for number in sorted(results):
        done.findings.include(results[number])
    _check_keys(packed, keys, done.findings)
    counted.check(packed, done.findings)
    _check_tokenizer(packed, done.findings)
    _check_beside(packed, done.findings)
    return done


_SHARD_SHIFT = 40


def _sampled(rows: int, of: int, sample: int | None, seed: Sequence[int]) -> npt.NDArray[np.int64] | None:
    """Rows of one shard to decode, sorted: its part of the sample, at least one."""
    if sample is None or sample >= of:
        return None
    rows = min(rows, 1 << _SHARD_SHIFT)  # a manifest may declare any number
    count = min(rows, sample, max(1, round(sample * rows / of)))
    return np.sort(np.random.default_rng(list(seed)).choice(rows, count, replace=False)).astype(np.int64)


def _results(tasks: Sequence[ShardTask], workers: int) -> Iterator[ShardResult]:
    """Of all tasks, as they are done; a task that ends its process has a result, too."""
    if workers == 1:
        yield from map(check_shard, tasks)
        return
    left = list(reversed(tasks))
    while left:
        running: dict[Future[ShardResult], ShardTask] = {}
        try:
            with worker_pool(min(workers, len(left))) as pool:
                while left or running:
                    while left and len(running) < 2 * workers:
                        future = pool.submit(check_shard, left[-1])  # raises where the pool is broken: it stays left
                        running[future] = left.pop()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        running.pop(future)
                        yield result
        except BrokenProcessPool:
            # One of those that were running did it: each runs again, in a process of its own.
            yield from (_alone(task) for task in running.values())


def _alone(task: ShardTask) -> ShardResult:
    try:
        with worker_pool(1) as pool:
            return pool.submit(check_shard, task).result()
    except BrokenProcessPool:
        result = ShardResult(task.number, whole=False)
        result.findings.add(
            "shard that ends its reader", task.shard.file, "the process that read it died: out of memory, or hostile"
        )
        return result


@dataclass
class _Counted:
    whole: bool = True
    without_caption: int = 0
    without_picture: int = 0
    of_source: Counter[str] = field(default_factory=Counter)

    def include(self, result: ShardResult) -> None:
        self.whole &= result.whole
        self.without_caption += result.without_caption
        self.without_picture += result.without_picture
        self.of_source.update(result.of_source)

    def check(self, packed: PackedSet, findings: Findings) -> None:
        """Compares with the manifest, where every row could be looked at."""
        manifest = packed.manifest
        if not self.whole:
            return
        for what, declared, found in (
            ("without a caption", manifest.without_caption, self.without_caption),
            ("without a picture", manifest.without_picture, self.without_picture),
        ):
            if declared is not None and declared != found:
                findings.add("rows of one modality", packed.place, f"{found} rows {what}, but it says {declared}")
        if not manifest.sources:
            return
        said = {source.name: source.rows for source in manifest.sources}
        for name in sorted({*said, *self.of_source}):
            if said.get(name, 0) != self.of_source[name]:
                what = f'{self.of_source[name]} rows of source "{name}", but it says {said.get(name, 0)}'
                findings.add("rows of a source", packed.place, what)


def _check_manifest(packed: PackedSet, findings: Findings) -> None:
    manifest = packed.manifest
    held = sum(shard.rows for shard in manifest.shards)
    if held != manifest.rows:
        findings.add("manifest", packed.place, f"rows={manifest.rows}, but its shards declare {held}")
    for file, count in Counter(shard.file for shard in manifest.shards).items():
        if count > 1:
            findings.add(
                "manifest", packed.place, f"shard {file} is listed {count} times: its rows would be read twice"
            )


def _check_keys(packed: PackedSet, keys: Repeats, findings: Findings) -> None:
    summary = keys.summary(most=5)
    for group in summary.largest:
        places_ = [(row >> _SHARD_SHIFT, row & ((1 << _SHARD_SHIFT) - 1)) for row in group.rows]
        shown = ", ".join(f"{packed.manifest.shards[shard].file} row {row}" for shard, row in places_)
        more = f" and {group.count - len(places_)} more" if group.count > len(places_) else ""
        findings.add("key that comes twice", _key(packed, *places_[0]), f"{group.count} rows: {shown}{more}", count=0)
    if summary.groups:
        findings.counts["key that comes twice"] = summary.surplus


def _key(packed: PackedSet, shard: int, row: int) -> str:
    """The key itself, where the shard is at hand; it is only to be shown."""
    place = packed.place_of(packed.manifest.shards[shard])
    if places.is_remote(place):
        return packed.manifest.shards[shard].file
    try:
        for batch in batches(places.local(place), ["key"]):
            if row < batch.num_rows:
                return str(batch.column("key")[row].as_py())
            row -= batch.num_rows
    except UserError:
        pass
    return packed.manifest.shards[shard].file


def _check_tokenizer(packed: PackedSet, findings: Findings) -> None:
    from data_prep.vocabulary.model_file import vocabulary_of

    entry = packed.manifest.tokenizer
    if entry is None:
        return
    try:
        content = places.read_small(places.join(packed.folder, entry.file), limit=_MODEL_BYTES)
        if (found := hashlib.sha256(content).hexdigest()) != entry.sha256:
            what = f"sha256 is {found[:12]}..., but the manifest says {entry.sha256[:12]}..."
            findings.add("tokenizer", entry.file, what)
        elif (pieces := vocabulary_of(content, entry.file).pieces) != entry.vocab_size:
            findings.add("tokenizer", entry.file, f"{pieces} pieces, but the manifest says {entry.vocab_size}")
    except UserError as error:
        findings.add("tokenizer", entry.file, str(error))


def _check_beside(packed: PackedSet, findings: Findings) -> None:
    """Arrow files that the manifest does not name: left from another packing, or of a set that lost its manifest."""
    if packed.place.startswith(("http://", "https://")):
        return  # a web server lists no folder
    named = {shard.file for shard in packed.manifest.shards}
    try:
        found = places.expand(packed.folder, suffixes=(".arrow",))
    except UserError:
        return  # none at all: each of the manifest's was found missing already
    for name in sorted({places.name_of(place) for place in found} - named):
        findings.add("shard that the manifest does not name", name, "its rows are not read: remove it, or pack again")


def summary(done: Verified) -> list[str]:
    """For people, below the table: what was looked at."""
    manifest = done.packed.manifest
    lines = [
        f"{printable(done.packed.place, most=300)}: {len(manifest.shards):,} shards, {done.bytes / 1e6:,.1f} MB, "
        f"{done.rows:,} rows; {done.decoded:,} pictures decoded"
    ]
    if not done.findings:
        return [*lines, "all as the manifest says"]
    total = sum(done.findings.counts.values())
    return [*lines, f"{total:,} findings of {len(done.findings.counts)} kinds: this set is not what was packed"]


__all__ = ["Verified", "open_set", "summary", "verify"]
