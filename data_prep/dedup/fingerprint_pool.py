"""Makes the fingerprints that are missing, in this process or by a pool of others, with the progress shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from data_prep.dedup.fingerprints import Unit, write_fingerprints
from data_prep.imaging.pictures import Caps, limit_pillow
from data_prep.sources.source import Source
from data_prep.watched import watched
from data_prep.worker_pool import worker_pool
from limoe_dist.config.errors import UserError


def make_fingerprints(sources: Sequence[Source], units: Sequence[Unit], caps: Caps, *, workers: int) -> int:
    """Makes those that are missing, by so many processes; returns how many units that were."""
    missing = [unit for unit in units if not unit.file.exists()]
    for folder in {unit.file.parent for unit in missing}:
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".*.tmp"):
            left.unlink()  # of a run that was killed
    rows = sum(unit.rows for unit in missing)
    with watched("reading pictures", rows, unit="rows") as advance:
        if workers > 1 and len(missing) > 1:
            _in_a_pool(sources, missing, caps, min(workers, len(missing)), advance)
        else:
            limit_pillow(caps)
            for unit in missing:
                write_fingerprints(sources[unit.source], unit, caps)
                advance(unit.rows)
    return len(missing)


def _in_a_pool(
    sources: Sequence[Source], units: Sequence[Unit], caps: Caps, workers: int, advance: Callable[[int], None]
) -> None:
    try:
        with worker_pool(workers, _start_worker, sources, caps) as pool:
            todo = iter(units)
            waiting = {pool.submit(_do, unit) for unit in islice(todo, 2 * workers)}
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    advance(future.result())
                    if (unit := next(todo, None)) is not None:
                        waiting.add(pool.submit(_do, unit))
    except BrokenProcessPool:
        raise UserError(
            f"--workers={workers}: a worker was killed, perhaps because memory ran out: what is done is kept; the same "
            "command goes on, with fewer --workers it needs less memory"
        ) from None


_work: tuple[Sequence[Source], Caps] | None = None


def _start_worker(sources: Sequence[Source], caps: Caps) -> None:
    global _work
    _work = sources, caps
    limit_pillow(caps)


def _do(unit: Unit) -> int:
    assert _work is not None
    sources, caps = _work
    write_fingerprints(sources[unit.source], unit, caps)
    return unit.rows
