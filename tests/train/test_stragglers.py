"""When a rank, or a host, is called slow, from seconds of work that the test makes up."""

from __future__ import annotations

from limoe_dist.train.stragglers import Stragglers

HOSTS = ["n1", "n1", "n2", "n2"]
EVEN, SLOW = [0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.5]


def looks(stragglers: Stragglers, *lines: list[float]) -> list[str | None]:
    return [stragglers.look(busy_s, seconds_per_step=1.0) for busy_s in lines]


def test_a_rank_is_named_at_the_third_line_in_a_row_and_then_no_more() -> None:
    stragglers = Stragglers(HOSTS, 1.5)
    before = looks(stragglers, SLOW, SLOW, EVEN, SLOW, SLOW)
    assert before == [None] * 5
    line, *after = looks(stragglers, *[SLOW] * 6)
    assert line is not None
    assert line.startswith("slow: rank 3 (host n2): up to 0.5 s a step outside of collectives, where the median ")
    assert "works 0.2 s" in line
    assert after == [None] * 5


def test_it_is_named_again_only_after_it_was_fine_for_as_long() -> None:
    stragglers = Stragglers(HOSTS, 1.5)
    looks(stragglers, SLOW, SLOW, SLOW)
    assert looks(stragglers, EVEN, EVEN, SLOW, SLOW, SLOW) == [None] * 5
    *quiet, again = looks(stragglers, EVEN, EVEN, EVEN, SLOW, SLOW, SLOW)
    assert quiet == [None] * 5
    assert again is not None


def test_a_host_whose_ranks_are_all_slow_is_named_as_one() -> None:
    stragglers = Stragglers(["n1", "n1", "n2", "n2", "n3", "n3"], 1.5)
    *_, line = looks(stragglers, *[[0.1, 0.4, 0.3, 0.35, 0.1, 0.1]] * 3)
    assert line is not None
    assert line.startswith("slow: host n2 (ranks 2-3, all that it has), rank 1 (host n1): up to 0.4 s a step ")


def test_of_two_ranks_the_slower_one_stands_out() -> None:
    *_, line = looks(Stragglers(["n1", "n2"], 1.5), *[[0.2, 0.4]] * 3)
    assert line is not None
    assert line.startswith("slow: rank 1 (host n2): ")


def test_under_the_factor_or_a_twentieth_of_the_step_nobody_is_slow() -> None:
    assert looks(Stragglers(HOSTS, 1.5), *[[0.2, 0.2, 0.2, 0.3]] * 4) == [None] * 4
    # Five times the median, which is 0.04 s of a step of a second.
    assert looks(Stragglers(HOSTS, 1.5), *[[0.01, 0.01, 0.01, 0.05]] * 4) == [None] * 4
    assert looks(Stragglers(["n1"], 1.5), *[[0.9]] * 4) == [None] * 4
