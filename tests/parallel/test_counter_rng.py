"""Numbers from keys: repeatable, independent, and of the distribution that they claim."""

from __future__ import annotations

import pytest
import torch

from limoe_dist.parallel import counter_rng

CPU, F64 = torch.device("cpu"), torch.float64


def test_the_same_key_gives_the_same_numbers_and_another_key_others() -> None:
    first = counter_rng.normal(counter_rng.key("a", 1), 64, device=CPU, dtype=F64)
    assert torch.equal(first, counter_rng.normal(counter_rng.key("a", 1), 64, device=CPU, dtype=F64))
    assert not torch.equal(first, counter_rng.normal(counter_rng.key("a", 2), 64, device=CPU, dtype=F64))
    # 1 and "1" are different parts, and ("ab", "c") is not ("a", "bc").
    assert counter_rng.key(1) != counter_rng.key("1")
    assert counter_rng.key("ab", "c") != counter_rng.key("a", "bc")


def test_a_key_is_the_same_on_every_machine() -> None:
    # Written down once: runs must be repeatable by later versions.
    assert counter_rng.key("init", 0, "norm.weight") == 4383322576204350061
    values = counter_rng.uniform(12345, 3, device=CPU, dtype=F64).tolist()
    assert values == pytest.approx([0.4988858904, 0.4581311899, 0.5383267664], abs=1e-9)


def test_a_key_counts_modulo_2_64() -> None:
    for same, stream in ((2**64 + 5, 5), (-1, 2**64 - 1)):
        one, other = (counter_rng.uniform(number, 4, device=CPU, dtype=F64) for number in (same, stream))
        assert torch.equal(one, other)


def test_a_member_of_many_streams_is_the_stream_alone() -> None:
    stream = counter_rng.key("noise", 3)
    groups = torch.arange(10, 14)
    together = counter_rng.normal(counter_rng.keys(stream, groups), 33, device=CPU, dtype=F64)
    alone = counter_rng.normal(counter_rng.keys(stream, groups[2:3]), 33, device=CPU, dtype=F64)
    assert torch.equal(together[2:3], alone)


def test_a_longer_uniform_stream_begins_like_a_shorter_one() -> None:
    long = counter_rng.uniform(7, 100, device=CPU, dtype=F64)
    assert torch.equal(long[:10], counter_rng.uniform(7, 10, device=CPU, dtype=F64))


def test_uniform_numbers_fill_the_open_unit_interval_evenly() -> None:
    values = counter_rng.uniform(1, 200_000, device=CPU, dtype=F64)
    assert values.min() > 0
    assert values.max() < 1
    # 20 cells of 10,000 expected: chi-square with 19 degrees of freedom exceeds 43.8 once in a thousand keys.
    counts = torch.histc(values, bins=20, min=0, max=1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 43.8


def test_normal_numbers_have_mean_0_deviation_1_and_no_echo_between_neighbouring_keys() -> None:
    streams = counter_rng.keys(counter_rng.key("x"), torch.arange(200))
    values = counter_rng.normal(streams, 1000, device=CPU, dtype=F64)
    # 200,000 numbers: the mean's standard error is 0.0022, that of the deviation 0.0016; five of them are allowed.
    assert abs(values.mean().item()) < 0.011
    assert abs(values.std().item() - 1) < 0.008
    correlation = torch.corrcoef(values)[torch.triu_indices(200, 200, 1).unbind()]
    # 19,900 correlations of 1,000 numbers each, standard error 0.032: the largest is near 4.2 of them by chance.
    assert correlation.abs().max() < 6 * 0.032
