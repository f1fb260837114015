from __future__ import annotations

import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankFailure, RanksPool


@pytest.fixture(scope="module")
def pool():
    """A pool for the tests that kill ranks, which would cost the other tests a new start."""
    pool = RanksPool(2)
    yield pool
    pool.close()


def place_and_total(value):
    x = torch.tensor(value + dist.get_rank())
    dist.all_reduce(x)
    return dist.get_rank(), dist.get_world_size(), dist.get_backend(), torch.get_num_threads(), x


def leaf_and_square(x):
    leaf = x.requires_grad_()
    return {"square": leaf.square(), "process": os.getpid(), "draw": torch.rand(()).item()}


def raise_on_rank_1_while_rank_0_waits():
    if dist.get_rank() == 1:
        raise ValueError("the weight of rank one")
    dist.barrier()


def die_on_rank_0():
    if dist.get_rank() == 0:
        os._exit(3)
    dist.barrier()


def sleep_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_come_back_by_rank(ranks2):
    # 10 + 11 = 21 on both ranks; one arithmetic thread each.
    assert ranks2.run(place_and_total, 10) == [(0, 2, "gloo", 1, 21), (1, 2, "gloo", 1, 21)]


def test_four_ranks_reduce_together(ranks4):
    # 1 + 2 + 3 + 4
    assert [answer[-1] for answer in ranks4.run(place_and_total, 1)] == [10, 10, 10, 10]


def test_the_pool_of_one_size_is_one_pool(ranks_pool, ranks2):
    assert ranks_pool(2) is ranks2


def test_tensors_are_copied_and_processes_are_reused(ranks2):
    x = torch.tensor([3.0])
    first, second = ranks2.run(leaf_and_square, x), ranks2.run(leaf_and_square, x)
    assert not x.requires_grad
    assert first[0]["square"].item() == 9.0
    processes = [answer["process"] for answer in first]
    assert processes == [answer["process"] for answer in second]
    assert len({os.getpid(), *processes}) == 3
    # Both ranks and both calls begin with the same seed, so that no test depends on the tests before it.
    assert len({answer["draw"] for answer in first + second}) == 1


def test_a_failing_rank_is_named_at_once_and_the_pool_recovers(pool):
    pool.run(place_and_total, 0)
    start = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 raised:.*ValueError: the weight of rank one"):
        pool.run(raise_on_rank_1_while_rank_0_waits)
    # Rank 0 would have waited 60 s in its barrier.
    assert time.monotonic() - start < 30
    assert [answer[-1] for answer in pool.run(place_and_total, 10)] == [21, 21]


def test_a_rank_that_dies_is_named(pool):
    with pytest.raises(RankFailure, match=r"rank 0 of 2 ended with exit code 3"):
        pool.run(die_on_rank_0)


def test_a_silent_rank_is_named_when_time_is_up(pool):
    pool.run(place_and_total, 0)
    with pytest.raises(RankFailure, match=r"no answer from ranks \[1\] of 2"):
        pool.run(sleep_on_rank_1, timeout_s=0.5)


def test_a_function_that_no_other_process_can_import_is_refused_before_any_rank_starts():
    pool = RanksPool(2)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pool.run(lambda: None)
    assert not pool._processes
