from __future__ import annotations

import numpy as np

from limoe_dist.data.philox import philox4x32, uniforms


def test_philox_gives_the_published_numbers() -> None:
    # Known answers of Random123 (kat_vectors): philox4x32, 10 rounds; columns are counter words, then key words.
    ones = 0xFFFFFFFF
    pi = np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], dtype=np.uint64)[:, None]
    answers = [
        (np.zeros((4, 1), dtype=np.uint64), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (np.full((4, 1), ones, dtype=np.uint64), (ones, ones), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, (0xA4093822, 0x299F31D0), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, expected in answers:
        assert philox4x32(counter, key)[:, 0].tolist() == expected


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    positions = np.arange(50)
    together = uniforms(positions, seed=9, draws=6)
    for i in (0, 17, 49):
        assert (uniforms(positions[i : i + 1], seed=9, draws=6)[:, 0] == together[:, i]).all()
    assert (uniforms(positions, seed=9, draws=14)[:6] == together).all()
    assert not (uniforms(positions, seed=10, draws=6) == together).any()


def test_seeds_and_positions_beyond_32_bits_count_in_full() -> None:
    position = np.array([5])
    base = uniforms(position, seed=5, draws=1)
    assert uniforms(position, seed=5 + 2**32, draws=1) != base
    assert uniforms(position + 2**32, seed=5, draws=1) != base


def test_draws_are_uniform_and_independent() -> None:
    u = uniforms(np.arange(20_000), seed=1, draws=5)
    assert u.min() >= 0.0
    assert u.max() < 1.0
    # Mean of 20,000: 0.5 with standard deviation 0.002; correlation of two draws: 0 with 0.007. Bounds: five of them.
    assert np.abs(u.mean(axis=1) - 0.5).max() < 0.0102
    assert np.abs(np.corrcoef(u) - np.eye(5)).max() < 0.036
