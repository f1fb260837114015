"""Both generators: exact values against plain Python integers, distributions, and independence of streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from limoe_dist.data.order import mixed
from limoe_dist.data.philox import philox4x32, uniforms
from limoe_dist.parallel import counter_rng
from tests.draws import reference
from tests.draws.statistics import check_independent, check_normal, check_uniform

CPU, F64 = torch.device("cpu"), torch.float64
N = 100_000


def uniform(stream: int | torch.Tensor, count: int, dtype: torch.dtype = F64) -> np.ndarray:
    return counter_rng.uniform(stream, count, device=CPU, dtype=dtype).numpy()


def normal(stream: int | torch.Tensor, count: int, dtype: torch.dtype = F64) -> np.ndarray:
    return counter_rng.normal(stream, count, device=CPU, dtype=dtype).numpy()


def test_the_reference_of_splitmix_gives_the_published_numbers() -> None:
    # The first outputs of SplitMix64 for seed 1234567, as published with xoshiro's reference code and on Rosetta Code.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [reference.splitmix(1234567 + i * reference.GOLDEN) for i in range(1, 6)] == expected


def test_splitmix_of_the_data_order_is_the_reference() -> None:
    # There the golden ratio is added inside.
    words = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    expected = [reference.splitmix(word + reference.GOLDEN) for word in words]
    assert mixed(np.array(words, dtype=np.uint64)).tolist() == expected


@pytest.mark.parametrize("stream", [0, 1, 12345, 2**62 + 1, 2**63 - 1, reference.stream_key("init", 3, "a.weight")])
def test_uniform_and_normal_numbers_are_those_of_the_reference(stream: int) -> None:
    assert uniform(stream, 9).tolist() == reference.uniform(stream, 9)
    for count in (1, 2, 7, 8):
        np.testing.assert_allclose(normal(stream, count), reference.normal(stream, count), rtol=1e-13, atol=1e-15)
    members = [0, 1, 5, 2**40]
    keys = counter_rng.keys(stream, torch.tensor(members))
    for found, member in zip(uniform(keys, 5), members, strict=True):
        assert found.tolist() == reference.uniform(reference.member_key(stream, member), 5)
    for found, member in zip(normal(keys, 5), members, strict=True):
        expected = reference.normal(reference.member_key(stream, member), 5)
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)


def test_stream_keys_are_those_of_the_reference() -> None:
    for parts in ((), (0,), ("0",), ("init", 0, "norm.weight"), ("router-noise", 2**63 - 1, 7, 11), (1, 12), (11, 2)):
        assert counter_rng.key(*parts) == reference.stream_key(*parts)
    names = [("a", 1, 2), ("a", 2, 1), ("a", 12), ("a1", 2), ("a", "1", 2), ("a", 1, 2, 0), ("a", 1)]
    assert len({counter_rng.key(*parts) for parts in names}) == len(names)
    assert all(0 <= counter_rng.key(*parts) < 2**63 for parts in names)


def test_narrow_types_are_the_wide_stream_rounded() -> None:
    for draw in (uniform, normal):
        wide = draw(7, 1001)
        assert (draw(7, 1001, torch.float32) == wide.astype(np.float32)).all()
        assert np.abs(draw(7, 1001, torch.float32) - wide).max() > 0


def test_uniform_numbers_are_uniform_and_none_depends_on_an_earlier_one() -> None:
    values = uniform(counter_rng.key("x"), 2 * N)
    check_uniform(values, 0, 1, "uniform")
    assert values.min() > 0
    assert values.max() < 1
    check_independent(values[None], ["uniform"], lags=(1, 2, 3, 4, N))
    # All 53 bits are random: each is set in half of the numbers, and bits do not go together.
    bits = (values * 2**53).astype(np.int64)
    table = (bits >> np.arange(53)[:, None]) & 1
    # The lowest bit is rounded away from one half on.
    assert np.abs(table[1:].mean(axis=1) - 0.5).max() < 5 * 0.5 / math.sqrt(2 * N)
    assert np.abs(np.corrcoef(table[1:]) - np.eye(52)).max() < 6 / math.sqrt(2 * N)


def test_normal_numbers_are_normal_also_across_their_halves() -> None:
    for count in (2 * N, 2 * N - 1):
        values = normal(counter_rng.key("x"), count)
        assert values.shape == (count,)
        check_normal(values, 1.0, "normal")
    values = normal(counter_rng.key("y"), 2 * N)
    # One radius and one angle give the numbers i and N + i: they must not be related, nor must their squares be.
    check_independent(values.reshape(2, N), ["cosine", "sine"], lags=(0, 1, 2))
    radius, angle = np.hypot(*values.reshape(2, N)), np.arctan2(*values.reshape(2, N))
    check_uniform(np.exp(-(radius**2) / 2), 0, 1, "radius")
    check_uniform(angle, -math.pi, math.pi, "angle")
    check_independent([radius, angle], ["radius", "angle"])


def test_streams_of_neighbouring_keys_members_and_names_are_independent() -> None:
    count, members = 4000, torch.arange(12)
    rows, names = [], []
    # Not 0, a fixed point of the finaliser: its member 0 is the stream itself. Keys are hashes and never that small.
    for stream in (1, 2, 3, counter_rng.key("a", 0), counter_rng.key("a", 1), counter_rng.key("b", 0)):
        rows += [normal(stream, count), *normal(counter_rng.keys(stream, members), count)]
        names += [f"{stream}", *(f"{stream}/{member}" for member in range(12))]
    check_independent(rows, names, lags=(0, 1, 2, 3))


def test_members_of_a_stream_do_not_depend_on_which_others_are_asked_for() -> None:
    whole = normal(counter_rng.keys(9, torch.arange(10)), 33)
    for members in ([5], [9, 0, 5], [5, 5]):
        assert (normal(counter_rng.keys(9, torch.tensor(members)), 33) == whole[members]).all()


def test_the_reference_of_philox_gives_the_published_numbers() -> None:
    # Random123, kat_vectors: philox4x32 with 10 rounds.
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in known:
        assert reference.philox4x32(counter, key) == expected


def test_philox_is_the_reference_for_any_counter_and_key() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (4, 200), dtype=np.uint64)
    for key in ((0, 0), (1, 0), (0, 1), (0xFFFFFFFF, 0xDEADBEEF)):
        expected = [reference.philox4x32(tuple(counter), key) for counter in words.T.tolist()]
        assert philox4x32(words, key).T.tolist() == [list(found) for found in expected]


POSITIONS = (0, 1, 7, 2**32 - 1, 2**32, 2**32 + 7, 2**62)
SEEDS = (0, 1, 5, 2**32, 2**32 + 5, 2**63 - 1, 2**64 - 1)


def test_the_draws_of_a_position_are_those_of_the_reference() -> None:
    for seed in SEEDS:
        for draws in (1, 4, 5, 14):
            found = uniforms(np.array(POSITIONS), seed=seed, draws=draws)
            expected = [reference.philox_uniforms(position, seed, draws) for position in POSITIONS]
            assert found.T.tolist() == expected, (seed, draws)


def test_the_draws_of_positions_are_uniform_and_independent() -> None:
    draws = uniforms(np.arange(N), seed=3, draws=14)
    for number, values in enumerate(draws):
        check_uniform(values, 0, 1, f"draw {number}")
        assert values.max() < 1
    check_independent(draws, range(14), lags=(0, 1, 2))


def test_the_draws_of_neighbouring_seeds_are_independent_also_at_neighbouring_positions() -> None:
    seeds = (3, 4, 5, 2**32 + 3, 3 << 32)
    rows = np.concatenate([uniforms(np.arange(20_000), seed=seed, draws=6) for seed in seeds])
    check_independent(rows, [f"{seed}/{draw}" for seed in seeds for draw in range(6)], lags=(0, 1, 2, 3))
    # Positions that differ in the upper or in the lower word only.
    rows = np.concatenate([uniforms(np.arange(20_000) + (high << 32), seed=3, draws=4) for high in range(3)])
    check_independent(rows, [f"{high}/{draw}" for high in range(3) for draw in range(4)], lags=(0, 1))
