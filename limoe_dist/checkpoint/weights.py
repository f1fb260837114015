"""Writes a checkpoint of weights alone, in one process: for what is made from other checkpoints.

A file is written as its tensors come, some rows at a time, so that a model larger than the memory can pass through.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from limoe_dist.checkpoint import catalog, disk
from limoe_dist.checkpoint.manifest import BLOCK, Damaged, read_manifest, verify
from limoe_dist.checkpoint.rank_file import encode_header, file_name
from limoe_dist.checkpoint.saver import commit
from limoe_dist.checkpoint.state import State
from limoe_dist.parallel.placement import Shard

AT_ONCE = 1 << 22
"""Numbers of a tensor that are in memory at once, or one row of its first dim where that has more."""

Rows = Callable[[str, int, int], Tensor]
"""Gives the rows `first` to `end` - 1 of a named tensor along its first dim, in its planned type; a scalar has one row
and comes as a vector of one."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


def silent(what: str, done: int, total: int) -> None:
    """The Progress that shows nothing."""


def planned(shape: tuple[int, ...], dtype: torch.dtype) -> Shard:
    """A whole tensor that is still to come."""
    return Shard(torch.empty(shape, dtype=dtype, device="meta"), shape, (0,) * len(shape), writes=True)


def write_weights(
    run_dir: Path, state: State, tensors: dict[str, Shard], rows: Rows, *, progress: Progress = silent
) -> Path:
    """A whole and verified checkpoint in RUN/checkpoints, of the tensors that were `planned`; its directory.

    Raises OSError, and Damaged where the disk does not give back what was written.
    """
    target = catalog.checkpoint_folder(run_dir, state.step)
    folder = target.with_name(f".saving-{state.step:08d}-{secrets.token_hex(8)}")
    disk.make_folder(folder)
    entry = disk.write_file(folder / file_name(0), _blocks(tensors, rows, progress))
    commit(folder, target, state, (entry,))
    if problems := verify(target, read_manifest(target).files):
        raise Damaged(f"read back, {problems[0]}")
    catalog.note_verified(target)
    return target


def _blocks(tensors: dict[str, Shard], rows: Rows, progress: Progress) -> Iterator[memoryview]:
    """The content of the file, in order."""
    wide_first = sorted(tensors.items(), key=lambda item: -item[1].tensor.dtype.itemsize)
    yield memoryview(encode_header(wide_first))
    total = sum(shard.tensor.numel() for _, shard in wide_first)
    done = 0
    for name, shard in wide_first:
        for first, end in _spans(shard.shape):
            part = rows(name, first, end)
            assert part.dtype == shard.tensor.dtype, name
            content = memoryview(part.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for begin in range(0, len(content), BLOCK):
                yield content[begin : begin + BLOCK]
            done += part.numel()
            progress("written, M parameters", done // 10**6, total // 10**6)


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows (first, end) that are in memory together."""
    count = shape[0] if shape else 1
    step = max(1, AT_ONCE // max(1, math.prod(shape[1:])))
    for first in range(0, count, step):
        yield first, min(count, first + step)
