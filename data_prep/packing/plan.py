"""Which rows are packed together: the blocks of all sources in the order of the seed, cut into groups.

A group is the piece of work that is done whole or not at all, whoever does it. Its rows come from blocks of everywhere
and are shuffled among themselves; a set of a few thousand rows is one group, and so is shuffled row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.sources.source import Block, Source
from limoe_dist.data.order import epoch_keys, permuted


@dataclass(frozen=True)
class Plan:
    """A function of the sources and the seed alone: every process that makes it makes the same one.

    12 bytes a block in memory, whatever its rows are.
    """

    source: npt.NDArray[np.int32]
    """(blocks,), in the order of the groups: index into the sources by name."""
    block: npt.NDArray[np.int64]
    """(blocks,), index into `blocks` of that source."""
    ends: npt.NDArray[np.int64]
    """(groups,): group g has the blocks from ends[g - 1] to ends[g]."""
    group_rows: npt.NDArray[np.int64]
    """(groups,), rows that are read for it."""

    @property
    def groups(self) -> int:
        return len(self.ends)

    @property
    def rows(self) -> int:
        return int(self.group_rows.sum())


def by_name(sources: Sequence[Source]) -> list[Source]:
    """The sources as a plan counts them: in what order they were named makes no difference to the shards."""
    return sorted(sources, key=lambda source: source.name)


def plan(sources: Sequence[Source], *, seed: int, group_rows: int) -> Plan:
    """Cuts all blocks into groups of about `group_rows` rows, all of nearly the same size; one block at least in each.

    sources: as `by_name` gives them. seed: 0 to 2**64 - 1. Raises ValueError for a seed outside.
    """
    rows = [np.fromiter((block.rows for block in one.blocks), np.int64, count=len(one.blocks)) for one in sources]
    source = np.repeat(np.arange(len(rows), dtype=np.int32), [len(one) for one in rows])
    block = np.concatenate([np.arange(len(one), dtype=np.int64) for one in rows]) if rows else np.zeros(0, np.int64)
    if not len(block):
        nothing = np.zeros(0, np.int64)
        return Plan(source, block, nothing, nothing)
    order = _shuffled(len(block), seed)
    until = np.cumsum(np.concatenate(rows)[order])
    groups = max(1, round(int(until[-1]) / group_rows))
    # Even shares of the rows: the last group is as large as the others, so no unit waits for a stray one.
    wanted = until[-1] * np.arange(1, groups + 1) // groups
    ends = np.unique(np.searchsorted(until, wanted, side="left") + 1)
    return Plan(source[order], block[order], ends, np.diff(until[ends - 1], prepend=0))


def _shuffled(count: int, seed: int) -> npt.NDArray[np.int64]:
    """0..count-1 in an order that the seed decides."""
    key = epoch_keys(seed, np.zeros(1, np.int64))
    return permuted(np.arange(count, dtype=np.int64), size=count, keys=np.repeat(key, count))


def blocks_of(plan: Plan, sources: Sequence[Source], group: int) -> Iterator[tuple[Source, Block]]:
    """What a group reads, in the order of the sources' files: neighbours on disk are read one behind the other."""
    chosen = slice(int(plan.ends[group - 1]) if group else 0, int(plan.ends[group]))
    source, block = plan.source[chosen], plan.block[chosen]
    for at in np.lexsort((block, source)).tolist():
        reader = sources[int(source[at])]
        yield reader, reader.blocks[int(block[at])]
