"""Batches for training: positions -> rows -> captions and pictures -> tensors, prepared ahead by one thread.

Rows that others stand in for are written down as they are met.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limoe_dist.config.errors import warn
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.augment import augment_params, caption_index
from limoe_dist.data.dali import Decoder
from limoe_dist.data.header import refusal
from limoe_dist.data.mixture import Mixture, entries_of, orders_of
from limoe_dist.data.order import Ints, Ranges, rank_positions, rows_checksum
from limoe_dist.data.pictures import PictureReader
from limoe_dist.data.stand_ins import BadCount, BadRow, Filled, fill
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.data.transfer import copies_finished, on_device, use_on_current_stream

MOST_MAPPED = 16_384
"""Shards mapped at once: Linux gives a process 65,530 mappings (vm.max_map_count), torch and DALI take some."""


@dataclass(frozen=True)
class Batch:
    """This rank's slice of the global batch of one step, on the device; b = train.batch_pairs / world."""

    step: int
    first_position: int
    """The first of the b positions that were consumed: neighbours, but where a quarantined range is between them."""
    rows: npt.NDArray[np.int64]
    """(b,) the rows that were used, by their number in the whole ShardSet: a stand-in where the own row is bad."""
    checksum: int
    """Of the positions and the rows that they used; see `order.rows_checksum`."""
    images: Tensor
    """(b, 3, size, size) float32, normalised."""
    tokens: Tensor
    """(b, length) int64."""
    valid: Tensor
    """(b, length) bool: True on the pieces and the end-of-text, False on padding."""
    replaced: tuple[BadRow, ...]
    """The bad rows that this batch met."""
    bad: int
    seen: int
    """Bad rows, and all rows, that this loader has read so far, this batch included: of this rank alone."""


class Loader:
    """One Batch a step, from `first_step` to train.steps - 1. Iterate once, and close (or use `with`):
    a thread works ahead.

    Pair p of the run is a function of train.seed, of the quarantined positions, of the shards, their order and the
    weights of data.mixture alone, never of what was read before, of the batch or of the ranks; a rank gets its
    contiguous slice of a step's pairs.
    """

    def __init__(
        self,
        run: Run,
        shards: ShardSet,
        tokenizer: Tokenizer,
        *,
        rank: int,
        world: int,
        first_step: int,
        device: torch.device,
        first_pair: int | None = None,
        quarantined: Ranges = (),
        replaced: Path | None = None,
    ) -> None:
        """Starts the thread. Raises ValueError where world does not divide train.batch_pairs.

        shards: of data.mixture, the parts in its order; else one.
        first_pair: pairs that the run has read before first_step; None: those of so many steps of train.batch_pairs.
        replaced: a file for lines about rows that others stand in for, as they are met; None: it is not kept.
        """
        self.run, self.shards, self.tokenizer, self.device = run, shards, tokenizer, device
        self.rank, self.world, self.quarantined = rank, world, quarantined
        self._first_step = first_step
        self._first_pair = first_step * run.train.batch_pairs if first_pair is None else first_pair
        manifests = [part.manifest for part in shards.parts]
        self._mixture = Mixture([entry.weight for entry in entries_of(run.data)])
        self._orders = orders_of(run.data, manifests, seed=run.train.seed)
        self._first_rows = np.array([part.first_row for part in shards.parts], dtype=np.int64)
        self._first_shards = np.cumsum([0, *(len(one.shards) for one in manifests)]).tolist()
        open_at_once = sum(order.shards_of_a_window for order in self._orders)
        shards.most_open = min(max(shards.most_open, open_at_once), MOST_MAPPED)
        self._ahead: list[list[int]] = []
        pairs = len(self._positions(first_step))
        decoder = Decoder(run.image, mode="train", batch_size=pairs, threads=run.data.threads, device=device)
        self._reader = PictureReader(decoder, refusal)
        place = " and ".join(part.path for part in shards.parts)
        self._count = BadCount(run.data.max_bad_frac, place, report="" if replaced is None else str(replaced))
        self._replaced = replaced
        self._closed = threading.Event()
        self._ended = False
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=run.data.prefetch)
        self._thread = threading.Thread(target=self._work, args=(first_step,), name="limoe-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next step's batch. Raises what stopped the thread: UserError for too many bad rows or a damaged shard."""
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, Batch):
            use_on_current_stream(item.images, item.tokens, item.valid)
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the thread and waits for it; batches prepared ahead are dropped, and nothing more is fetched for it.

        Another loader may then read the same ShardSet. A second call does nothing, also while another reads.
        """
        if self._ended:
            return
        self._closed.set()
        # The thread may be waiting for a shard.
        with self.shards.cache.interrupted() if self.shards.cache is not None else nullcontext():
            self._thread.join()
        self._ended = True
        while not self._ready.empty():
            self._ready.get_nowait()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, first_step: int) -> None:
        last: BaseException | None = None
        try:
            for step in range(first_step, self.run.train.steps):
                self._hand_over(self._prepare(step))
                if self._closed.is_set():
                    return
        except BaseException as error:  # whatever it is, it belongs to the thread that waits for the batch
            last = error
        self._hand_over(last)

    def _hand_over(self, item: Batch | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.05)
            except queue.Full:
                continue
            return

    def _positions(self, step: int) -> Ints:
        batch_pairs = self.run.train.batch_pairs
        return rank_positions(
            self._first_pair + (step - self._first_step) * batch_pairs,
            batch_pairs=batch_pairs,
            rank=self.rank,
            world=self.world,
            quarantined=self.quarantined,
        )

    def _prepare(self, step: int) -> Batch:
        positions = self._positions(step)
        self._fetch_ahead(int(positions[0]))
        drawn = self._mixture.at(positions, self._orders)
        numbers = self._first_rows[drawn.sources] + drawn.rows
        params = augment_params(positions, self.run.image, seed=self.run.train.seed)
        with copies_finished(self.device):
            filled = fill(self.shards, self._reader, positions.tolist(), numbers.tolist(), params)
            self._write_down(filled)
            self._count.add(filled)
            tokens = self.tokenizer(
                [
                    row.captions[caption_index(draw, len(row.captions))]
                    for row, draw in zip(filled.rows, params.caption, strict=True)
                ]
            )
            rows = np.array([row.number for row in filled.rows], dtype=np.int64)
            return Batch(
                step=step,
                first_position=int(positions[0]),
                rows=rows,
                checksum=rows_checksum(positions, rows),
                images=filled.images,
                tokens=on_device(tokens.tokens, self.device),
                valid=on_device(tokens.valid, self.device),
                replaced=filled.replaced,
                bad=self._count.bad,
                seen=self._count.seen,
            )

    def _fetch_ahead(self, position: int) -> None:
        """Names the shards of this window and the next to the cache, where that has changed."""
        if self.shards.cache is None:
            return
        sources, samples = self._mixture.samples(np.arange(position, position + self._mixture.period))
        firsts = [int(samples[sources == source].min()) for source in range(len(self._orders))]
        ahead = [
            [self._first_shards[source] + shard for shard in order.shards_from(sample)]
            for source, (order, sample) in enumerate(zip(self._orders, firsts, strict=True))
        ]
        if ahead != self._ahead:
            self._ahead = ahead
            # All sources are read at once: of each the first, then of each the second...
            rounds = zip_longest(*ahead)
            self.shards.want([shard for turn in rounds for shard in turn if shard is not None])

    def _write_down(self, filled: Filled) -> None:
        """One line for each position whose own row is bad. `limoe prep audit` reads it."""
        if self._replaced is None or not filled.replaced:
            return
        used = {position: row.number for position, row in zip(filled.positions, filled.rows, strict=True)}
        met: dict[int, list[BadRow]] = {}
        for bad in filled.replaced:
            met.setdefault(bad.position, []).append(bad)
        lines = [
            {
                "position": position,
                "row": bad[0].row,
                "key": bad[0].key,
                "reason": bad[0].reason,
                "bad_stand_ins": [other.row for other in bad[1:]],
                "stand_in": used[position],
            }
            for position, bad in met.items()
        ]
        try:
            _append(self._replaced, "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            warn(f"{self._replaced}: {len(lines)} lines about replaced rows are lost: {error.strerror}")


def _append(path: Path, lines: str) -> None:
    """Appends whole lines, also where a kill or a full disk left a part of one: else that would spoil the next, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        cut = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut + lines.encode())
