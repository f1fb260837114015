"""What a rank is in, by a clock that the test turns, and what it has counted."""

from __future__ import annotations

import threading

import pytest

from limoe_dist.parallel.mesh import Axis, Mesh
from limoe_dist.parallel.traffic import PAIRS, Standing, Traffic, Volume


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Marker:
    """Of a device's queue, as a CUDA event: passed when the test says so, at that millisecond of the device."""

    def __init__(self) -> None:
        self.passed_ms: float | None = None

    def query(self) -> bool:
        return self.passed_ms is not None

    def elapsed_time(self, later: Marker) -> float:
        assert self.passed_ms is not None
        assert later.passed_ms is not None
        return later.passed_ms - self.passed_ms


class Queue:
    """A device that works off its queue when the test says so."""

    def __init__(self) -> None:
        self.markers: list[Marker] = []

    def mark(self) -> Marker:
        self.markers.append(Marker())
        return self.markers[-1]

    def pass_all(self, *milliseconds: float) -> None:
        """The device has come to these many more markers, at these times of it."""
        waiting = [marker for marker in self.markers if not marker.query()]
        for marker, passed_ms in zip(waiting, milliseconds, strict=False):
            marker.passed_ms = passed_ms


def test_a_rank_is_inside_until_it_leaves_and_then_the_call_is_its_last() -> None:
    clock = Clock()
    traffic = Traffic(clock=clock)
    axis = Axis("ep", 2, 0, None, traffic)
    assert traffic.standing() is None
    with traffic.call("all_to_all", axis, 64):
        clock.now += 3
        me = threading.get_ident()
        assert traffic.standing() == Standing(True, "all_to_all", "ep", 64, number=1, seconds=3, thread=me)
    clock.now += 5
    assert traffic.standing() == Standing(False, "all_to_all", "ep", 64, number=1, seconds=5, thread=None)


def test_an_asynchronous_call_counts_at_its_launch_and_is_inside_while_it_is_waited_for() -> None:
    clock = Clock()
    traffic = Traffic(clock=clock)
    axis = Axis("dp", 2, 0, None, traffic)
    call = traffic.call("reduce_scatter", axis, 16)
    assert traffic.counts() == {("reduce_scatter", "dp"): Volume(1, 16)}
    assert traffic.standing() is None
    clock.now += 7
    with call:
        clock.now += 2
        standing = traffic.standing()
        assert standing is not None
        assert (standing.inside, standing.seconds) == (True, 2)


def test_behind_a_devices_queue_the_oldest_unfinished_call_is_the_one_it_is_in() -> None:
    clock, queue = Clock(), Queue()
    traffic = Traffic(clock=clock, mark=queue.mark)
    axis = Axis("world", 2, 0, None, traffic)
    for num_bytes in (1, 2):
        with traffic.call("all_reduce", axis, num_bytes):
            clock.now += 1
    clock.now += 10
    standing = traffic.standing()
    assert standing is not None
    assert (standing.inside, standing.num_bytes, standing.seconds) == (True, 1, 12)
    queue.pass_all(0.0, 1.0)
    standing = traffic.standing()
    assert standing is not None
    assert (standing.inside, standing.num_bytes) == (False, 2)


def test_reset_forgets_the_counts_but_not_the_number() -> None:
    traffic = Traffic()
    axis = Axis("tp", 2, 0, None, traffic)
    for _ in range(2):
        with traffic.call("all_gather", axis, 8):
            pass
    assert traffic.counts() == {("all_gather", "tp"): Volume(2, 16)}
    traffic.reset()
    assert traffic.counts() == {}
    with traffic.call("all_gather", axis, 8):
        standing = traffic.standing()
        assert standing is not None
        assert standing.number == 3


def test_an_error_that_a_collective_raised_is_known_again_also_as_a_cause() -> None:
    traffic = Traffic()
    axis = Axis("tp", 2, 0, None, traffic)
    with pytest.raises(RuntimeError) as raised, traffic.call("all_gather", axis, 8):
        raise RuntimeError("Connection closed by peer")
    wrapped = ValueError("a step failed")
    wrapped.__cause__ = raised.value
    assert traffic.broke_with(raised.value)
    assert traffic.broke_with(wrapped)
    assert not traffic.broke_with(RuntimeError("Connection closed by peer"))


def test_the_axes_of_a_mesh_count_in_one_place_and_stay_equal() -> None:
    mesh = Mesh.single()
    assert mesh.ep.traffic is mesh.world.traffic
    assert Axis("ep", 1, 0, None) == mesh.ep


def test_what_a_rank_waits_is_the_time_inside_of_calls_since_it_was_last_asked() -> None:
    clock = Clock()
    traffic = Traffic(clock=clock)
    axis = Axis("dp", 2, 0, None, traffic)
    with traffic.call("all_gather", axis, 8):
        clock.now += 3
    pending = traffic.call("reduce_scatter", axis, 8)
    # Work, while the asynchronous call goes on.
    clock.now += 10
    with pending:
        clock.now += 0.5
    assert traffic.take_waited() == 3.5
    assert traffic.take_waited() == 0


def test_what_a_device_waits_is_between_the_markers_around_a_call_once_it_has_passed_them() -> None:
    clock, queue = Clock(), Queue()
    traffic = Traffic(clock=clock, mark=queue.mark)
    axis = Axis("dp", 2, 0, None, traffic)
    for _ in range(3):
        with traffic.call("all_reduce", axis, 8):
            # The host only puts it into the queue.
            clock.now += 0.001
    assert traffic.take_waited() == 0
    # The device: work until 100 ms, in the first call until 150; in the second from 200 to 230; and at the third.
    queue.pass_all(100, 150, 200, 230, 300)
    assert traffic.take_waited() == pytest.approx(0.080)
    queue.pass_all(310)
    assert traffic.take_waited() == pytest.approx(0.010)


def test_markers_that_nobody_asks_for_do_not_pile_up() -> None:
    queue = Queue()
    traffic = Traffic(mark=queue.mark)
    axis = Axis("dp", 2, 0, None, traffic)
    for number in range(2 * PAIRS):
        with traffic.call("all_reduce", axis, 8):
            pass
        queue.pass_all(10.0 * number, 10.0 * number + 1)
    assert len(traffic._pairs) <= PAIRS
    assert traffic.take_waited() == pytest.approx(2 * PAIRS / 1000)
