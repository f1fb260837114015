"""Which rows to drop so that no picture stays twice, and none that an evaluation set holds.

Preferred is the picture with most pixels, then most captions, then the smaller hash of its key. In this order:
1. Evaluation pictures stay. A row with the pixels of one, or within the radius of one, is dropped.
2. Of rows with the same pixels the most preferred one stands for all.
3. From the most preferred on, a row is dropped that is within the radius of one that is kept.
A plain picture (phash.LEAST_INFORMATION) takes part in comparisons of pixels only.
So every dropped row has a row that stays within the radius, and no two that stay are within it of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.dedup.fingerprints import Prints
from data_prep.dedup.near import Nearest, first_within, keep_greedily

EXACT, NEAR, EVALUATION = range(3)
"""As in drop_list.REASONS."""


@dataclass(frozen=True)
class Drops:
    """The rows to drop, D of them, in rising order."""

    row_D: Any
    """uint32: index into the prints."""
    kept_D: Any
    """uint32: the row for which it is dropped; it stays."""
    reason_D: Any
    """uint8: EXACT, NEAR or EVALUATION."""
    bits_D: Any
    """uint8: how many bits of the two hashes differ."""


def find_duplicates(prints: Prints, evaluation: int, radius: int | None) -> Drops:
    """The result depends on the rows alone, not on their order. Empties `prints`, column by column, to save memory.

    prints: those of evaluation sets are the first `evaluation`. radius: in bits; None: the same pixels only.
    """
    nothing = np.empty(0)
    order = _by_preference(prints, evaluation)
    prints.key_R = prints.captions_R = prints.pixels_R = nothing
    leader = _first_of_same_pixels(prints.sha_R2, order)
    prints.sha_R2 = nothing
    target, bits = leader.copy(), np.zeros(len(order), dtype=np.uint8)
    if radius is not None:
        _near(prints, order, target, bits, evaluation, radius)
        # Who has the pixels of a row that is dropped goes with it.
        target, bits = target[leader], bits[leader]
    dropped = np.flatnonzero(target != np.arange(len(order), dtype=np.uint32))
    dropped = dropped[dropped >= evaluation]
    kept = target[dropped]
    reason = np.where(leader[dropped] == kept, EXACT, NEAR)
    reason[kept < evaluation] = EVALUATION
    rows = order[dropped]
    rising = np.argsort(rows)
    return Drops(rows[rising], order[kept][rising], reason.astype(np.uint8)[rising], bits[dropped][rising])


def _by_preference(prints: Prints, evaluation: int) -> Any:
    """(R,) uint32: the rows, the preferred first, all of the evaluation before all others.

    What follows speaks of a row by its rank, its place in this order.
    """
    # The last key counts first; of unsigned numbers the inverse rises where they fall.
    order = np.lexsort((prints.key_R, ~prints.captions_R, ~prints.pixels_R)).astype(np.uint32)
    ours = order >= evaluation
    return np.concatenate([order[~ours], order[ours]])


def _first_of_same_pixels(sha_R2: Any, order: Any) -> Any:
    """(R,) uint32: for each rank the first rank with its pixels."""
    leader = np.arange(len(order), dtype=np.uint32)
    # Half of the digest with the rank below it in one number: only what meets there is compared whole.
    packed = sha_R2[:, 0][order] & np.uint64(0xFFFFFFFF00000000) | leader
    packed.sort()
    same = np.zeros(len(packed), dtype=bool)
    same[1:] = packed[1:] >> np.uint64(32) == packed[:-1] >> np.uint64(32)
    same[:-1] |= same[1:]
    ranks = packed[same].astype(np.uint32)
    del packed
    ranks = ranks[np.lexsort((ranks, sha_R2[:, 1][order[ranks]], sha_R2[:, 0][order[ranks]]))]
    sha_S2 = sha_R2[order[ranks]]
    begins = np.ones(len(ranks), dtype=bool)
    begins[1:] = (sha_S2[1:] != sha_S2[:-1]).any(axis=1)
    leader[ranks] = _first_of_runs(ranks, begins)
    return leader


def _first_of_runs(values: Any, begins: Any) -> Any:
    """For each value the first of its run."""
    return values[begins][np.cumsum(begins) - 1] if len(values) else values


def _near(prints: Prints, order: Any, target: Any, bits: Any, evaluation: int, radius: int) -> None:
    """Fills target and bits for the leaders that are dropped for another one."""
    compared = np.flatnonzero((target == np.arange(len(order), dtype=np.uint32)) & ~prints.plain_R[order])
    compared = compared.astype(np.uint32)
    # Of equal hashes the first decides for all: whatever it is near to, they are.
    first = compared[_first_of_equal(prints.hash_R[order[compared]])]
    ranks_U = compared[first == compared]
    theirs, ours = ranks_U[ranks_U < evaluation], ranks_U[ranks_U >= evaluation]

    def hashes(ranks: Any) -> Any:
        return prints.hash_R[order[ranks]]

    def drop(ranks: Any, kept: Any, found: Nearest) -> Any:
        """Returns the ranks that stay."""
        near = found.first >= 0
        target[ranks[near]], bits[ranks[near]] = kept[found.first[near]], found.bits[near]
        return ranks[~near]

    ours = drop(ours, theirs, first_within(hashes(theirs), hashes(ours), radius))
    drop(ours, ours, keep_greedily(hashes(ours), radius))
    target[compared], bits[compared] = target[first], bits[first]


def _first_of_equal(values: Any) -> Any:
    """For each value the place of the first that is equal to it."""
    order = np.argsort(values, kind="stable").astype(np.uint32)
    begins = np.ones(len(values), dtype=bool)
    begins[1:] = values[order[1:]] != values[order[:-1]]
    first = np.empty(len(values), dtype=np.uint32)
    first[order] = _first_of_runs(order, begins)
    return first
