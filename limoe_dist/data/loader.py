"""Batches for training: positions -> rows -> captions and pictures -> tensors, prepared ahead by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import ShardSet
from limoe_dist.data.augment import augment_params, caption_index
from limoe_dist.data.dali import Decoder
from limoe_dist.data.header import refusal
from limoe_dist.data.mixture import Mixture, entries_of
from limoe_dist.data.order import Ranges, rank_positions
from limoe_dist.data.pictures import PictureReader
from limoe_dist.data.stand_ins import BadCount, BadRow, fill
from limoe_dist.data.tokenizer import Tokenizer
from limoe_dist.data.transfer import copies_finished, on_device, use_on_current_stream


@dataclass(frozen=True)
class Batch:
    """This rank's slice of the global batch of one step, on the device; b = train.batch_pairs / world."""

    step: int
    first_position: int
    """The first of the b positions that were consumed: neighbours, but where a quarantined range is between them."""
    rows: npt.NDArray[np.int64]
    """(b,) the rows that were used, by their number in the whole ShardSet: a stand-in where the own row is bad."""
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

    A step's batch is a function of (train.seed, step), of the quarantined positions, of the shards and of the weights
    of data.mixture alone, never of what was read before; a rank gets its contiguous slice of it.
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
        quarantined: Ranges = (),
    ) -> None:
        """Starts the thread. Raises ValueError where world does not divide train.batch_pairs.

        shards: of data.mixture, the parts in its order; else one.
        """
        self.run, self.shards, self.tokenizer, self.device = run, shards, tokenizer, device
        self.rank, self.world, self.quarantined = rank, world, quarantined
        self._mixture = Mixture([entry.weight for entry in entries_of(run.data)])
        self._first_rows = np.array([part.first_row for part in shards.parts], dtype=np.int64)
        pairs = len(self._positions(first_step))
        decoder = Decoder(run.image, mode="train", batch_size=pairs, threads=run.data.threads, device=device)
        self._reader = PictureReader(decoder, refusal)
        self._count = BadCount(run.data.max_bad_frac, " and ".join(str(part.path) for part in shards.parts))
        self._closed = threading.Event()
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
        """Ends the thread and waits for it; batches prepared ahead are dropped. A second call does nothing."""
        self._closed.set()
        self._thread.join()
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

    def _positions(self, step: int) -> npt.NDArray[np.int64]:
        return rank_positions(
            step,
            batch_pairs=self.run.train.batch_pairs,
            rank=self.rank,
            world=self.world,
            quarantined=self.quarantined,
        )

    def _prepare(self, step: int) -> Batch:
        seed, positions = self.run.train.seed, self._positions(step)
        drawn = self._mixture.at(positions, rows=[part.manifest.rows for part in self.shards.parts], seed=seed)
        numbers = self._first_rows[drawn.sources] + drawn.rows
        params = augment_params(positions, self.run.image, seed=seed)
        with copies_finished(self.device):
            filled = fill(self.shards, self._reader, positions.tolist(), numbers.tolist(), params)
            self._count.add(filled)
            tokens = self.tokenizer(
                [
                    row.captions[caption_index(draw, len(row.captions))]
                    for row, draw in zip(filled.rows, params.caption, strict=True)
                ]
            )
            return Batch(
                step=step,
                first_position=int(positions[0]),
                rows=np.array([row.number for row in filled.rows], dtype=np.int64),
                images=filled.images,
                tokens=on_device(tokens.tokens, self.device),
                valid=on_device(tokens.valid, self.device),
                replaced=filled.replaced,
                bad=self._count.bad,
                seen=self._count.seen,
            )
