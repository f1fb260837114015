"""The stacks of real threads that stand where the test put them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from limoe_dist.parallel.preflight import wait_until
from limoe_dist.parallel.stacks import INNERMOST, OUTERMOST, SHOWN, alike, innermost, stacks


@contextmanager
def standing(name: str, depth: int) -> Iterator[threading.Thread]:
    """A thread that waits, `depth` calls deep."""
    there, go = threading.Event(), threading.Event()

    def dig(left: int) -> None:
        if left:
            dig(left - 1)
        else:
            there.set()
            go.wait()

    thread = threading.Thread(target=dig, args=(depth,), name=name, daemon=True)
    thread.start()
    there.wait()
    try:
        yield thread
    finally:
        go.set()
        thread.join()


def test_the_main_thread_one_in_a_collective_and_the_packages_own_are_shown_and_no_other() -> None:
    with standing("limoe-loader", 1), standing("other", 1), standing("autograd", 1) as inside:
        found = stacks(inside.ident)
    assert set(found) == {"main thread", "limoe-loader", "thread in the collective"}
    assert "test_stacks.py:" in found["main thread"]
    assert found["main thread"].count(" dig") == 0
    assert found["limoe-loader"].count("parallel/test_stacks.py:") == 2


def test_a_stack_is_whole_and_a_very_deep_one_lacks_its_middle() -> None:
    with standing("limoe-shallow", 20), standing("limoe-deep", 500):
        found = stacks(None)
    assert found["limoe-shallow"].count(" dig") == 21
    lines = found["limoe-deep"].splitlines()
    assert len(lines) == INNERMOST + 1 + OUTERMOST
    # 501 calls of dig, wait above them twice (Event and Condition), and three frames of threading below.
    assert lines[INNERMOST] == f"    ... {501 + 2 + 3 - INNERMOST - OUTERMOST} more ..."
    assert lines[0].endswith(" wait")
    assert lines[-1].endswith(" _bootstrap")


def test_a_line_leaves_out_the_standard_library() -> None:
    with standing("limoe-loader", 5) as thread:
        line = innermost(thread.ident)
    assert line.count(" dig") == 3
    assert "threading.py" not in line
    assert innermost(0) == "no Python"


def test_many_stacks_are_counted_and_not_printed() -> None:
    found = {rank: {"main thread": f"    f.py:{rank} f"} for rank in range(SHOWN + 3)}
    lines = alike(found, ["n1"] * len(found))
    assert len(lines) == 2 * SHOWN + 1
    assert lines[-1] == "and 3 more stacks"


def test_a_thread_of_a_pool_is_shown_while_it_works() -> None:
    started, go = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="limoe-resize") as pool:
        work = pool.submit(lambda: (started.set(), go.wait()))
        started.wait()
        assert "limoe-resize_0" in stacks(None)
        go.set()
        work.result()
        # It is idle a moment after it has handed over the result.
        wait_until(lambda: "limoe-resize_0" not in stacks(None), 10.0)
        assert "limoe-resize_0" not in stacks(None)
