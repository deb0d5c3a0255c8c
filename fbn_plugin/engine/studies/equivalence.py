"""Tests of a mean that is known by its size, spread and number of values: whether it lies within a margin around zero
(two one-sided t-tests, TOST; Schuirmann, 1987), and on which side of a number it lies.
"""

import math

import numpy as np

from fbn_plugin.engine.studies.statistics import POWER

__all__ = ["equivalence_p", "mean_p", "seeds_for_equivalence"]

_MOST_SEEDS = 100_000
_POINTS = 2_001
_FAR = 9.0


def mean_p(mean: float, sd: float, n: int, number: float = 0.0) -> tuple[float, float]:
    """p of two one-sided t-tests: that the true mean is above a number, and that it is below.

    Args:
        mean, sd: of the values; sd above 0.
        n: how many, at least two.
        number: that the mean is held against.

    Examples::

        >>> [round(p, 4) for p in mean_p(2.0, 1.0, 3)]
        [0.0371, 0.9629]
    """
    from scipy import stats

    t = (mean - number) / sd * math.sqrt(n)
    return float(stats.t.sf(t, n - 1)), float(stats.t.cdf(t, n - 1))


def equivalence_p(mean: float, sd: float, n: int, margin: float) -> tuple[float, float]:
    """p that the true mean lies within ±margin, the larger of two one-sided tests; and p that it lies beyond, twice the
    smaller one of the other two.

    Args:
        mean, sd, n: as of :func:`mean_p`.
        margin: above 0.

    Examples::

        >>> [round(p, 4) for p in equivalence_p(0.1, 1.0, 10, 1.0)]
        [0.0096, 1.0]
    """
    upper_above, upper_below = mean_p(mean, sd, n, margin)
    lower_above, lower_below = mean_p(mean, sd, n, -margin)
    return max(upper_below, lower_above), min(1.0, 2 * min(upper_above, lower_below))


def seeds_for_equivalence(mean: float, sd: float, margin: float, alpha: float = 0.05) -> int | None:
    """The least number of pairs with which :func:`equivalence_p` is below alpha in 80 % of cases, were mean and
    standard deviation the true ones; None where the mean is not within the margin, and beyond 100,000.

    Examples::

        >>> seeds_for_equivalence(0.0, 1.0, 1.0), seeds_for_equivalence(1.5, 1.0, 1.0)
        (11, None)
    """
    if abs(mean) >= margin:
        return None
    low, high = 1, 2
    while _power(mean / sd, margin / sd, high, alpha) < POWER:
        if high > _MOST_SEEDS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = _power(mean / sd, margin / sd, middle, alpha) >= POWER
        low, high = (low, middle) if is_enough else (middle, high)
    return high


def _power(effect: float, margin: float, n: int, alpha: float) -> float:
    """Power of the two one-sided tests, by integration over the estimated deviation: given it, the mean has to lie
    between two bounds."""
    from scipy import special, stats

    degrees = n - 1
    chi = np.linspace(max(0.0, math.sqrt(degrees) - _FAR), math.sqrt(degrees) + _FAR, _POINTS)
    weights = stats.chi.pdf(chi, degrees)
    room = (margin - float(stats.t.isf(alpha, degrees)) * chi / math.sqrt(degrees * n)) * math.sqrt(n)
    shift = effect * math.sqrt(n)
    within = np.where(room > 0, special.ndtr(room - shift) - special.ndtr(-room - shift), 0.0)
    return float(weights @ within / weights.sum())
