"""Training data from several manifests: which source each position of the run reads, and which sample of that source.

data.mixture=("web=3", "classes=1") reads, for ever, the pattern web web classes web. The weights are reduced to whole
numbers w_s; their sum W is the period. After n positions source s is less than one sample from n * w_s / W, whatever n
is: of k sources at most 1 - 1 / (2k - 2), which no pattern improves for all weights (Tijdeman, 1980). So where a batch
times a share is whole, every batch has exactly that many. A stretch between two positions is off by at most twice that:
by one sample with two sources, by less than two with more, and for most weights of three sources no pattern keeps every
stretch within one (docs/design.md). The state is the position alone; each source counts its own epochs.
Needs neither torch nor DALI.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Data
from limoe_dist.data.manifest import Manifest, load_manifest, manifest_place
from limoe_dist.data.order import ORDER_VERSION, Ints, SourceOrder
from limoe_dist.data.places import is_remote, local

MAX_PERIOD = 100_000
"""Longest pattern: it is kept whole in memory, and the shares are exact only over whole patterns."""
MIN_BAD_ROWS = 16
"""Fewer bad rows than this never stop a run, whatever their share."""
_ENTRY = "an entry is MANIFEST=WEIGHT, as in web/manifest.json=3"
_WEIGHT = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,15}|/[0-9]{1,15})?")


@dataclass(frozen=True)
class Entry:
    path: str
    """manifest.json, or its folder."""
    weight: int
    """Samples of this source in one period; the weights of a mixture have no common divisor."""


def entries_of(data: Data) -> tuple[Entry, ...]:
    """The sources of data.mixture; where it is empty, data.manifest alone. Opens no file.

    Raises UserError naming each entry that is none, and a data.manifest that the mixture does not hold.
    """
    if not data.mixture:
        return (Entry(data.manifest, 1),)
    parsed, problems, met = [], [], dict[str, str]()
    for text in data.mixture:
        path, weight, problem = _parsed(text)
        file = manifest_file(path)
        if not problem and file in met:
            problem = f'names the manifest that "{met[file]}" has: give it once, with the sum of the weights'
        if problem:
            problems.append(f'data.mixture: "{text}" {problem}')
        else:
            parsed.append((path, weight))
            met[file] = text
    if not problems and data.manifest and manifest_file(data.manifest) not in met:
        problems.append(
            f"data.manifest={data.manifest} is no manifest of data.mixture, and only those are trained on: add it to "
            "data.mixture with a weight, or set data.manifest to the one of them whose tokenizer is used "
            '("" for the first)'
        )
    if problems:
        raise UserError("\n".join(problems))
    weights = _whole([weight for _, weight in parsed])
    return tuple(Entry(path, weight) for (path, _), weight in zip(parsed, weights, strict=True))


def with_home(data: Data) -> Data:
    """The settings with data.manifest filled in: of a mixture, the first manifest, unless another one is named.

    Its tokenizer is the run's, and what asks for "the training pictures" looks there. Raises as `entries_of` does.
    """
    first = entries_of(data)[0].path
    return data.model_copy(update={"manifest": data.manifest or first})


def absolute(data: Data) -> Data:
    """As `with_home`, with all paths absolute: they mean the same when the run goes on from another directory."""
    data = with_home(data)
    mixture = tuple(
        f"{_absolute(path.strip())}={weight.strip()}" for path, _, weight in (e.rpartition("=") for e in data.mixture)
    )
    paths = {"manifest": data.manifest, "validation": data.validation, "tokenizer": data.tokenizer, "cache": data.cache}
    found = {name: _absolute(path) for name, path in paths.items() if path}
    return data.model_copy(update={**found, "mixture": mixture})


def files_of(data: Data) -> dict[str, str]:
    """The manifests to train on, by the name of their setting and weight: what all ranks must have alike."""
    if not data.mixture:
        return {"data.manifest": data.manifest}
    entries = entries_of(data)
    mixed = {f"entry {n} of data.mixture (weight {entry.weight})": entry.path for n, entry in enumerate(entries, 1)}
    return {"data.manifest": with_home(data).manifest} | mixed


def load_manifests(data: Data) -> tuple[Manifest, ...]:
    """The manifests to train on, in the order of `entries_of`. Raises UserError where one cannot be trained on."""
    entries = entries_of(data)
    manifests = tuple(load_manifest(entry.path) for entry in entries)
    check_pairs(data, manifests)
    return manifests


def check_pairs(data: Data, manifests: Sequence[Manifest]) -> None:
    """Raises UserError where the manifests tell that too many rows have no picture or no caption to train on.

    Older manifests tell nothing: then the loader meets those rows, and stops by the same rules.
    """
    entries = entries_of(data)
    total = sum(entry.weight for entry in entries)
    lacking, share = 0, 0.0
    for entry, manifest in zip(entries, manifests, strict=True):
        if manifest.pairs == 0:
            raise UserError(
                f"{entry.path}: {_lacks(manifest)}: training needs pairs, rows with both; shards of one modality serve "
                "limoe eval and limoe analyze"
            )
        if manifest.pairs is not None:
            lacking += manifest.rows - manifest.pairs
            share += entry.weight / total * (manifest.rows - manifest.pairs) / manifest.rows
    if lacking >= MIN_BAD_ROWS and share > data.max_bad_frac:
        named = [
            f"{entry.path}: {_lacks(manifest)}"
            for entry, manifest in zip(entries, manifests, strict=True)
            if manifest.pairs not in (None, manifest.rows)
        ]
        raise UserError(
            "; ".join(named) + f": {share:.1%} of what would be read is no pair to train on, more than "
            f"data.max_bad_frac={data.max_bad_frac:g}: pack the pairs alone, or raise data.max_bad_frac "
            "(other rows of the shard then stand in)"
        )


def _lacks(manifest: Manifest) -> str:
    counts = {"caption": manifest.without_caption, "picture": manifest.without_picture}
    return " and ".join(
        f"{count} of the {manifest.rows} rows have no {what}" for what, count in counts.items() if count
    )


def crowded(data: Data, manifests: Sequence[Manifest], *, batch_pairs: int) -> list[str]:
    """One sentence for each source of which a batch reads more samples than it has rows."""
    entries = entries_of(data)
    total = sum(entry.weight for entry in entries)
    lines = []
    for entry, manifest in zip(entries, manifests, strict=True):
        samples = batch_pairs * entry.weight / total
        if samples > manifest.rows:
            what = f"the data has {manifest.rows} rows"
            if len(entries) > 1:
                what = f"{samples:g} of them are from {entry.path}, which has {manifest.rows} rows"
            lines.append(f"train.batch_pairs={batch_pairs}, but {what}: every batch holds rows more than once")
    return lines


def described(data: Data, manifests: Sequence[Manifest], *, samples: int) -> list[str]:
    """One line for each source of a mixture: its share, and how often a run of so many samples reads its rows."""
    entries = entries_of(data)
    if len(entries) == 1:
        return []
    counts = Mixture([entry.weight for entry in entries]).counts(samples)
    total = sum(entry.weight for entry in entries)
    return [
        f"data: {entry.weight / total:.2%} from {entry.path}: {count} samples, {count / manifest.rows:.3g} epochs of "
        f"its {manifest.rows} rows"
        for entry, manifest, count in zip(entries, manifests, counts, strict=True)
    ]


def data_hash(data: Data, manifests: Sequence[Manifest]) -> str:
    """Hash of order version, shards' checksums and mixture weights: runs with the same hash read the same rows."""
    hashes = [hashlib.sha256("".join(shard.sha256 for shard in one.shards).encode()).hexdigest() for one in manifests]
    weights = [entry.weight for entry in entries_of(data)] if len(hashes) > 1 else [1]
    content = [ORDER_VERSION, *zip(weights, hashes, strict=True)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Drawn:
    """What n positions read, (n,) int64 each."""

    sources: Ints
    epochs: Ints
    """Of the source."""
    rows: Ints
    """Of the source, from 0."""


class Mixture:
    """The fixed interleaving of sources with whole weights."""

    def __init__(self, weights: Sequence[int]) -> None:
        """weights: >= 1, in the order of the sources. Raises ValueError for others, and for a sum above MAX_PERIOD."""
        if not weights or min(weights) < 1 or sum(weights) > MAX_PERIOD:
            raise ValueError(f"weights {tuple(weights)} must be at least 1 with a sum of at most {MAX_PERIOD}")
        self._weights = np.array(weights, dtype=np.int64)
        self._pattern = _interleaving(weights)
        self._places = [np.flatnonzero(self._pattern == source) for source in range(len(weights))]
        self._nth = np.empty(len(self._pattern), dtype=np.int64)
        for places in self._places:
            self._nth[places] = np.arange(len(places))

    @property
    def period(self) -> int:
        """Positions after which the pattern repeats; each source comes at least once in so many."""
        return len(self._pattern)

    def at(self, positions: Ints, orders: Sequence[SourceOrder]) -> Drawn:
        """Source, epoch and row that each position reads.

        positions: (n,) int64, >= 0. orders: of each source; see `orders_of`.
        """
        sources, samples = self.samples(positions)
        epochs, found = np.empty_like(samples), np.empty_like(samples)
        for source, order in enumerate(orders):
            here = np.flatnonzero(sources == source)
            epochs[here], found[here] = order.at(samples[here])
        return Drawn(sources=sources, epochs=epochs, rows=found)

    def samples(self, positions: Ints) -> tuple[Ints, Ints]:
        """Source of each position, and how many samples that source had before: (n,) int64 each."""
        turns, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self._pattern))
        sources = self._pattern[places]
        return sources, turns * self._weights[sources] + self._nth[places]

    def counts(self, end: int) -> list[int]:
        """Samples of each source among positions 0 to end - 1."""
        turns, place = divmod(end, len(self._pattern))
        return [
            turns * int(weight) + int(np.searchsorted(places, place))
            for weight, places in zip(self._weights, self._places, strict=True)
        ]


def orders_of(data: Data, manifests: Sequence[Manifest], *, seed: int) -> tuple[SourceOrder, ...]:
    """How each source is read: two copies of one manifest are read in different orders."""
    return tuple(
        SourceOrder(
            shard_rows=tuple(shard.rows for shard in manifest.shards),
            seed=seed,
            source=source,
            window_rows=data.window_rows,
            block_shards=data.block_shards,
        )
        for source, manifest in enumerate(manifests)
    )


def _interleaving(weights: Sequence[int]) -> Ints:
    """The source of each position of one period, (W,) int64.

    With a = 1 / (2k - 2), sample j of a source (from 1) may come when (j - 1 + a) W / w positions are reached, and must
    before (j - a) W / w are passed. Of those whose turn has come the earliest deadline goes first; of equals, the
    earlier source.
    """
    period, twice = sum(weights), max(2, 2 * len(weights) - 2)
    # Times in units of 1 / twice, so that all are whole numbers; the position after the n-th sample is n.
    coming = [(-(-(period) // (twice * weight)), source, 1) for source, weight in enumerate(weights)]
    heapq.heapify(coming)
    due: list[tuple[Fraction, int, int]] = []
    pattern = np.empty(period, dtype=np.int64)
    for position in range(1, period + 1):
        while coming and coming[0][0] <= position:
            _, source, sample = heapq.heappop(coming)
            heapq.heappush(due, (Fraction((twice * sample - 1) * period, twice * weights[source]), source, sample))
        _, source, sample = heapq.heappop(due)
        pattern[position - 1] = source
        if sample < weights[source]:
            heapq.heappush(coming, (-(-(twice * sample + 1) * period // (twice * weights[source])), source, sample + 1))
    return pattern


def _parsed(text: str) -> tuple[str, Fraction, str]:
    """Path, weight, and what is wrong with the entry, or the empty string."""
    path, sign, weight = text.rpartition("=")
    path, weight = path.strip(), weight.strip()
    if not sign or not path:
        return "", Fraction(0), f"has no {'path' if sign else 'weight'}: {_ENTRY}"
    try:
        number = Fraction(weight if _WEIGHT.fullmatch(weight) else "")
    except (ValueError, ZeroDivisionError):
        return "", Fraction(0), f'has the weight "{weight}": a weight is a number above 0 such as 3, 0.25 or 1/4'
    return path, number, "" if number else "has the weight 0: leave the entry out, or give it a weight above 0"


def _whole(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in the same ratios. Raises UserError where their sum is above MAX_PERIOD."""
    common = math.lcm(*(weight.denominator for weight in weights))
    whole = _reduced([int(weight * common) for weight in weights])
    if (period := sum(whole)) > MAX_PERIOD:
        near = _reduced([max(1, round(1000 * weight / period)) for weight in whole])
        raise UserError(
            f"data.mixture: the weights {', '.join(map(str, whole))} (in whole numbers) repeat only after {period} "
            f"samples, more than {MAX_PERIOD}: use rounder ones, such as {', '.join(map(str, near))}; "
            "a third is 1/3, not 0.333333"
        )
    return whole


def _reduced(weights: Sequence[int]) -> list[int]:
    divisor = math.gcd(*weights)
    return [weight // divisor for weight in weights]


def manifest_file(path: Path | str) -> str:
    """The one name of a manifest that may be given by its folder, by a link, or from here."""
    place = manifest_place(path)
    return place if is_remote(place) else str(local(place).resolve())


def _absolute(place: str) -> str:
    return place if is_remote(place) else str(local(place).absolute())
