"""`limoe prep audit`: which rows a run has read, worked out anew from its ledger: each once in an epoch, or why not.

The ledger, RUN/positions.jsonl, says which positions of the data order each stretch of steps consumed, which of them
were jumped over, and a checksum of the rows that the ranks used there. The order of the data is a function of the run's
settings and manifests, so that all of it can be computed again: positions give rows, and rows must give the checksum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from limoe_dist.config.errors import UserError
from limoe_dist.config.parse import load_run
from limoe_dist.config.schema import Run
from limoe_dist.data.manifest import Manifest
from limoe_dist.data.mixture import Drawn, Mixture, data_hash, entries_of, load_manifests, orders_of
from limoe_dist.data.order import Ints, rows_checksum

CHUNK = 1 << 20
"""Positions worked on at a time."""
_NAMED = 5


@dataclass(frozen=True)
class Stretch:
    """What steps from_step + 1 to `step` consumed."""

    from_step: int
    step: int
    first: int
    end: int
    """Positions first to end - 1, but for those that are jumped over."""
    quarantined: tuple[tuple[int, int], ...]
    rows: str
    """Checksum of the rows that were used, in hexadecimal; empty where the line has none."""


@dataclass
class Epoch:
    """One epoch of one source."""

    source: str
    epoch: int
    rows: int
    once: int = 0
    """Rows that one position stood for."""
    more: int = 0
    """Rows that several positions stood for: a fault."""
    jumped: int = 0
    """Rows that only quarantined positions stood for."""
    ahead: int = 0
    """Rows that the run has not come to."""
    missing: int = 0
    """Rows of positions that the run passed, and the ledger does not hold: a fault."""
    replaced: int = 0
    """Of `once`: bad rows, for which another row of their shard was used."""


@dataclass
class Audit:
    run: str
    step: int
    position: int
    """Where the ledger ends: the next position that the run reads."""
    epochs: list[Epoch] = field(default_factory=list)
    checked: int = 0
    """Stretches whose checksum of rows is the one that was worked out."""
    unchecked: int = 0
    """Stretches without a checksum: of a run that was killed between a save and its line."""
    notes: list[str] = field(default_factory=list)
    """What is explained: replaced rows, jumped ranges."""
    faults: list[str] = field(default_factory=list)
    """What is not."""


@dataclass(frozen=True)
class Replaced:
    row: int
    """Of the whole set of sources."""
    stand_in: int
    key: str
    reason: str


def audit(
    run_dir: Path,
    *,
    advance: Callable[[int, int], None] = lambda done, total: None,
    take: Callable[[Ints, Drawn, Ints], None] = lambda positions, drawn, used: None,
) -> Audit:
    """Works out what a run has read.

    advance: told (positions done, positions in all). take: given every chunk of positions that were read, what they
    drew, and the rows of the whole set that were used for them.
    Raises UserError where there is no run, no ledger, or its data cannot be found.
    """
    run, stretches = _open(run_dir)
    manifests = load_manifests(run.data)
    replaced = _replaced(run_dir)
    found = Audit(run=str(run_dir), step=stretches[-1].step, position=stretches[-1].end)
    found.faults += _breaks(stretches) + _checkpoint_faults(run_dir, run, manifests, stretches[-1])
    tally = _Tally(run, manifests, found)
    for stretch in stretches:
        checksum = 0
        for positions, jumped in _chunks(stretch):
            drawn = tally.drawn(positions)
            if jumped:
                tally.jump(drawn)
            else:
                used = tally.used(positions, drawn, replaced)
                checksum += rows_checksum(positions, used)
                tally.read(drawn)
                take(positions, drawn, used)
            advance(int(positions[-1]) + 1, found.position)
        _compare(stretch, checksum, found)
    tally.finish()
    found.notes += _explained(stretches, replaced, tally)
    return found


class _Tally:
    """How often each row of each epoch was stood for; an epoch is closed as soon as all sources are past it."""

    def __init__(self, run: Run, manifests: Sequence[Manifest], found: Audit) -> None:
        self.entries = entries_of(run.data)
        self.mixture = Mixture([entry.weight for entry in self.entries])
        self.orders = orders_of(run.data, manifests, seed=run.train.seed)
        self.first_rows = np.cumsum([0, *(order.rows for order in self.orders)])
        self.found = found
        self.replaced_positions: list[int] = []
        self._seen: dict[tuple[int, int], Any] = {}
        self._jumped: dict[tuple[int, int], Any] = {}
        self._replaced: dict[tuple[int, int], int] = {}

    def drawn(self, positions: Ints) -> Drawn:
        return self.mixture.at(positions, self.orders)

    def used(self, positions: Ints, drawn: Drawn, replaced: dict[int, Replaced]) -> Ints:
        """The rows of the whole set that the ranks used. Faults where a line is about a row that was not due."""
        rows = self.first_rows[drawn.sources] + drawn.rows
        if replaced:
            for place in np.flatnonzero(np.isin(positions, np.fromiter(replaced, dtype=np.int64))).tolist():
                position, line = int(positions[place]), replaced[int(positions[place])]
                if line.row != rows[place]:
                    self.found.faults.append(
                        f"position {position} reads row {rows[place]}, but replaced/ says row {line.row} was met there"
                    )
                rows[place] = line.stand_in
                epoch = (int(drawn.sources[place]), int(drawn.epochs[place]))
                self._replaced[epoch] = self._replaced.get(epoch, 0) + 1
                self.replaced_positions.append(position)
        return rows

    def read(self, drawn: Drawn) -> None:
        for epoch, rows in self._by_epoch(drawn):
            np.add.at(self._counts(self._seen, epoch), rows, 1)

    def jump(self, drawn: Drawn) -> None:
        for epoch, rows in self._by_epoch(drawn):
            self._counts(self._jumped, epoch)[rows] = 1

    def finish(self) -> None:
        for epoch in sorted({*self._seen, *self._jumped}):
            self._close(epoch)
        self.found.epochs.sort(key=lambda one: (one.source, one.epoch))

    def _by_epoch(self, drawn: Drawn) -> Iterator[tuple[tuple[int, int], Ints]]:
        for source in np.unique(drawn.sources).tolist():
            here = drawn.sources == source
            epochs, rows = drawn.epochs[here], drawn.rows[here]
            # Samples of a source rise with the positions, and so do its epochs: what is before the first one is over.
            for past in [one for one in {*self._seen, *self._jumped} if one[0] == source and one[1] < epochs[0]]:
                self._close(past)
            starts = [0, *(np.flatnonzero(np.diff(epochs)) + 1).tolist(), len(epochs)]
            for first, end in pairwise(starts):
                yield (source, int(epochs[first])), rows[first:end]

    def _counts(self, kind: dict[tuple[int, int], Any], epoch: tuple[int, int]) -> Any:
        if epoch not in kind:
            kind[epoch] = np.zeros(self.orders[epoch[0]].rows, dtype=np.uint8)
        return kind[epoch]

    def _close(self, key: tuple[int, int]) -> None:
        source, epoch = key
        rows = self.orders[source].rows
        seen, jumped = self._counts(self._seen, key), self._counts(self._jumped, key)
        never = int(((seen == 0) & (jumped == 0)).sum())
        reached = self.mixture.counts(self.found.position)[source] - epoch * rows
        ahead = max(0, rows - reached)
        one = Epoch(
            source=self.entries[source].path,
            epoch=epoch,
            rows=rows,
            once=int((seen == 1).sum()),
            more=int((seen > 1).sum()),
            jumped=int(((seen == 0) & (jumped == 1)).sum()),
            ahead=ahead,
            missing=never - ahead,
            replaced=self._replaced.pop(key, 0),
        )
        del self._seen[key], self._jumped[key]
        self.found.epochs.append(one)
        for count, what in ((one.more, "were read more than once"), (one.missing, "were passed and not read")):
            if count:
                self.found.faults.append(f"{one.source}, epoch {epoch}: {count} of {rows} rows {what}")


def _open(run_dir: Path) -> tuple[Run, list[Stretch]]:
    if not (run_dir / "run.json").is_file():
        raise UserError(f"{run_dir}: there is no run.json: this is not the directory of a run")
    ledger = run_dir / "positions.jsonl"
    if not ledger.is_file():
        raise UserError(f"{ledger}: is not there: the run has not saved yet, or it is older than the ledger")
    stretches = []
    for number, line in enumerate(ledger.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # cut off by a kill, or being written: a run that goes on drops it, too
        try:
            content = json.loads(line)
            stretches.append(
                Stretch(
                    from_step=int(content["from_step"]),
                    step=int(content["step"]),
                    first=int(content["first"]),
                    end=int(content["end"]),
                    quarantined=tuple((int(first), int(end)) for first, end in content.get("quarantined", [])),
                    rows=str(content.get("rows", "")),
                )
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{ledger}, line {number}: is no line of a ledger: {line.rstrip()[:60]!r}") from None
    if not stretches:
        raise UserError(f"{ledger}: is empty: the run has not saved yet")
    return load_run(run_dir / "run.json"), stretches


def _breaks(stretches: Sequence[Stretch]) -> list[str]:
    """Where the ledger does not go on where it ended, in steps or in positions."""
    faults = []
    step = position = 0
    for one in stretches:
        if one.from_step != step:
            faults.append(f"the ledger has steps up to {step}, and then those from {one.from_step + 1} on")
        if one.first > position:
            faults.append(f"positions {position} to {one.first - 1} are in no stretch of the ledger")
        if one.first < position:
            faults.append(f"positions {one.first} to {position - 1} were read by steps up to {step} and again after it")
        step, position = one.step, one.end
    return faults


def _chunks(stretch: Stretch) -> Iterator[tuple[Ints, bool]]:
    """The positions of a stretch in rising order, CHUNK at a time, and whether they were jumped over."""
    bounds = [stretch.first, *(place for span in stretch.quarantined for place in span), stretch.end]
    jumped = False
    for first, end in pairwise(bounds):
        for start in range(first, end, CHUNK):
            yield np.arange(start, min(start + CHUNK, end)), jumped
        jumped = not jumped


def _compare(stretch: Stretch, checksum: int, found: Audit) -> None:
    if not stretch.rows:
        found.unchecked += 1
    elif stretch.rows == f"{checksum % 2**64:016x}":
        found.checked += 1
    else:
        found.faults.append(
            f"steps {stretch.from_step + 1} to {stretch.step}: the rows that the ranks used (checksum {stretch.rows}) "
            f"are not those of positions {stretch.first} to {stretch.end - 1} ({checksum % 2**64:016x})"
        )


def _replaced(run_dir: Path) -> dict[int, Replaced]:
    """By position: what ranks wrote of bad rows. A position that was read again after a restart met the same."""
    found = {}
    for file in sorted((run_dir / "replaced").glob("rank-*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                content = json.loads(line)
                found[int(content["position"])] = Replaced(
                    int(content["row"]), int(content["stand_in"]), str(content["key"]), str(content["reason"])
                )
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill; its position was then read again
    return found


def _checkpoint_faults(run_dir: Path, run: Run, manifests: Sequence[Manifest], last: Stretch) -> list[str]:
    """Whether the newest whole checkpoint tells the same story as the ledger."""
    states = sorted((run_dir / "checkpoints").glob("step-*/state.json"))
    if not states:
        return []
    try:
        state = json.loads(states[-1].read_text(encoding="utf-8"))
        step, position, data = int(state["step"]), int(state["position"]), str(state["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{states[-1]}: cannot be read: see limoe checkpoint verify {run_dir}"]
    faults = []
    if data != data_hash(run.data, manifests):
        here = f"{run.data.manifest} lists now, or in an older version of the data order"
        faults.append(f"{states[-1]}: the run was trained on other shards than {here}")
    if step == last.step and position != last.end:
        faults.append(f"{states[-1]}: position {position} at step {step}, but the ledger has {last.end}")
    return faults


def _explained(stretches: Sequence[Stretch], replaced: dict[int, Replaced], tally: _Tally) -> list[str]:
    notes = [
        f"positions {first} to {end - 1} were jumped over (quarantined after a rollback), in steps "
        f"{one.from_step + 1} to {one.step}"
        for one in stretches
        for first, end in one.quarantined
    ]
    met = tally.replaced_positions
    notes += [
        f'position {position}: row {replaced[position].row} "{replaced[position].key}" is bad '
        f"({replaced[position].reason}): row {replaced[position].stand_in} stood in"
        for position in met[:_NAMED]
    ]
    if len(met) > _NAMED:
        notes.append(f"... and {len(met) - _NAMED} more bad rows: see replaced/")
    return notes
