from __future__ import annotations

import numpy as np
import pytest

from limoe_dist.analysis.thin import thin


def test_first_last_and_extremes_stay() -> None:
    steps = np.arange(100_000.0)
    values = np.sin(steps / 3000)
    values[41_234], values[77_777] = 50.0, -60.0
    thinned, kept = thin(steps, values)
    assert 4 < len(thinned) <= 400
    assert (thinned[0], thinned[-1]) == (0, 99_999)
    assert (kept.max(), kept.min()) == (50.0, -60.0)
    assert thinned[kept.argmax()] == 41_234
    assert (np.diff(thinned) > 0).all()
    assert (kept == values[thinned.astype(int)]).all()


def test_every_stretch_keeps_its_own_extremes() -> None:
    # Ten points, of which 6 may stay: the ends, and the least and largest of points 0-4 and 5-9.
    values = np.array([5.0, 1, 6, 9, 5, 5, 2, 8, 3, 5])
    thinned, kept = thin(np.arange(10.0), values, most=6)
    assert thinned.tolist() == [0, 1, 3, 6, 7, 9]
    assert kept.tolist() == [5, 1, 9, 2, 8, 5]


def test_a_short_curve_stays_as_it_is() -> None:
    steps = np.array([10.0, 20, 30])
    assert thin(steps, steps)[0].tolist() == [10, 20, 30]


def test_fewer_points_than_ends_and_extremes_are_refused() -> None:
    with pytest.raises(ValueError, match="most=3"):
        thin(np.arange(9.0), np.arange(9.0), most=3)
