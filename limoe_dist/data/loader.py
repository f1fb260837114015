"""Batches for training and for evaluation: positions -> rows -> captions and pictures -> tensors, prepared one thread ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from limoe_dist.config.errors import UserError
from limoe_dist.config.schema import Run
from limoe_dist.data.arrow import Row, ShardSet
from limoe_dist.data.augment import AugmentParams, augment_params, caption_index
from limoe_dist.data.dali import Decoder
from limoe_dist.data.header import refusal
from limoe_dist.data.order import rank_positions, row_at
from limoe_dist.data.pictures import PictureReader
from limoe_dist.data.tokenizer import Tokenizer

MAX_TRIES = 16
"""Rows of the same shard that are tried in place of one that cannot be decoded."""
MIN_BAD_ROWS = 16
"""Fewer bad rows than this never stop a run, whatever their share."""


@dataclass(frozen=True)
class BadRow:
    position: int
    """The position that met the row."""
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """This rank's slice of the global batch of one step, on the device; b = train.batch_pairs / world."""

    step: int
    first_position: int
    """Positions first_position to first_position + b - 1 were consumed."""
    rows: npt.NDArray[np.int64]
    """(b,) the rows that were used; a stand-in where the position's own row is bad."""
    images: Tensor
    """(b, 3, size, size) float32, normalised."""
    tokens: Tensor
    """(b, length) int64."""
    valid: Tensor
    """(b, length) bool: pieces and the end-of-text; False on padding."""
    replaced: tuple[BadRow, ...]
    """The bad rows that this batch met."""
    bad: int
    seen: int
    """Bad rows and all rows that this loader has read so far, this batch included; of this rank alone."""


class Loader:
    """One Batch per step, from `first_step` to train.steps - 1. Iterate once, and close (or use `with`): a thread works ahead.

    What step s holds is a function of (train.seed, s) and of the shards alone: a rank's slice never depends on what was read before.
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
    ) -> None:
        self.run, self.shards, self.tokenizer, self.device = run, shards, tokenizer, device
        self.rank, self.world = rank, world
        local_pairs = len(rank_positions(0, batch_pairs=run.train.batch_pairs, rank=rank, world=world))
        decoder = Decoder(
            run.image, mode="train", batch_size=local_pairs, threads=run.data.threads, device=device
        )
        self._reader = PictureReader(decoder, refusal)
        self._bad, self._seen = 0, 0
        self._first_bad: list[BadRow] = []
        self._stop = threading.Event()
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=run.data.prefetch)
        self._thread = threading.Thread(target=self._work, args=(first_step,), name="limoe-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next step's batch. Raises what the loading thread raised: UserError for too many bad rows or a damaged shard."""
        if self._stop.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, Batch):
            return _used_here(item)
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the thread and waits for it; batches that were prepared ahead are dropped. May be called twice."""
        self._stop.set()
        while self._thread.is_alive():
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.05)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self, first_step: int) -> None:
        try:
            for step in range(first_step, self.run.train.steps):
                if self._stop.is_set():
                    return
                self._put(self._prepare(step))
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    def _prepare(self, step: int) -> Batch:
        train = self.run.train
        positions = rank_positions(step, batch_pairs=train.batch_pairs, rank=self.rank, world=self.world)
        _, numbers = row_at(positions, rows=len(self.shards), seed=train.seed)
        params = augment_params(positions, self.run.image, seed=train.seed)
        with _side_stream(self.device):
            rows, images, replaced = self._read(positions, [self.shards.row(int(n)) for n in numbers], params)
            self._count(len(rows) + len(replaced), replaced)
            texts = [
                row.captions[caption_index(draw, len(row.captions))]
                for row, draw in zip(rows, params.caption, strict=True)
            ]
            tokens = self.tokenizer(texts)
            return Batch(
                step=step,
                first_position=int(positions[0]),
                rows=np.array([row.number for row in rows], dtype=np.int64),
                images=images,
                tokens=_on_device(tokens.tokens, self.device),
                valid=_on_device(tokens.valid, self.device),
                replaced=tuple(replaced),
                bad=self._bad,
                seen=self._seen,
            )

    def _read(
        self, positions: npt.NDArray[np.int64], rows: list[Row], params: AugmentParams
    ) -> tuple[list[Row], Tensor, list[BadRow]]:
        """Pictures of all positions; a bad row gives way to the next of its shard, which keeps the position's parameters."""
        pictures = self._reader.read(rows, params)
        images, reasons = pictures.images, dict(enumerate(pictures.reasons))
        stand_ins = {i: self.shards.next_in_shard(rows[i].number, MAX_TRIES) for i in reasons if reasons[i]}
        first = dict(stand_ins and {i: rows[i] for i in stand_ins})
        replaced = []
        while pending := [i for i in sorted(reasons) if reasons[i]]:
            for i in pending:
                replaced.append(BadRow(int(positions[i]), rows[i].key, reasons[i] or ""))
                number = next(stand_ins[i], None)
                if number is None:
                    raise UserError(self._exhausted(first[i], reasons[i] or ""))
                rows[i] = self.shards.row(number)
            again = self._reader.read([rows[i] for i in pending], params.take(pending))
            images[torch.as_tensor(pending, device=images.device)] = again.images
            reasons = dict(zip(pending, again.reasons, strict=True))
        return rows, images, replaced

    def _exhausted(self, row: Row, reason: str) -> str:
        shard = self.shards.manifest.shards[row.shard]
        tried = min(MAX_TRIES, shard.rows - 1)
        return (
            f'{self.shards.folder / shard.file}: row {row.index_in_shard} (key "{row.key}") and the {tried} rows tried '
            f"in its place are bad (the last: {reason}): pack the shard again from whole pictures"
        )

    def _count(self, seen: int, replaced: Sequence[BadRow]) -> None:
        self._seen += seen
        self._bad += len(replaced)
        self._first_bad += replaced[: 5 - len(self._first_bad)]
        limit = self.run.data.max_bad_frac
        if self._bad >= MIN_BAD_ROWS and self._bad > limit * self._seen:
            named = "; ".join(f"{row.key}: {row.reason}" for row in self._first_bad)
            raise UserError(
                f"{self.shards.path}: {self._bad} of {self._seen} rows read so far are bad, more than "
                f"data.max_bad_frac={limit:g} (the first: {named}): pack again from whole pictures, or raise data.max_bad_frac"
            )


def _on_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
