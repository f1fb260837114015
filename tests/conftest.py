"""Fixtures of all tests: pools of gloo ranks, and hypothesis without clock, chance or a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.ranks import RanksPool

# Before torch is imported, here and in every process that a test starts: tensors are small, a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# derandomize: a failure is the same failure at the next run. No deadline: shared machines have slow moments.
settings.register_profile("steady", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("steady")


POOLS = {"ranks_pool", "ranks2", "ranks4"}
LONG_ROOMS = {"launch", "ranks", "checkpoint"}


@pytest.fixture(scope="session")
def ranks_pool() -> Iterator[Callable[[int], RanksPool]]:
    """ranks_pool(world): the session's one pool of that many ranks."""
    # Imported here: tests of config and manifest need no torch.
    from tests.support.ranks import RanksPool

    pools: dict[int, RanksPool] = {}
    yield lambda world: pools.setdefault(world, RanksPool(world))
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def ranks2(ranks_pool: Callable[[int], RanksPool]) -> RanksPool:
    return ranks_pool(2)


@pytest.fixture(scope="session")
def ranks4(ranks_pool: Callable[[int], RanksPool]) -> RanksPool:
    return ranks_pool(4)


# Before pytest-xdist's own, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist a file stays on one worker, and so do all tests that share the pools of ranks.

    The rooms that take longest come first, so that no worker is left with one of them at the end.
    """
    pooled = {id(item) for item in items if POOLS & {*getattr(item, "fixturenames", ())}}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ranks" if id(item) in pooled else str(item.path)))
    items.sort(key=lambda item: (id(item) not in pooled, not {*item.path.parts} & LONG_ROOMS))
