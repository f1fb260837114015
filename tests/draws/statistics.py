"""Statistical checks of random draws, with thresholds from the number of draws.

Every draw of the product is a function of its key, so a check gives the same result at every run: a threshold of five
standard errors needs to hold once, and a defect of one part in a hundred is many standard errors at 10^5 draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

SIGMAS = 5.0
"""Allowed standard errors of one statistic: exceeded by chance once in 1.7 million."""
SIGMAS_OF_MANY = 6.0
"""Allowed standard errors of the largest of up to 10^5 correlations: exceeded by chance once in 5,000 checks."""
KS_LIMIT = 2.7
"""Kolmogorov-Smirnov distance times sqrt(n): exceeded with probability 2 exp(-2 * 2.7^2) = 1e-6."""


def ks_distance(values: Floats, cdf: Callable[[Floats], Floats]) -> float:
    """Largest distance between the empirical distribution and `cdf`, times sqrt(n)."""
    ordered = np.sort(values.ravel())
    n = len(ordered)
    expected = cdf(ordered)
    steps = np.arange(n + 1) / n
    return float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()) * math.sqrt(n))


def normal_cdf(values: Floats) -> Floats:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in values.tolist()])


def check_uniform(values: npt.ArrayLike, low: float, high: float, what: str, *, tolerance: float = 0.0) -> None:
    """n values that are uniform in low to high. tolerance: rounding of the values, as a share of the range."""
    unit = (np.asarray(values, dtype=np.float64).ravel() - low) / (high - low)
    n = len(unit)
    assert unit.min() >= -tolerance, f"{what}: {unit.min()} is below the range"
    assert unit.max() <= 1 + tolerance, f"{what}: {unit.max()} is above the range"
    # P(no draw in the outer 14 / n of an end) = exp(-14) = 8e-7.
    assert unit.min() < 14 / n + tolerance, f"{what}: the low end is never reached, {unit.min()}"
    assert unit.max() > 1 - 14 / n - tolerance, f"{what}: the high end is never reached, {unit.max()}"
    check_moments(math.sqrt(12) * (unit - 0.5), UNIFORM_MOMENTS, what)
    distance = ks_distance(np.clip(unit, 0, 1), lambda x: x)
    assert distance < KS_LIMIT, f"{what}: Kolmogorov-Smirnov distance {distance}"


def check_normal(values: npt.ArrayLike, std: float, what: str) -> None:
    """n normal values of mean 0."""
    scaled = np.asarray(values, dtype=np.float64).ravel() / std
    n = len(scaled)
    check_moments(scaled, NORMAL_MOMENTS, what)
    # The largest of n: P(|x| > a) < 1e-6 / n. Of 10^5 draws at least one is beyond 3.5 but for a chance of exp(-46).
    largest = math.sqrt(2 * math.log(1e6 * n))
    assert np.abs(scaled).max() < largest, f"{what}: {np.abs(scaled).max()} standard deviations"
    if n >= 50_000:
        assert min(scaled.max(), -scaled.min()) > 3.5, f"{what}: the tails are cut off"
    step = max(1, n // 20_000)
    distance = ks_distance(scaled[::step], normal_cdf)
    assert distance < KS_LIMIT, f"{what}: Kolmogorov-Smirnov distance {distance}"


# E[x^k] for k = 1..8. Uniform with variance 1: 3^(k/2) / (k + 1) for even k. Normal: (k - 1)!!.
UNIFORM_MOMENTS = (0.0, 1.0, 0.0, 9 / 5, 0.0, 27 / 7, 0.0, 9.0)
NORMAL_MOMENTS = (0.0, 1.0, 0.0, 3.0, 0.0, 15.0, 0.0, 105.0)


def check_moments(scaled: Floats, moments: Sequence[float], what: str) -> None:
    """The first four moments, within SIGMAS standard errors: the mean of x^k has variance (m_2k - m_k^2) / n."""
    for k in range(1, 5):
        error = math.sqrt((moments[2 * k - 1] - moments[k - 1] ** 2) / len(scaled))
        found = float((scaled**k).mean())
        assert abs(found - moments[k - 1]) < SIGMAS * error, f"{what}: moment {k} is {found}, error {error}"


def check_share(chosen: npt.ArrayLike, probability: float, what: str) -> None:
    """n booleans that are true with this probability."""
    values = np.asarray(chosen, dtype=np.float64)
    error = math.sqrt(probability * (1 - probability) / values.size)
    assert abs(values.mean() - probability) <= SIGMAS * error, f"{what}: {values.mean()} instead of {probability}"


def check_counts(counts: npt.ArrayLike, what: str) -> None:
    """Counts of equally likely cells: chi-square of f degrees of freedom has mean f and standard deviation sqrt(2 f).

    Five standard deviations and 5^2 / 3 more for the skew (Wilson and Hilferty): exceeded once in a million.
    """
    cells = np.asarray(counts, dtype=np.float64).ravel()
    expected, free = cells.mean(), cells.size - 1
    chi_square = ((cells - expected) ** 2 / expected).sum()
    limit = free + SIGMAS * math.sqrt(2 * free) + SIGMAS**2 / 3
    assert chi_square < limit, f"{what}: chi-square {chi_square} of {free} degrees of freedom"


def features(rows: Floats) -> Floats:
    """(k, n) -> (3 k, n): each row, its absolute value and its square, centred and of length 1."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    found = np.concatenate([centred, np.abs(centred), centred**2])
    found -= found.mean(axis=1, keepdims=True)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    assert (length > 0).all(), f"constant draws: {np.flatnonzero(length.ravel() == 0).tolist()}"
    return found / length


def check_independent(
    rows: npt.ArrayLike, names: Sequence[object], *, lags: Sequence[int] = (0,), sigmas: float = SIGMAS_OF_MANY
) -> None:
    """k streams of n draws each, uncorrelated in values, absolute values and squares, all with all.

    lags: distances between the draws that are compared; 0 compares different streams at one place, another lag also
    compares each stream with itself. A correlation of n independent pairs has the standard error 1 / sqrt(n).
    """
    found = features(np.asarray(rows, dtype=np.float64))
    k, n = len(names), found.shape[1]
    assert len(found) == 3 * k
    for lag in lags:
        table = np.abs(found[:, : n - lag] @ found[:, lag:].T) * math.sqrt(n)
        if lag == 0:
            # A stream and its own square are not independent.
            same = np.tile(np.eye(k, dtype=bool), (3, 3))
            table[same] = 0.0
        worst = np.unravel_index(table.argmax(), table.shape)
        first, second = (f"{('', '|.| of ', 'square of ')[i // k]}{names[i % k]}" for i in worst)
        assert table[worst] < sigmas, f"{first} and {second} at lag {lag}: {table[worst]} standard errors"
