"""The data order in plain Python integers and lists, as docs/loading.md tells it; imports nothing of the product.

A whole epoch is written out, row by row, and a run walks through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

WORD = (1 << 64) - 1


def mix(word: int) -> int:
    """SplitMix64's output function, increment included."""
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def permutation(size: int, key: int) -> list[int]:
    """Eight Feistel rounds on the next power of four; values outside are permuted again."""
    half = 1
    while 4**half < size:
        half += 1
    mask = (1 << half) - 1

    def once(word: int) -> int:
        left, right = word >> half, word & mask
        for number in range(8):
            left, right = right, left ^ (mix(right + mix(key + number)) & mask)
        return left << half | right

    found = []
    for place in range(size):
        word = once(place)
        while word >= size:
            word = once(word)
        found.append(word)
    return found


def epoch_key(seed: int, source: int, epoch: int) -> int:
    return mix(mix(mix(mix(seed)) ^ source) ^ mix(epoch + 1))


def shard_order(shards: int, block: int, key: int) -> list[int]:
    """Blocks of neighbouring shards in a random order, the shards of a block in their own."""
    blocks = [list(range(first, min(first + block, shards))) for first in range(0, shards, block)]
    return [shard for number in permutation(len(blocks), mix(key ^ 0xB10C)) for shard in blocks[number]]


def sequence(shard_rows: list[int], block: int, key: int) -> list[int]:
    """The rows of an epoch before windows are mixed."""
    starts = [sum(shard_rows[:shard]) for shard in range(len(shard_rows))]
    return [
        starts[shard] + row for shard in shard_order(len(shard_rows), block, key) for row in range(shard_rows[shard])
    ]


def epoch_rows(
    shard_rows: list[int], *, seed: int, source: int = 0, epoch: int = 0, window: int = 0, block: int = 1
) -> list[int]:
    """The rows of one epoch in the order in which they are read."""
    key, rows = epoch_key(seed, source, epoch), sum(shard_rows)
    if window == 0 or window >= rows:
        return permutation(rows, key)
    in_sequence, found = sequence(shard_rows, block, key), []
    for number, first in enumerate(range(0, rows, window)):
        part = in_sequence[first : first + window]
        found += [part[place] for place in permutation(len(part), mix(mix(key ^ 0x319D) + number & WORD))]
    return found


def shards_ahead(
    shard_rows: list[int], sample: int, *, seed: int, window: int, block: int, windows: int = 2
) -> list[int]:
    """The shards of `windows` windows from the one of this sample on, in the order of need, each once."""
    rows, found = sum(shard_rows), []
    epoch, place = divmod(sample, rows)
    first = epoch * rows + place // window * window
    shard_of = [shard for shard, count in enumerate(shard_rows) for _ in range(count)]
    for one in range(first, first + windows * window):
        key = epoch_key(seed, 0, one // rows)
        shard = shard_of[sequence(shard_rows, block, key)[one % rows]]
        if shard not in found:
            found.append(shard)
    return found


def allowed_positions(quarantined: list[tuple[int, int]]) -> Iterator[int]:
    """The positions that a run reads, one after the other."""
    position = 0
    while True:
        if not any(first <= position < end for first, end in quarantined):
            yield position
        position += 1


def pattern(weights: list[int]) -> list[int]:
    """Tijdeman's interleaving: of the sources whose next sample may come, the one with the earliest deadline."""
    period, count = sum(weights), len(weights)
    a = Fraction(1, 2 * count - 2) if count > 1 else Fraction(1, 2)
    had, found = [0] * count, []
    for position in range(1, period + 1):
        ready = []
        for source, weight in enumerate(weights):
            sample = had[source] + 1
            if sample <= weight and (sample - 1 + a) * period / weight <= position:
                ready.append(((sample - a) * period / weight, source))
        _, source = min(ready)
        had[source] += 1
        found.append(source)
    return found


def checksum(positions: list[int], rows: list[int]) -> int:
    return sum(mix(mix(position) ^ row) for position, row in zip(positions, rows, strict=True)) & WORD
